"""Manifests and checkpoints: versioned, verified, and whole or absent whatever happens during a save."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts import arrays as array_format
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.contracts.manifests import BundleManifest, CheckpointManifest, from_json, read_manifest, to_json
from fl_core.storage import atomic
from tests.helpers import eventually, refusal

MANIFEST = CheckpointManifest(application="toy_regression", config={"model": {"hidden": 0}}, stage="pretrain", step=3)
ARRAYS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7, np.int64)}
BUNDLE = BundleManifest(
    application="a", config={}, version=1, parent_sha256="", inputs=[], outputs=[], targets={}, files={}
)


@pytest.mark.parametrize("manifest", [MANIFEST, BUNDLE])
def test_unknown_fields_travel_on(manifest: Any) -> None:
    table = {**to_json(manifest), "from_the_future": {"a": [1]}}
    found = from_json(type(manifest), json.loads(json.dumps(table)), origin="m")
    assert found.unknown == {"from_the_future": {"a": [1]}}
    assert to_json(found) == table
    assert dataclasses.replace(found, unknown={}) == manifest


def test_unknown_fields_survive_load_and_save(tmp_path: Path) -> None:
    Checkpoint(dataclasses.replace(MANIFEST, unknown={"future": 1}), ARRAYS, {"s.bin": b"abc"}).save(tmp_path / "a")
    found = checkpoints.load(tmp_path / "a", with_state=True)
    assert found.state == {"s.bin": b"abc"}
    Checkpoint(found.manifest, found.arrays).save(tmp_path / "b")  # without the state
    again = checkpoints.load(tmp_path / "b", with_state=True)
    assert again.manifest.unknown["future"] == 1
    assert again.state == {}


@pytest.mark.parametrize("version", [2, 10**6, "1", None, 1.0])
def test_newer_format_versions_are_refused(version: Any) -> None:
    with pytest.raises(IntegrityError, match=r"manifest\.json: format version.*\n.*upgrade"):
        from_json(CheckpointManifest, {**to_json(MANIFEST), "format_version": version}, origin="manifest.json")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("step", "3", "int"), ("step", True, "int"), ("application", 1, "str"), ("config", [], "dict"), ("lineage", {}, "list")],
)  # fmt: skip
def test_wrong_types_are_named(name: str, value: Any, kind: str) -> None:
    with pytest.raises(IntegrityError, match=f"'{name}' must be of type {kind}"):
        from_json(CheckpointManifest, {**to_json(MANIFEST), name: value}, origin="m")


def test_missing_fields_and_what_is_no_manifest(tmp_path: Path) -> None:
    table = to_json(MANIFEST)
    del table["application"]
    with pytest.raises(IntegrityError, match="'application' is missing"):
        from_json(CheckpointManifest, table, origin="m")
    with pytest.raises(IntegrityError, match="no such file"):
        read_manifest(CheckpointManifest, tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(IntegrityError, match="file"):
        read_manifest(CheckpointManifest, tmp_path / "file")
    for content in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(IntegrityError, match=r"manifest\.json"):
            read_manifest(CheckpointManifest, tmp_path)


def test_round_trip_and_latest(tmp_path: Path) -> None:
    saved = Checkpoint(MANIFEST, ARRAYS, {"opt.safetensors": b"123"}).save(tmp_path / "epoch-1")
    atomic.point_to(tmp_path / "latest", "epoch-1")
    for path in (tmp_path, tmp_path / "latest", tmp_path / "epoch-1"):
        found = checkpoints.load(path, with_state=True)
        assert found.manifest.model_sha256 == saved.model_sha256
        assert found.state == {"opt.safetensors": b"123"}
        assert array_format.fingerprint(found.arrays) == array_format.fingerprint(ARRAYS)
        assert found.arrays["n"].shape == ()
    parent, lineage = checkpoints.child_lineage(found)
    assert parent == saved.model_sha256
    assert [e["stage"] for e in lineage] == ["pretrain"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-1", "latest"]


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_model_is_found(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("flip") / "c"
    Checkpoint(MANIFEST, ARRAYS, {"s": b"state"}).save(folder)
    for name in ("model.safetensors", "state/s"):
        data = bytearray((folder / name).read_bytes())
        data[position % len(data)] ^= 1 << bit
        (folder / name).write_bytes(data)
        with pytest.raises(IntegrityError, match=r"sha256"):
            checkpoints.load(folder, with_state=True)
        data[position % len(data)] ^= 1 << bit
        (folder / name).write_bytes(data)


@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_changed_manifest_is_read_or_refused_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    folder = tmp_path_factory.mktemp("flip") / "c"
    Checkpoint(MANIFEST, ARRAYS, {"s": b"state"}).save(folder)
    data = bytearray((folder / "manifest.json").read_bytes())
    data[position % len(data)] = byte
    (folder / "manifest.json").write_bytes(data)
    message = refusal(IntegrityError, lambda: checkpoints.load(folder, with_state=True))
    assert message is None or str(folder) in message


@pytest.mark.parametrize("table", [[], "x", 7, {"s": 3}, {"../manifest.json": ""}])
def test_hostile_state_tables_are_refused(tmp_path: Path, table: Any) -> None:
    Checkpoint(MANIFEST, ARRAYS, {"s": b"state"}).save(tmp_path / "c")
    file = tmp_path / "c" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "state_sha256": table}))
    with pytest.raises(IntegrityError):
        checkpoints.load(tmp_path / "c", with_state=True)


def test_truncated_missing_and_absent(tmp_path: Path) -> None:
    Checkpoint(MANIFEST, ARRAYS).save(tmp_path / "c")
    model = tmp_path / "c" / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError, match=r"model\.safetensors.*sha256"):
        checkpoints.load(tmp_path / "c")
    model.unlink()
    with pytest.raises(IntegrityError, match=r"model\.safetensors: no such file"):
        checkpoints.load(tmp_path / "c")
    with pytest.raises(InputError, match="not a checkpoint"):
        checkpoints.load(tmp_path / "nowhere")
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"manifest\.json"):
        checkpoints.load(tmp_path / "c")


@given(st.binary(max_size=200))
def test_any_bytes_are_arrays_or_an_integrity_error(data: bytes) -> None:
    whole = array_format.to_bytes(ARRAYS)
    for candidate in (data, whole[: len(data)], whole[:8] + data):
        message = refusal(IntegrityError, lambda data=candidate: array_format.from_bytes(data, origin="model"))
        assert message is None or message.startswith("model:")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w": np.zeros((3, 2), np.float32)}, r"'w'.*\(3, 2\).*\(2, 3\)"),
        ({"w": np.zeros((2, 3))}, r"'w'.*float64.*float32"),
        ({"w": np.full((2, 3), np.nan, np.float32)}, "'w'.*not finite"),
        ({"w": np.full((2, 3), -np.inf, np.float32)}, "'w'.*not finite"),
        ({"extra": np.zeros(1)}, "'extra' is unexpected"),
        ({"n": None}, "'n' is missing"),
    ],
)
def test_check_like(change: dict[str, Any], words: str) -> None:
    arrays = {k: v for k, v in {**ARRAYS, **change}.items() if v is not None}
    with pytest.raises(IntegrityError, match=words):
        array_format.check_like(arrays, ARRAYS, origin="device")


def test_fingerprint_tells_names_shapes_types_and_values_apart() -> None:
    a = np.zeros((2, 3), np.float32)
    different = [
        {"a": a}, {"b": a}, {"a": a.reshape(3, 2)}, {"a": a.view(np.int32)}, {"a": a + 1}, {"a": a, "b": a},
        {"a": np.zeros((), np.float32)}, {"a": np.zeros(1, np.float32)},
    ]  # fmt: skip
    assert len({array_format.fingerprint(d) for d in different}) == len(different)
    assert array_format.fingerprint({"a": a, "b": a}) == array_format.fingerprint({"b": a, "a": np.asfortranarray(a)})


SAVER = """
    import sys, itertools, numpy as np
    from pathlib import Path
    from fl_core.contracts.checkpoint import Checkpoint
    from fl_core.contracts.manifests import CheckpointManifest
    from fl_core.storage import atomic
    out = Path(sys.argv[1])
    for n in itertools.count():
        manifest = CheckpointManifest(application="a", config={}, stage="pretrain", step=n)
        Checkpoint(manifest, {"w": np.full(20_000, n, np.float32)}, {"s": b"x" * 1000}).save(out / "same")
        Checkpoint(manifest, {"w": np.full(20_000, n, np.float32)}).save(out / f"round-{n:05d}")
        atomic.point_to(out / "latest", f"round-{n:05d}")
        print(n, flush=True)
