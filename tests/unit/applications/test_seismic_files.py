"""seismic_facies: files of every kind and their faults, and data sets that stay on disk."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import segyio
import zarr

from applications.seismic_facies import (
    APPLICATION,
    data,
    metrics,
)
from applications.seismic_facies.config import Config
from applications.seismic_facies.data import Volumes
from applications.seismic_facies.pipeline import UNLABELLED
from fl_core.contracts.errors import DataError
from fl_core.learning.windows import Windows
from tests.helpers import same_examples
from tests.seismic import CONFIG, configured

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def made() -> Volumes:
    found: Volumes = APPLICATION.generate(CONFIG, 3)
    return found


def table(folder: Path, *rows: dict[str, str]) -> Path:
    """A data set of the files that lie in ``folder``."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / "volumes.csv").write_text(out.getvalue(), encoding="utf-8")
    return folder


def one(folder: Path, amplitude: str, labels: str = "", **more: str) -> Path:
    return table(folder, {"volume": "v", "client": "c", "amplitude": amplitude, "labels": labels, **more})


def refused(folder: Path, *expected: str, config: Config = CONFIG) -> None:
    with pytest.raises(DataError) as error:
        data.read(folder).examples(config)
    for text in expected:
        assert text in str(error.value)


def write_segy(path: Path, cube: Array, *, first: tuple[int, int] = (100, 300), order: str = "inline") -> None:
    """Big-endian IEEE SEG-Y with 4 ms samples."""
    spec = segyio.spec()
    spec.format, spec.sorting = 5, 2 if order == "inline" else 1
    spec.samples = np.arange(cube.shape[2]) * 4.0
    spec.tracecount = cube.shape[0] * cube.shape[1]
    cells = list(np.ndindex(cube.shape[:2]))
    if order == "crossline":
        cells.sort(key=lambda c: (c[1], c[0]))
    with segyio.create(str(path), spec) as file:
        for number, (i, x) in enumerate(cells):
            file.header[number] = {
                segyio.TraceField.INLINE_3D: first[0] + 2 * i,
                segyio.TraceField.CROSSLINE_3D: first[1] + x,
                segyio.TraceField.TRACE_SAMPLE_COUNT: cube.shape[2],
                segyio.TraceField.TRACE_SAMPLE_INTERVAL: 4000,
            }
            file.trace[number] = cube[i, x].astype(np.float32)
        file.bin.update(hns=cube.shape[2], hdt=4000)


def edit_header(path: Path, trace: int, field: int, value: int) -> None:
    with segyio.open(str(path), "r+", ignore_geometry=True) as file:
        file.header[trace] = {field: value}


@pytest.mark.parametrize("kind", ["npy", "npz", "zarr", "sgy", "crossline-sorted sgy"])
def test_every_kind_of_file_gives_the_same_examples(kind: str, made: Volumes, tmp_path: Path) -> None:
    block = made.blocks[0]
    cube, labels = np.asarray(block.amplitude.data), np.asarray(block.labels)
    suffix = kind.split()[-1]
    names = [f"a.{suffix}", f"l.{suffix}"]
    if suffix == "npy":
        np.save(tmp_path / names[0], cube)
        np.save(tmp_path / names[1], labels)
    elif suffix == "npz":
        np.savez_compressed(tmp_path / names[0], amplitude=cube, labels=labels)
        names[1] = names[0]
    elif suffix == "zarr":
        for name, array in zip(names, (cube, labels), strict=True):
            zarr.save_array(str(tmp_path / name), array)
    else:
        order = "crossline" if "crossline" in kind else "inline"
        write_segy(tmp_path / names[0], cube, order=order)
        write_segy(tmp_path / names[1], labels, order=order)
    found = data.read(one(tmp_path, *names)).examples(CONFIG)
    expected = made.examples(CONFIG)
    expected = expected.take(expected.columns["volume"] == block.name)
    np.testing.assert_allclose(found.inputs["amplitude"], expected.inputs["amplitude"], rtol=1e-6)
    np.testing.assert_array_equal(found.targets, expected.targets)


def test_line_numbers_in_other_header_bytes(made: Volumes, tmp_path: Path) -> None:
    write_segy(tmp_path / "a.sgy", np.asarray(made.blocks[0].amplitude.data))
    with segyio.open(str(tmp_path / "a.sgy"), "r+", ignore_geometry=True) as file:
        for trace in range(file.tracecount):
            header = file.header[trace]
            file.header[trace] = {9: header[189], 21: header[193], 189: 0, 193: 0}
    refused(one(tmp_path, "a.sgy"), "a.sgy", "traces 0 and 1", "inline_byte")
    found = data.read(one(tmp_path, "a.sgy", inline_byte="9", crossline_byte="21"))
    assert found.blocks[0].amplitude.shape == made.blocks[0].amplitude.shape


