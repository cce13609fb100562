"""The inference process: kept warm, ended when idle, started again after a crash; its end is an error of one job."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fl_clients.edge.home import AgentHome
from fl_clients.edge.inference_process import InferenceProcess, ProcessEnded
from fl_clients.edge.models import FATAL_LOADS, Models
from fl_clients.edge.settings import InferenceSettings, settings_text
from fl_clients.edge.slots import Slots
from fl_clients.edge.updater import update
from fl_core.contracts.errors import DataError, EnvironmentFault, InputError
from fl_core.identity import keys
from fl_core.learning.application import application
from tests.bundles import TARGET, TOY, damage, publish_toy
from tests.helpers import eventually


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An application's folder with version 1 and 2, and data beside it."""
    app = application(TOY)
    raw = app.generate(app.configure(["data.clients=2"]), 0)
    raw.write(tmp_path / "data")  # type: ignore[attr-defined]
    (tmp_path / TOY).mkdir()
    for seed in (0, 1):
        renewed(tmp_path, seed)
    return tmp_path / TOY


def renewed(work: Path, seed: int) -> None:
    """Another version, published and installed."""
    publish_toy(work, seed=seed)
    root = work / "repo" / "metadata" / "1.root.json"
    update(work / TOY, application=TOY, repository=str(work / "repo"), root=root, target=TARGET)


def running(folder: Path, **settings: float) -> InferenceProcess:
    return InferenceProcess({TOY: folder}, InferenceSettings(**settings))  # type: ignore[arg-type]


@pytest.fixture
def process(folder: Path) -> Iterator[InferenceProcess]:
    found = running(folder)
    yield found
    found.close()
    assert found.pid is None


def test_one_process_answers_many_questions_and_says_what_it_needs(process: InferenceProcess, folder: Path) -> None:
    assert process.pid is None, "started when there is something to do"
    first = process.infer(TOY, folder.parent / "data")
    pid = process.pid
    second = process.infer(TOY, folder.parent / "data")
    assert first["num_examples"] == second["num_examples"] > 0
    assert process.pid == pid
    assert process.rss_mb
    assert len(list((folder / "predictions").glob("*.csv"))) == 2
    with pytest.raises(EnvironmentFault, match="no data"):
        process.infer(TOY, folder.parent / "nowhere")
    (folder.parent / "empty").mkdir()
    with pytest.raises((DataError, InputError)):
        process.infer(TOY, folder.parent / "empty")
    with pytest.raises(InputError, match="does not run here"):
        process.infer("driver_conflict", folder.parent / "data")
    assert process.pid == pid


def test_a_crash_is_an_error_of_one_job(process: InferenceProcess, folder: Path) -> None:
    process.infer(TOY, folder.parent / "data")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    eventually(lambda: process.pid is None, 60)
    assert process.infer(TOY, folder.parent / "data")["num_examples"] > 0, "an idle one that was killed costs nothing"
    assert process.crashes == 1
    pid = process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # it takes no question any more
    with ThreadPoolExecutor(1) as asker:
        asked = asker.submit(process.infer, TOY, folder.parent / "data")
        eventually(process.asking, 60)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EnvironmentFault, match="signal 9"):
            asked.result(60)
    assert process.infer(TOY, folder.parent / "data")["num_examples"] > 0


def test_an_idle_process_ends_and_the_next_question_starts_another(folder: Path) -> None:
    process = running(folder, idle_s=0.2)
    try:
        process.infer(TOY, folder.parent / "data")
        eventually(lambda: process.tick() or process.pid is None, 60)
        assert process.crashes == 0
        assert process.infer(TOY, folder.parent / "data")["num_examples"] > 0
    finally:
        process.close()


def test_a_serving_process_is_started_again_on_its_port_and_never_ends_by_itself(folder: Path) -> None:
    import tritonclient.grpc as triton

    process = running(folder, idle_s=0.2)
    try:
        port = process.serve("127.0.0.1", 0)
        first = process.pid
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            assert client.is_model_ready(TOY)
            process.tick()
            assert process.pid == first
            assert first is not None
            os.kill(first, signal.SIGKILL)
            eventually(lambda: process.tick() or process.pid not in (None, first), 60, interval=0.1)
            eventually(client.is_server_live, 60)
            assert client.is_model_ready(TOY)
    finally:
        process.close()


def test_a_new_model_is_taken_and_a_damaged_one_rolled_back(process: InferenceProcess, folder: Path) -> None:
    assert process.infer(TOY, folder.parent / "data")["model"]["version"] == 2
    renewed(folder.parent, 2)
    process.reload(TOY)
    assert process.infer(TOY, folder.parent / "data")["model"]["version"] == 3
    process.close()
    slot = Slots(folder).current_slot()
    assert slot is not None
    damage(folder / "slots" / slot / f"model.{TARGET}.onnx")
    assert process.infer(TOY, folder.parent / "data")["model"]["version"] == 2
    assert 3 in Slots(folder).state().rejected


def test_a_model_whose_loading_keeps_killing_is_rolled_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = AgentHome(folder.parent / "home")
    (home.folder / "applications").mkdir(parents=True)
    folder.rename(home.application(TOY).folder)
    home.settings_file.write_text(settings_text(url="https://localhost:1", name="v", applications=[TOY]))
    key = keys.create_device_key(folder.parent / "device.key")
    models = Models(home, home.settings(), key, {TOY: folder.parent / "data"})
    load = models.process.load

    def deadly(application: str) -> None:
        """The process is killed in the middle of loading version 2."""
        if (models.current(TOY) or {})["version"] == 2:
            models.process.infer(TOY, models.data[TOY])
            pid = models.process.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            killer = threading.Timer(0.1, os.kill, (pid, signal.SIGKILL))
            killer.start()
        load(application)

    monkeypatch.setattr(models.process, "load", deadly)
    try:
        for _ in range(FATAL_LOADS):
            with pytest.raises(ProcessEnded):
                models.infer(TOY)
        assert models.infer(TOY)["model"]["version"] == 1
        assert 2 in Slots(home.application(TOY).folder).state().rejected
    finally:
        models.close()
