"""The model in use: loaded, replaced, rolled back; small in memory."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from fl_clients.edge.inference import InferenceEngine
from fl_clients.edge.slots import Slots
from fl_core.contracts.errors import EnvironmentFault, InputError, IntegrityError
from fl_core.learning.application import application
from tests.bundles import TARGET, TOY, damage, linear_model, toy_bundle
from tests.helpers import run_python


def install(home: Path, version: int, *, seed: int | None = None) -> None:
    folder = toy_bundle(home / "staging", seed=version if seed is None else seed)
    table = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**table, "version": version}))
    Slots(home).install(folder, version, TARGET)


def rows(clients: int = 3):  # type: ignore[no-untyped-def]
    app = application(TOY)
    return app.generate(app.configure([f"data.clients={clients}"]), 5)


def test_before_the_first_update_there_is_no_model(tmp_path: Path) -> None:
    engine = InferenceEngine(tmp_path, TOY)
    assert not engine.reload()
    assert engine.loaded is None
    with pytest.raises(EnvironmentFault, match="no model is installed"):
        engine.infer(rows())


def test_columns_of_all_clients_in_order(tmp_path: Path) -> None:
    install(tmp_path, 1)
    engine = InferenceEngine(tmp_path, TOY)
    raw = rows(3)
    columns = engine.infer(raw)
    examples = raw.examples(application(TOY).configure())
    np.testing.assert_array_equal(columns["example_id"], examples.columns["example_id"])
    whole = engine.run(dict(examples.inputs))[1]["value"]
    np.testing.assert_allclose(columns["prediction"], whole, rtol=1e-6)
    assert engine.model().facts() == {
        "application": TOY, "version": 1, "parent_sha256": f"{1:064x}", "target": TARGET, "precision": "fp32",
    }  # fmt: skip


def test_a_changed_slot_is_loaded_at_the_next_run(tmp_path: Path) -> None:
    install(tmp_path, 1)
    engine = InferenceEngine(tmp_path, TOY)
    assert engine.reload()
    assert not engine.reload()
    first = engine.infer(rows())["prediction"]
    install(tmp_path, 2)
    assert not np.allclose(engine.infer(rows())["prediction"], first)
    assert engine.model().version == 2
    install(tmp_path, 3, seed=2)  # back in the slot of version 1: the same name, another bundle
    install(tmp_path, 4, seed=1)
    np.testing.assert_allclose(engine.infer(rows())["prediction"], first)


@pytest.mark.parametrize("kind", ["flipped byte", "other outputs"])
def test_a_model_that_fails_is_rolled_back(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    install(tmp_path, 1)
    engine = InferenceEngine(tmp_path, TOY)
    before = engine.infer(rows())["prediction"]
    install(tmp_path, 2)
    model = tmp_path / "slots" / "B" / f"model.{TARGET}.onnx"
    if kind == "flipped byte":
        damage(model)
    else:
        linear_model(model, np.ones(8))
        table = json.loads((tmp_path / "slots" / "B" / "manifest.json").read_text())
        from fl_core.storage import atomic

        table["files"][model.name] = {"sha256": atomic.sha256_file(model), "bytes": model.stat().st_size}
        (tmp_path / "slots" / "B" / "manifest.json").write_text(json.dumps(table))
    np.testing.assert_allclose(engine.infer(rows())["prediction"], before)
    assert engine.model().version == 1
    assert Slots(tmp_path).state().rejected == frozenset({2})
    assert "rolled back to version 1" in caplog.text


def test_without_a_former_model_the_error_is_that_of_the_model(tmp_path: Path) -> None:
    install(tmp_path, 1)
    damage(tmp_path / "slots" / "A" / f"model.{TARGET}.onnx")
    engine = InferenceEngine(tmp_path, TOY)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="sha256"):
            engine.infer(rows())


def test_a_model_in_memory_outlives_a_damaged_disk(tmp_path: Path) -> None:
    install(tmp_path, 1)
    engine = InferenceEngine(tmp_path, TOY)
    before = engine.infer(rows())["prediction"]
    install(tmp_path, 2)
    for slot in ("A", "B"):
        damage(tmp_path / "slots" / slot / f"model.{TARGET}.onnx")
    np.testing.assert_allclose(engine.infer(rows())["prediction"], before)
    with pytest.raises(IntegrityError):
        engine.reload()
    install(tmp_path, 3)
    assert engine.model().version == 3


def test_a_newer_model_is_not_rolled_back_in_place_of_the_failed_one(tmp_path: Path) -> None:
    store = Slots(tmp_path)
    install(tmp_path, 1)
    install(tmp_path, 2)
    failed = store.identity()
    install(tmp_path, 3)
    assert store.roll_back(failed).version == 3
    assert store.state().rejected == frozenset()
    assert store.roll_back(store.identity()).version == 2


def test_a_model_of_another_application_is_refused(tmp_path: Path) -> None:
    install(tmp_path, 1)
    with pytest.raises(InputError, match="this device runs driver_conflict"):
        InferenceEngine(tmp_path, "driver_conflict").reload()


def test_threads_share_the_engine_while_the_slot_changes(tmp_path: Path) -> None:
    install(tmp_path, 1)
    engine = InferenceEngine(tmp_path, TOY)
    inputs = {"features": np.ones((4, 8), np.float32)}
    expected = {}
    for version in (1, 2):
        install(tmp_path, version, seed=version)
        expected[version] = InferenceEngine(tmp_path, TOY).run(inputs)[1]["value"]
    seen, errors, done = set(), [], threading.Event()

    def work() -> None:
        try:
            while not done.is_set():
                model, outputs = engine.run(inputs)
                seed = int(model.bundle.manifest.parent_sha256, 16)
                np.testing.assert_allclose(outputs["value"], expected[seed], rtol=1e-6)
                seen.add(model.version)
        except BaseException as error:  # passed on to the test
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for version in range(3, 13):
        install(tmp_path, version, seed=1 + version % 2)
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert seen


MEMORY = """
import sys
from pathlib import Path
from fl_clients.edge.inference import InferenceEngine
from fl_core.learning.application import application
from fl_core.runtime.machine import resident_bytes
import paho.mqtt.client, ssl
engine = InferenceEngine(Path(sys.argv[1]), "toy_regression")
app = application("toy_regression")
for _ in range(3):
    engine.infer(app.generate(app.configure(), 0))