def test_a_truncated_segy_names_the_trace_it_ends_in(made: Volumes, tmp_path: Path) -> None:
    write_segy(tmp_path / "a.sgy", np.asarray(made.blocks[0].amplitude.data))
    whole = (tmp_path / "a.sgy").read_bytes()
    trace = 240 + 28 * 4
    (tmp_path / "a.sgy").write_bytes(whole[: 3600 + 37 * trace + 90])
    refused(one(tmp_path, "a.sgy"), "a.sgy", "trace 37 has 90 of")
    (tmp_path / "a.sgy").write_bytes(whole[:1000])
    refused(one(tmp_path, "a.sgy"), "a.sgy", "1000 bytes")
    (tmp_path / "a.sgy").write_bytes(whole[: 3600 + 37 * trace])
    refused(one(tmp_path, "a.sgy"), "a.sgy", "37 traces do not fill", "inline 102, crossline 317 is missing")


def test_inconsistent_segy_geometry_is_refused(made: Volumes, tmp_path: Path) -> None:
    cube = np.asarray(made.blocks[0].amplitude.data)
    for field, value, expected in (
        (segyio.TraceField.CROSSLINE_3D, 301, "traces 1 and 5"),
        (segyio.TraceField.TRACE_SAMPLE_COUNT, 27, "trace 5 has 27 samples, the file 28"),
        (segyio.TraceField.TRACE_SAMPLE_INTERVAL, 2000, "trace 5 has 2000 µs, the file 4000"),
    ):
        write_segy(tmp_path / "a.sgy", cube)
        edit_header(tmp_path / "a.sgy", 5, field, value)
        refused(one(tmp_path, "a.sgy"), "a.sgy", expected)
    write_segy(tmp_path / "a.sgy", cube)
    for trace in range(20, 40):
        edit_header(tmp_path / "a.sgy", trace, segyio.TraceField.INLINE_3D, 103)
    refused(one(tmp_path, "a.sgy"), "inlines go on in steps of 3, but from 103 to 104")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_voxel_that_is_not_finite_is_named(bad: float, made: Volumes, tmp_path: Path) -> None:
    cube = np.array(made.blocks[0].amplitude.data)
    cube[3, 7, 11] = bad
    np.save(tmp_path / "a.npy", cube)
    refused(one(tmp_path, "a.npy"), "a.npy", "[3, 7, 11]", "not finite")
    for order, trace in (("inline", 3 * 20 + 7), ("crossline", 7 * 24 + 3)):
        write_segy(tmp_path / "a.sgy", cube, order=order)
        refused(one(tmp_path, "a.sgy"), "a.sgy", "[3, 7, 11]", f"trace {trace}, is not finite")


def test_faults_of_files_and_table_are_named(made: Volumes, tmp_path: Path) -> None:
    cube = np.asarray(made.blocks[0].amplitude.data)
    np.save(tmp_path / "a.npy", cube)
    np.save(tmp_path / "flat.npy", cube[0])
    np.save(tmp_path / "zero.npy", np.zeros((16, 16, 16), np.float32))
    np.save(tmp_path / "small.npy", cube[:12])
    np.save(tmp_path / "l.npy", np.full(cube.shape, 9, np.uint8))
    np.savez(tmp_path / "two.npz", x=cube, y=cube)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:500])
    (tmp_path / "text.sgy").write_bytes(b"no seismic" * 800)
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "a.txt").write_text("1 2 3")
    for name, expected in (
        ("none.npy", "no such file"),
        ("flat.npy", "float32[20, 28]"),
        ("zero.npy", "every amplitude is zero"),
        ("small.npy", "smaller than data.crop = 16"),
        ("two.npz", "'amplitude' is missing"),
        ("objects.npy", "not a readable npy"),
        ("cut.npy", "not a readable npy"),
        ("text.sgy", "samples a trace in format"),
        ("empty.zarr", "not a readable zarr"),
        ("a.txt", "not a known kind of volume"),
        ("../a.npy", "not a file inside"),
    ):
        refused(one(tmp_path, name), name.rpartition("/")[2], expected)
    refused(one(tmp_path, "a.npy", "l.npy"), "l.npy", "voxel [0, 0, 0] has the label 9")
    refused(one(tmp_path, "a.npy", "small.npy"), "labels are [12, 20, 28]")
    refused(one(tmp_path, "a.npy", inline_byte="x"), "line 2", "inline_byte 'x'")
    row = {"volume": "v", "client": "c", "amplitude": "a.npy"}
    refused(table(tmp_path, row, row), "line 3", "listed twice")
    refused(table(tmp_path, {**row, "client": "a/b"}), "line 2", "'a/b' is not usable")