"""


def test_kill_at_any_moment_leaves_a_readable_checkpoint(tmp_path: Path) -> None:
    """Both ways of saving: a new folder with ``latest`` moved to it, and over the former checkpoint."""
    rng = np.random.default_rng(0)
    for attempt in range(8):
        out = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVER), str(out)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline()  # one save is complete
        with pytest.raises(subprocess.TimeoutExpired):  # it goes on saving; killed anywhere within the next ones
            process.wait(timeout=float(rng.uniform(0, 0.05)))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        for path in (out, out / "same"):
            found = checkpoints.load(path, with_state=True)
            assert (found.arrays["w"] == found.manifest.step).all()


DIES_IN_RENAME = """
    import os, sys, numpy as np
    from pathlib import Path
    from fl_core.contracts.checkpoint import Checkpoint
    from fl_core.contracts.manifests import CheckpointManifest
    from fl_core.storage import atomic
    folder = Path(sys.argv[1]) / "c"
    def save(step):
        manifest = CheckpointManifest(application="a", config={}, stage="pretrain", step=step)
        Checkpoint(manifest, {"w": np.full(4, step, np.float32)}).save(folder)
    save(1)
    real, calls = os.replace, [0]
    def replace(a, b):
        if Path(b).parent == folder.parent and Path(a).parent == folder.parent:
            calls[0] += 1
            if calls[0] > int(sys.argv[2]):
                os._exit(9)
        real(a, b)
    os.replace = replace
    save(2)
    os._exit(9)
"""


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_crash_between_two_renames_leaves_the_old_or_the_new(tmp_path: Path, calls: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DIES_IN_RENAME), str(tmp_path), str(calls)], check=False
    )
    assert done.returncode == 9
    found = checkpoints.load(tmp_path / "c")
    assert found.manifest.step in (1, 2)
    assert (found.arrays["w"] == found.manifest.step).all()


def test_eventually_reports_what_did_not_come_true() -> None:
    with pytest.raises(AssertionError, match="not true within"):
        eventually(lambda: os.getpid() < 0, timeout=0.05)


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_pieces_join_to_a_safetensors_file(size: int) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        **{f"{d}/ü": rng.integers(0, 2, (3, 2)).astype(d) for d in array_format.SAFETENSORS_NAMES},
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.float32),
        "turned": np.arange(6.0).reshape(2, 3).T,
    }
    found = [bytes(piece) for piece in array_format.pieces(arrays, size)]
    assert max(map(len, found[1:])) <= size
    again = array_format.from_bytes(b"".join(found), origin="test")
    assert again.keys() == arrays.keys()
    for name, array in arrays.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)
