"""Atomic files, logs and bounded reading: nothing half-done, nothing trusted."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts.errors import DataError
from fl_core.storage import atomic, database
from fl_core.storage.archive import read_npz
from fl_core.storage.log import AppendLog, read_log
from fl_core.storage.tables import read_csv
from tests.helpers import refusal


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_new_folder_is_all_or_nothing(tmp_path: Path) -> None:
    def fails() -> None:
        with atomic.new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("done")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert names(tmp_path) == []
    with atomic.new_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("1")
    with pytest.raises(KeyboardInterrupt):
        fails()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "sub" / "file").read_text() == "1"


@pytest.mark.parametrize("supported", [True, False])
def test_an_existing_folder_is_replaced_as_a_whole(
    tmp_path: Path, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not supported:
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    for content in "ab":
        with atomic.new_folder(tmp_path / "out") as folder:
            (folder / content).write_text(content)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["b"]


def test_write_bytes_replaces_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    atomic.write_bytes(path, b"one", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(TypeError):
        atomic.write_bytes(path, "text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(path, {"a": float("nan")})
    assert path.read_bytes() == b"one"
    assert names(path.parent) == ["file"]
    assert atomic.sha256_file(path) == atomic.sha256_bytes(b"one")


def test_point_to_moves_a_link(tmp_path: Path) -> None:
    for target in ("a", "b"):
        atomic.point_to(tmp_path / "latest", target)
        assert (tmp_path / "latest").readlink() == Path(target)
    assert names(tmp_path) == ["latest"]


@given(kept=st.integers(0, 200), entries=st.lists(st.dictionaries(st.text(max_size=3), st.integers()), max_size=5))
def test_a_torn_log_loses_its_last_line_only(
    tmp_path_factory: pytest.TempPathFactory, kept: int, entries: list[dict[str, int]]
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    log = AppendLog(path, durable=False)
    for entry in entries:
        log.append(entry)
    log.close()
    data = path.read_bytes()[:kept]
    path.write_bytes(data)
    whole = data.count(b"\n")
    resumed = AppendLog(path)
    resumed.append({"after": 1})
    resumed.close()
    found = list(read_log(path))
    assert found[-1] == {"after": 1}
    assert found[:whole] == entries[:whole]
    assert len(found) <= whole + 2  # a line cut exactly before its newline is whole all the same


def test_log_skips_what_is_no_object_and_refuses_nan(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b'1\n\xff\n[]\n\n{"a": 1}\nnull\n')
    assert list(read_log(tmp_path / "log")) == [{"a": 1}]
    assert list(read_log(tmp_path / "absent")) == []
    log = AppendLog(tmp_path / "new")
    with pytest.raises(ValueError, match="JSON"):
        log.append({"a": float("nan")})
    log.append({"b": 2})
    log.close()
    assert list(read_log(tmp_path / "new")) == [{"b": 2}]


def npz(path: Path, *, compressed: bool = False) -> Path:
    save = np.savez_compressed if compressed else np.savez
    save(path, series=np.arange(200, dtype=np.float32).reshape(20, 10), ids=np.arange(20))
    return path


def refused_npz(path: Path, **options: int) -> str:
    with pytest.raises(DataError) as error:
        read_npz(path, **options)  # type: ignore[arg-type]
    assert str(path) in error.value.message
    return str(error.value)


def test_npz_round_trip_and_missing_array(tmp_path: Path) -> None:
    found = read_npz(npz(tmp_path / "a.npz"), required=("series",))
    assert found["series"].shape == (20, 10)
    with pytest.raises(DataError, match=r"a\.npz: array 'labels' is missing\n.*series, ids"):
        read_npz(tmp_path / "a.npz", required=("series", "labels"))
    assert "no such file" in refused_npz(tmp_path / "absent.npz")
    assert "no such file" in refused_npz(tmp_path)


def test_npz_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", zeros=np.zeros(10_000_000, np.uint8))
    assert (tmp_path / "bomb.npz").stat().st_size < 20_000
    assert "over the limit of 1,000,000" in refused_npz(tmp_path / "bomb.npz", limit=1_000_000)


def test_npz_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", evil=np.array([{"a": 1}], dtype=object))
    assert "not a readable npz" in refused_npz(tmp_path / "p.npz")


def test_npz_that_claims_an_absurd_shape_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**14,)})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("a.npy", header.getvalue() + b"\0" * 64)
    assert "not a readable npz" in refused_npz(tmp_path / "huge.npz")
    with zipfile.ZipFile(tmp_path / "torn.npz", "w") as archive:
        archive.writestr("b.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 20) + b"{'descr': '<f8', (((")
    assert "not a readable npz" in refused_npz(tmp_path / "torn.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_npz(tmp_path: Path, compressed: bool) -> None:
    path = npz(tmp_path / "a.npz", compressed=compressed)
    data = path.read_bytes()
    for keep in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        assert "copy it again" in refused_npz(path)


@pytest.mark.parametrize("compressed", [False, True])
@given(position=st.integers(0, 10**6), flip=st.integers(1, 255), encrypt=st.booleans())
def test_damaged_npz_is_read_or_refused_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, compressed: bool, position: int, flip: int, encrypt: bool
) -> None:
    path = npz(tmp_path_factory.mktemp("npz") / "a.npz", compressed=compressed)
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= flip
    if encrypt:  # the flag of the first member in the central directory
        at = data.find(b"PK\x01\x02")
        if at >= 0:
            data[at + 8 : at + 10] = struct.pack("<H", 1)
    path.write_bytes(data)
    refusal(DataError, lambda: read_npz(path))


def test_csv_errors_name_file_column_and_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"

    def refused(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            read_csv(path, required=("client", "x"), limit_rows=3)
        assert "t.csv" in error.value.message
        return str(error.value)

    path.write_text("client,x\nä,1\n", encoding="utf-8-sig")
    assert read_csv(path, required=("client", "x")) == [{"client": "ä", "x": "1"}]
    assert "column 'x' is missing\n  remedy: columns found: client, y" in refused(b"client,y\na,1\n")
    assert "columns found: none" in refused(b"")
    assert "line 3 does not have 2 fields" in refused(b"client,x\na,1\nb\n")
    assert "line 2 does not have 2 fields" in refused(b"client,x\na,1,2\n")
    assert "holds no rows" in refused(b"client,x\n")
    assert "more than 3 rows" in refused(b"client,x\n" + b"a,1\n" * 4)
    assert "not readable" in refused(b"client,x\n\xff,1\n")
    assert "not readable" in refused(b'client,x\n"a,1\n')
    with pytest.raises(DataError, match="no such file"):
        read_csv(tmp_path / "absent.csv", required=())
    with pytest.raises(DataError, match="not readable"):
        read_csv(tmp_path, required=())


def test_database_is_durable_and_shared(tmp_path: Path) -> None:
    schema = "CREATE TABLE IF NOT EXISTS t (k TEXT PRIMARY KEY, v TEXT)"
    one, two = (database.connect(tmp_path / "deep" / "a.db", schema) for _ in range(2))
    assert one.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert one.execute("PRAGMA synchronous").fetchone()[0] == 2
    one.execute("INSERT INTO t VALUES ('a', ?)", (json.dumps([1]),))
    assert two.execute("SELECT v FROM t").fetchone()["v"] == "[1]"
    one.close()
    two.close()