before = resident_bytes()
from fl_clients.edge.service import serve
server = serve({"toy_regression": engine}, port=0)
import subprocess
subprocess.run([sys.executable, "-c", sys.argv[2], str(server.port)], check=True)
engine.infer(app.generate(app.configure(), 0))
print(before >> 20, resident_bytes() - before >> 20)
server.stop()
print([m for m in ("torch", "flwr", "tuf", "rich", "onnx", "matplotlib") if m in sys.modules])
"""

# Another program on the device: its own gRPC memory is not the agent's.
CLIENT = """
import sys, grpc
from fl_clients.edge.oip.messages import REQUESTS, RESPONSES, SERVICE
with grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}") as channel:
    call = channel.unary_unary(f"/{SERVICE}/ServerReady", REQUESTS["ServerReady"].SerializeToString, RESPONSES["ServerReady"].FromString)
    assert call(REQUESTS["ServerReady"]()).ready
"""


def test_an_inferring_process_is_small_and_serving_costs_little(tmp_path: Path) -> None:
    """The bounds of the project: 100 MB with inference and MQTT, 20 MB more for gRPC."""
    install(tmp_path, 1)
    done = run_python(["-c", MEMORY, str(tmp_path), CLIENT])
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    inferring, serving = map(int, first.split())
    assert inferring < 100
    assert serving <= 20, done.stdout
    assert second == "[]"
