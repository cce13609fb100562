"""onnxruntime sessions, parity, golden self-test and timing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from fl_core.contracts.bundle import GOLDEN_NAME, Bundle, open_bundle
from fl_core.contracts.errors import DataError, GoalMissed, InputError, IntegrityError
from fl_core.contracts.manifests import MANIFEST_NAME
from fl_core.learning.application import application
from fl_core.runtime import machine
from fl_core.runtime.golden import golden_check, read_golden
from fl_core.runtime.parity import compare
from fl_core.runtime.session import Session, choose_target, open_session, predict
from fl_core.runtime.timing import measure, measure_side_by_side
from fl_core.storage import atomic
from tests.bundles import TARGET, TOY, damage, linear_model, toy_bundle
from tests.helpers import refusal


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(toy_bundle(tmp_path_factory.mktemp("bundle") / "toy", targets=("arm64", TARGET)))


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> Session:
    return Session(bundle.model_file(TARGET))


def features(count: int, width: int = 8) -> dict[str, np.ndarray]:
    return {"features": np.random.default_rng(1).normal(size=(count, width)).astype(np.float32)}


@pytest.mark.parametrize("count", [0, 1, 7, 64, 65])
@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_batches_do_not_change_the_outputs(session: Session, count: int, batch_size: int) -> None:
    whole = session.run(features(count), batch_size=10_000)["value"]
    parts = session.run(features(count), batch_size=batch_size)["value"]
    assert parts.shape == (count,)
    assert parts.dtype == np.float32
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "input 'features' is missing"),
        ({**features(2), "more": np.zeros(2)}, "input 'more' is unknown"),
        ({"features": features(2)["features"].astype(np.float64)}, "is float64[2, 8]"),
        (features(2, 7), "is float32[2, 7]"),
        ({"features": np.zeros(8, np.float32)}, "is float32[8]"),
    ],
)
def test_wrong_inputs_are_named(session: Session, inputs: dict[str, np.ndarray], said: str) -> None:
    message = refusal(InputError, lambda: session.run(inputs))
    assert message is not None
    assert said in message


def test_a_batch_size_below_one_is_refused(session: Session) -> None:
    with pytest.raises(InputError, match="batch_size"):
        session.run(features(2), batch_size=0)


def test_inputs_over_the_limit_are_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_core.runtime.session.MAX_INPUT_BYTES", 100)
    with pytest.raises(InputError, match="over the limit"):
        session.run(features(4))


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model at all")
    with pytest.raises(IntegrityError, match=r"m\.onnx: onnxruntime cannot load it"):
        Session(tmp_path / "m.onnx")
    with pytest.raises(IntegrityError, match="no such file"):
        Session(tmp_path / "absent.onnx")


def test_parity_by_hand() -> None:
    reference = {"y": np.array([[3.0, 1.0], [0.0, 4.0]]), "z": np.array([1.0, -1.0])}
    candidate = {"y": np.array([[3.0, 1.0], [5.0, 4.0]]), "z": np.array([1.0, -1.0])}
    report = compare(reference, candidate)
    assert (report.max_abs, report.agreement, report.num_examples) == (5.0, 0.5, 2)
    assert report.relative_max == pytest.approx(5 / 4)
    assert report.relative_l2 == pytest.approx(5 / np.sqrt(9 + 1 + 16))
    same = compare(reference, reference)
    assert (same.max_abs, same.relative_l2, same.agreement) == (0.0, 0.0, 1.0)


def test_parity_refuses_what_cannot_be_compared() -> None:
    y = np.zeros(2)
    with pytest.raises(InputError, match="output 'y' is missing"):
        compare({"y": y}, {"z": y})
    with pytest.raises(InputError, match="the reference is"):
        compare({"y": y}, {"y": np.zeros(3)})
    with pytest.raises(InputError, match="not finite in the same places"):
        compare({"y": y}, {"y": np.array([0.0, np.nan])})


def test_golden_samples_pass_on_the_model_that_made_them(bundle: Bundle) -> None:
    for target in bundle.manifest.targets:
        assert golden_check(bundle, target).relative_max < 1e-6
    assert set(read_golden(bundle.folder / GOLDEN_NAME).outputs) == {"fp32", "arm64", TARGET}


def test_another_model_fails_the_self_test(tmp_path: Path) -> None:
    folder = toy_bundle(tmp_path / "b")
    linear_model(folder / f"model.{TARGET}.onnx", np.ones(8))
    bundle = Bundle(folder, reread(folder))
    with pytest.raises(GoalMissed, match="self-test"):
        golden_check(bundle, TARGET)


def test_a_manifest_cannot_loosen_the_self_test(tmp_path: Path) -> None:
    folder = toy_bundle(tmp_path / "b")
    linear_model(folder / f"model.{TARGET}.onnx", np.ones(8))
    manifest = reread(folder)
    facts = {**manifest.targets[TARGET], "golden_tolerance": 1e9}
    with pytest.raises(GoalMissed):
        golden_check(Bundle(folder, dataclasses.replace(manifest, targets={TARGET: facts})), TARGET)


def test_golden_samples_that_do_not_fit_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = toy_bundle(tmp_path / "b")
    np.savez(folder / GOLDEN_NAME, **{"input/features": np.zeros((2, 3), np.float32), f"{TARGET}/value": np.zeros(2)})
    with pytest.raises(IntegrityError, match="do not fit"):
        golden_check(Bundle(folder, reread(folder)), TARGET)
    np.savez(folder / GOLDEN_NAME, plain=np.zeros(2))
    with pytest.raises(IntegrityError, match="OWNER/NAME"):
        golden_check(Bundle(folder, reread(folder)), TARGET)
    (folder / GOLDEN_NAME).write_bytes(b"PK truncated")
    with pytest.raises(DataError, match="not a readable npz"):
        golden_check(Bundle(folder, reread(folder)), TARGET)


@pytest.mark.parametrize("name", [f"model.{TARGET}.onnx", GOLDEN_NAME, MANIFEST_NAME])
def test_a_flipped_byte_in_a_bundle_is_refused(tmp_path: Path, name: str) -> None:
    folder = toy_bundle(tmp_path / "b")
    if name == MANIFEST_NAME:  # a digit of a hash, so that it stays JSON
        table = json.loads((folder / name).read_text())
        digest = table["files"][GOLDEN_NAME]["sha256"]
        table["files"][GOLDEN_NAME]["sha256"] = ("0" if digest[0] != "0" else "1") + digest[1:]
        atomic.write_json(folder / name, table)
    else:
        damage(folder / name)
    with pytest.raises(IntegrityError, match="fetch it again"):
        open_bundle(folder)


def test_predict_is_the_session_on_the_bundle(bundle: Bundle) -> None:
    app = application(TOY)
    config = app.configure()
    examples = app.generate(config, 3).examples(config)
    outputs = predict(app, config, bundle, examples, target="arm64")
    np.testing.assert_allclose(
        outputs["value"], open_session(bundle, TARGET).run(dict(examples.inputs))["value"], rtol=1e-6
    )
    other = app.configure(["data.features=3"])
    with pytest.raises(InputError, match="features"):
        predict(app, other, bundle, examples)


def test_the_machine_chooses_its_target(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    assert choose_target(bundle) == "x86"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert choose_target(bundle) == "arm64"
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert machine.local_target() == "riscv64"
    assert choose_target(bundle) == "arm64"  # the first
    with pytest.raises(InputError, match="holds: arm64, x86"):
        choose_target(bundle, "riscv64")


def test_timing_is_ordered_and_bounded(session: Session) -> None:
    timing = measure(session, features(1), seconds=30, queries=20)
    assert timing.queries == 20
    assert 0 < timing.p50_ms <= timing.p90_ms <= timing.p99_ms <= timing.max_ms
    assert timing.load_ms > 0
    assert measure(session, features(1), seconds=0, queries=1000).queries == 5


def test_a_costlier_model_is_told_apart(tmp_path: Path) -> None:
    sessions = []
    for width in (8, 200_000):
        linear_model(tmp_path / f"{width}.onnx", np.ones(width))
        sessions.append(Session(tmp_path / f"{width}.onnx"))
    small, large = (measure_side_by_side([s], features(4, s.inputs[0].shape[1]), rounds=3)[0] for s in sessions)
    assert 0 < small < large
    twice = measure_side_by_side([sessions[0], sessions[0]], features(1), rounds=2)
    assert len(twice) == 2


def test_memory_is_read_and_trimming_is_harmless() -> None:
    machine.return_memory_early()
    assert machine.resident_bytes() > 1 << 20
    assert isinstance(machine.cpu_flags(), tuple)


SMAPS = """\
7f00-8f00 r-xp 00000000 00:01 7 /usr/lib/libone.so.1
Rss:                  12 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
9f00-af00 r--p 00000000 00:01 7 /usr/lib/libone.so.1
Rss:                   8 kB
Private_Dirty:         8 kB
Anonymous:             8 kB
bf00-cf00 rw-p 00000000 00:01 7 /usr/lib/libone.so.1
Rss:                   4 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
df00-ef00 r--p 00000000 00:00 0 [vvar]
Rss:                   4 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
"""


def test_only_unchanged_library_pages_are_given_up(tmp_path: Path) -> None:
    assert machine._clean_library_mappings(SMAPS) == [(0x7F00, 0x8F00, 12 * 1024)]
    missing = tmp_path / "smaps"
    assert machine.release_library_pages(missing) == 0


def test_libraries_still_work_after_their_pages_were_given_up(tmp_path: Path) -> None:
    linear_model(tmp_path / "m.onnx", np.ones(8))
    session = Session(tmp_path / "m.onnx")
    before = session.run(features(4))
    assert machine.release_library_pages() > 1 << 20
    for name, value in session.run(features(4)).items():
        np.testing.assert_array_equal(value, before[name])


def reread(folder: Path):  # type: ignore[no-untyped-def]
    from fl_core.contracts.manifests import BundleManifest, read_manifest

    return read_manifest(BundleManifest, folder)
