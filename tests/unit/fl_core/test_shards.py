"""Arrays cut in any way into any number of files come back whole, and in any region; what is damaged is named."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from fl_core.contracts.errors import IntegrityError
from fl_core.contracts.shards import Piece, ShardReader, shard_parts
from fl_core.storage.atomic import sha256_file

DTYPES = ("float64", "float32", "float16", "int64", "uint8", "bool")


def cells(shape: tuple[int, ...], cuts: list[list[int]]) -> list[tuple[slice, ...]]:
    axes = []
    for size, inner in zip(shape, cuts, strict=True):
        bounds = [0, *sorted({min(c, size) for c in inner}), size]
        axes.append([slice(a, b) for a, b in itertools.pairwise(bounds)])
    return list(itertools.product(*axes))


def write(folder: Path, files: list[list[Piece]]) -> dict[str, str]:
    digests = {}
    for number, pieces in enumerate(files):
        path = folder / f"rank-{number:05d}.safetensors"
        path.write_bytes(b"".join(shard_parts(pieces)))
        digests[path.name] = sha256_file(path)
    return digests


@st.composite
def regions(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], list[tuple[slice, ...]], tuple[slice, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    dtype = draw(st.sampled_from(DTYPES))
    array = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2 if dtype == "bool" else 200, shape)
    cuts = [draw(st.lists(st.integers(0, 7), max_size=3)) for _ in shape]
    wanted = []
    for size in shape:
        low = draw(st.integers(0, size))
        wanted.append(slice(low, draw(st.integers(low, size))))
    return np.asarray(array).astype(dtype), cells(shape, cuts), tuple(wanted)


@settings(max_examples=60, deadline=None)
@given(found=regions())
def test_any_region_of_an_array_cut_anywhere(
    found: tuple[np.ndarray[Any, Any], list[tuple[slice, ...]], tuple[slice, ...]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    array, cut, wanted = found
    folder = tmp_path_factory.mktemp("shards")
    files = [
        [Piece(name="a", shape=array.shape, offset=tuple(s.start for s in cell), array=array[cell])] for cell in cut
    ]
    files.append([Piece(name="b", shape=(), offset=(), array=np.array(3.5))])
    with ShardReader(folder, write(folder, files)) as shards:
        shards.verify()
        assert shards.read("a").dtype == array.dtype
        np.testing.assert_array_equal(shards.read("a"), array)
        region = shards.read("a", tuple(s.start for s in wanted), tuple(s.stop - s.start for s in wanted))
        np.testing.assert_array_equal(region, array[wanted])
        assert shards.read("b") == 3.5
        whole = load(b"".join(shards.whole_parts("")))
    assert set(whole) == {"a", "b"}
    np.testing.assert_array_equal(whole["a"], array)


def two(folder: Path) -> dict[str, str]:
    array = np.arange(12.0).reshape(4, 3)
    pieces = [Piece(name="m/a", shape=(4, 3), offset=(low, 0), array=array[low : low + 2]) for low in (0, 2)]
    return write(folder, [[p] for p in pieces])


def test_a_missing_file_a_missing_piece_and_a_changed_byte_are_named(tmp_path: Path) -> None:
    digests = two(tmp_path)
    first, second = sorted(digests)
    with ShardReader(tmp_path, {first: digests[first]}) as half:
        half.read("m/a", (0, 0), (2, 3))
        with pytest.raises(IntegrityError, match="'m/a' is not complete"):
            half.read("m/a")
        with pytest.raises(IntegrityError, match="'m/b' is missing"):
            half.read("m/b")
    data = bytearray((tmp_path / second).read_bytes())
    data[-1] ^= 1
    (tmp_path / second).write_bytes(data)
    with ShardReader(tmp_path, digests) as changed:
        changed.verify(0, 2)  # the other process's file
        with pytest.raises(IntegrityError, match=f"{second}: its sha256"):
            changed.verify(1, 2)
    (tmp_path / second).write_bytes(data[: len(data) // 2])
    with pytest.raises(IntegrityError, match=f"{second}: not a readable shard"):
        ShardReader(tmp_path, digests)
    (tmp_path / second).unlink()
    with pytest.raises(IntegrityError, match=f"{second}: no such file"):
        ShardReader(tmp_path, digests)
    with pytest.raises(IntegrityError, match="no such file"):
        ShardReader(tmp_path, {"../" + first: ""})


@pytest.mark.parametrize(
    ("shape", "offset"),
    [((4, 3), (3, 0)), ((4, 3), (-1, 0)), ((5, 3), (2, 0)), ((4,), (2,))],
    ids=["reaches over", "before the array", "another shape", "other axes"],
)
def test_pieces_that_do_not_fit_together_are_refused(
    shape: tuple[int, ...], offset: tuple[int, ...], tmp_path: Path
) -> None:
    array = np.zeros((2, 3))
    files = [
        [Piece(name="a", shape=(4, 3), offset=(0, 0), array=array)],
        [Piece(name="a", shape=shape, offset=offset, array=array)],
    ]
    with pytest.raises(IntegrityError, match=r"rank-00001\.safetensors: not a readable shard: array 'a' does not fit"):
        ShardReader(tmp_path, write(tmp_path, files))