def test_labels_that_are_no_numbers_of_classes_are_not_copied(made: Volumes, tmp_path: Path) -> None:
    cube = np.asarray(made.blocks[0].amplitude.data)
    np.save(tmp_path / "a.npy", cube)
    labels = np.zeros(cube.shape)
    labels[1, 2, 3] = -1
    np.save(tmp_path / "l.npy", labels)
    with pytest.raises(DataError, match=r"l\.npy: voxel \[1, 2, 3\] has the label -1"):
        data.read(one(tmp_path, "a.npy", "l.npy")).write(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_volume_without_labels_is_scored_but_never_learned_from(made: Volumes, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asarray(made.blocks[0].amplitude.data))
    found = data.read(one(tmp_path, "a.npy")).examples(CONFIG)
    assert (found.targets == UNLABELLED).all()
    assert not found.columns["trainable"].any()
    logits = np.zeros((len(found), 6, 16, 16, 16), np.float32)
    assert metrics.metrics(CONFIG, {"logits": logits}, found) == {}


def test_arrays_of_a_zarr_group(made: Volumes, tmp_path: Path) -> None:
    group = zarr.open_group(str(tmp_path / "v.zarr"), mode="w")
    cube = np.asarray(made.blocks[0].amplitude.data)
    group.create_array("amplitude", data=cube, chunks=(8, 8, 8))
    group.create_array("labels", data=made.blocks[0].labels)
    found = data.read(one(tmp_path, "v.zarr", "v.zarr"))
    np.testing.assert_array_equal(found.blocks[0].amplitude.data[3:9, :, 5], cube[3:9, :, 5])
    group.create_array("other", data=cube)
    del group["amplitude"]
    refused(one(tmp_path, "v.zarr"), "v.zarr", "'amplitude' is missing", "labels, other")


def test_streamed_examples_are_the_ones_in_memory(made: Volumes, tmp_path: Path) -> None:
    made.write(tmp_path / "d")
    small = data.read(tmp_path / "d")
    streamed = small.examples(configured("data.in_memory_mb=0"))
    whole = small.examples(CONFIG)
    assert isinstance(streamed.inputs["amplitude"], Windows)
    assert isinstance(streamed.targets, Windows)
    assert isinstance(whole.inputs["amplitude"], np.ndarray)
    same_examples(streamed, whole)
    part = streamed.take(np.array([5, 2])).take(streamed.take(np.array([5, 2])).columns["inline"] >= 0)
    assert isinstance(part.inputs["amplitude"], Windows)
    same_examples(part, whole.take(np.array([5, 2])))
    joined: Any = np.concatenate([streamed.inputs["amplitude"][:3], streamed.inputs["amplitude"][6:8]])
    assert isinstance(joined, Windows)
    np.testing.assert_array_equal(joined, whole.inputs["amplitude"][[0, 1, 2, 6, 7]])
    other = data.read(tmp_path / "d").select(["survey-001"]).examples(configured("data.in_memory_mb=0"))
    both: Any = np.concatenate([streamed.inputs["amplitude"], other.inputs["amplitude"]])
    assert isinstance(both, Windows)
    np.testing.assert_array_equal(
        both, np.concatenate([whole.inputs["amplitude"], np.asarray(other.inputs["amplitude"])])
    )


def test_streaming_reads_only_what_is_used() -> None:
    class Counting:
        shape = (64, 64, 64)
        read = 0

        def __getitem__(self, index: tuple[slice, ...]) -> Array:
            found = np.ones([s.stop - s.start for s in index], np.float32)
            Counting.read += found.size
            return found

    corners = np.array([[0, i, 0, 0] for i in range(50)], np.int64)
    windows = Windows([Counting()], corners, (8, 8, 8), np.float32, leading=1)
    chosen = windows[np.arange(0, 50, 7)][1:3]
    assert (len(windows), windows.shape, windows.nbytes, Counting.read) == (50, (50, 1, 8, 8, 8), 50 * 2048, 0)
    assert np.asarray(chosen).shape == (2, 1, 8, 8, 8)
    assert Counting.read == 2 * 512
    with pytest.raises(TypeError):
        windows[0, 1]


def test_streamed_and_in_memory_training_give_the_same_model(made: Volumes, tmp_path: Path) -> None:
    from hpc_trainer.commands import concatenate
    from hpc_trainer.processes import join
    from hpc_trainer.trainer import Trainer, TrainingData

    made.write(tmp_path / "d")
    losses = []
    for memory in (0, 100):
        config = configured(f"data.in_memory_mb={memory}", "model.width=4", "pretrain.epochs=1")
        examples = data.read(tmp_path / "d").examples(config)
        train = concatenate([examples.take(slice(0, 6)), examples.take(slice(6, 9))])
        sets = TrainingData(train=train, validation=examples.take(slice(9, 12)), clients=("survey-000",))
        trainer = Trainer(APPLICATION, config, sets, processes=join(), out=tmp_path / str(memory), seed=0)
        trainer.run()
        losses.append(trainer.losses)
    assert losses[0] == losses[1]
