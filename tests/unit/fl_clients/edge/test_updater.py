"""Updates from a repository to the slots, as the agent does them: in a child process, over HTTP and from a folder."""

from __future__ import annotations

import datetime
import json
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_clients.edge import updater
from fl_clients.edge.clock import ClockFloor
from fl_clients.edge.fetcher import Fetcher, base_url
from fl_clients.edge.inference import InferenceEngine
from fl_clients.edge.installation import ATTEMPTS, Request, only_one, run_update
from fl_clients.edge.slots import Slots, current_bundle
from fl_core.contracts.errors import (
    EnvironmentFault,
    FieldfleetError,
    GoalMissed,
    InputError,
    IntegrityError,
    RefusedError,
)
from fl_core.identity import ca
from fl_core.learning.application import application
from tests.bundles import TARGET, TOY, Files, RangeFiles, publish_toy, served


def update(work: Path, repository: str | None = None, *, child: bool = False, **options: Any) -> updater.UpdateResult:
    """As the agent does it with ``child``, else in this process, which is faster."""
    arguments = {
        "application": TOY,
        "repository": repository or str(work / "repo"),
        "root": work / "repo" / "metadata" / "1.root.json",
        "target": TARGET,
        "channel": "stable",
        "ca": None,
        **options,
    }
    if child:
        return updater.update(work / "home", **{"timeout_s": 60, **arguments})
    deadline = time.monotonic() + arguments.pop("timeout_s", 60)
    facts = run_update(Request(home=work / "home", deadline=deadline, **arguments))
    return updater.UpdateResult(
        status=facts["status"], version=facts["version"], previous=facts["previous"], facts=facts
    )


def version(work: Path) -> int | None:
    bundle = current_bundle(work / "home")
    return bundle.manifest.version if bundle else None


@pytest.mark.parametrize("handler", [None, Files, RangeFiles])
def test_update_infer_update_again(tmp_path: Path, handler: type[Files] | None) -> None:
    publish_toy(tmp_path, targets=("arm64", TARGET))

    def run(repository: str | None) -> None:
        first = update(tmp_path, repository, child=True)
        assert (first.status, first.version, first.previous) == ("installed", 1, None)
        assert first.facts["self_test"]["relative_max"] < 1e-5
        again = update(tmp_path, repository)
        assert (again.status, again.version, again.changed) == ("up-to-date", 1, False)
        engine = InferenceEngine(tmp_path / "home", TOY)
        before = infer(engine)
        publish_toy(tmp_path, seed=1)
        second = update(tmp_path, repository)
        assert (second.status, second.version, second.previous) == ("installed", 2, 1)
        assert not np.allclose(infer(engine), before)
        assert engine.model().version == 2

    if handler is None:
        run(None)
    else:
        with served(tmp_path / "repo", handler) as (url, paths):
            run(url)
        assert not [p for p in paths if "arm64" in p]
        assert paths[0].endswith(("/2.root.json", "/timestamp.json"))
    slot = tmp_path / "home" / "slots" / "A"
    assert {p.name for p in slot.iterdir()} >= {"manifest.json", "golden.npz", f"model.{TARGET}.onnx"}
    assert not (slot / "model.arm64.onnx").exists()
    assert not list((tmp_path / "home" / "update").glob("staging/*"))
    assert not list((tmp_path / "home" / "update").glob("partial/*"))


def infer(engine: InferenceEngine) -> np.ndarray[Any, Any]:
    app = application(TOY)
    return engine.infer(app.generate(app.configure(), 5))["prediction"]


def test_a_channel_without_this_application_is_named(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    with pytest.raises(RefusedError, match=r"offers no toy_regression/beta\.json"):
        update(tmp_path, channel="beta")
    with pytest.raises(InputError, match="no model for edge target 'riscv'"):
        update(tmp_path, target="riscv")


def test_an_older_version_in_the_channel_is_refused(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    update(tmp_path)
    publish_toy(tmp_path, seed=1, channel="beta")
    update(tmp_path, channel="beta")
    with pytest.raises(IntegrityError, match="offers version 1, older than 2"):
        update(tmp_path)
    assert version(tmp_path) == 2


def test_a_rolled_back_version_is_not_installed_again(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    update(tmp_path)
    publish_toy(tmp_path, seed=1)
    update(tmp_path)
    Slots(tmp_path / "home").roll_back()
    answer = update(tmp_path)
    assert (answer.status, answer.version, answer.facts["offered"]) == ("rejected", 1, 2)
    publish_toy(tmp_path, seed=2)
    assert update(tmp_path).version == 3


def test_a_model_that_fails_its_self_test_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed and whole, but the outputs on this processor are not those of the export."""
    publish_toy(tmp_path)
    update(tmp_path)
    monkeypatch.setattr("tests.bundles.Session.run", lambda self, inputs: {"value": np.full(4, 99.0, np.float32)})
    publish_toy(tmp_path, seed=1)
    monkeypatch.undo()
    with pytest.raises(GoalMissed, match="self-test"):
        update(tmp_path, child=True)
    assert version(tmp_path) == 1
    assert update(tmp_path).status == "rejected"


KILLED_BY_ITS_MODEL = """
import os, signal, sys
from fl_clients.edge import installation, updater
installation.golden_check = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(updater.main(sys.argv[1:]))
"""


def test_a_model_whose_self_test_kills_is_not_tried_for_ever(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    update(tmp_path)
    publish_toy(tmp_path, seed=1)
    root = tmp_path / "repo" / "metadata" / "1.root.json"
    command = ["--home", tmp_path / "home", "--application", TOY, "--repository", tmp_path / "repo"]
    command += ["--root", root, "--target", TARGET]
    for _ in range(ATTEMPTS):
        done = subprocess.run([sys.executable, "-c", KILLED_BY_ITS_MODEL, *command], check=False, timeout=60)
        assert done.returncode == -9
        assert version(tmp_path) == 1
    with pytest.raises(GoalMissed, match=f"ended its process {ATTEMPTS} times"):
        update(tmp_path)
    assert update(tmp_path).status == "rejected"
    publish_toy(tmp_path, seed=2)
    assert update(tmp_path).version == 3, "another version has its own attempts"


def test_a_broken_download_is_resumed_by_byte_range(tmp_path: Path) -> None:
    size = 700_000
    publish_toy(tmp_path, padding=size)
    with served(tmp_path / "repo", RangeFiles, break_after=200_000) as (url, paths):
        assert update(tmp_path, url).status == "installed"
    model = [p for p in paths if p.endswith(".onnx")]
    assert len(model) == 4  # 0, 200, 400 and 600 kB


def test_a_server_without_ranges_starts_over(tmp_path: Path) -> None:
    publish_toy(tmp_path, padding=300_000)
    name = next((tmp_path / "repo" / "targets").rglob("*.onnx"))
    partial = tmp_path / "partial"
    for data in (b"", name.read_bytes()[:100_000], name.read_bytes()):
        with served(tmp_path / "repo") as (url, _):
            fetcher = Fetcher(None, partial, deadline=1e18)
            target = f"{url}/{name.relative_to(tmp_path / 'repo')}"
            part = fetcher.part_of(target)
            partial.mkdir(exist_ok=True)
            part.write_bytes(data)
            assert b"".join(fetcher.fetch(target)) == name.read_bytes()
            fetcher.close()


def test_a_download_goes_on_in_the_next_process(tmp_path: Path) -> None:
    publish_toy(tmp_path, padding=400_000)
    with served(tmp_path / "repo", RangeFiles, break_after=1) as (url, _), pytest.raises(RefusedError):
        update(tmp_path, url, timeout_s=2)
    with served(tmp_path / "repo", RangeFiles, break_after=150_000) as (url, paths):
        assert update(tmp_path, url).status == "installed"
    assert paths


def test_https_trusts_the_fleets_own_authority_only(tmp_path: Path) -> None:
    for name in ("fleet", "other"):
        ca.create_ca(tmp_path / name, name)
    ca.issue_server_certificate(tmp_path / "fleet", tmp_path / "fleet", ["127.0.0.1"])
    ca.issue_server_certificate(tmp_path / "fleet", tmp_path / "elsewhere", ["field.example"])
    publish_toy(tmp_path, padding=300_000)
    authority = tmp_path / "fleet" / "ca.pem"
    for folder, trusted, said in (
        ("elsewhere", authority, "IP address mismatch|not valid for"),
        ("fleet", tmp_path / "other" / "ca.pem", "CERTIFICATE_VERIFY_FAILED"),
        ("fleet", None, "CERTIFICATE_VERIFY_FAILED"),
        ("fleet", authority, None),
    ):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / folder / "server.pem", tmp_path / folder / "server.key")
        with served(tmp_path / "repo", RangeFiles, tls=context, break_after=150_000) as (url, _):
            if said is None:
                assert update(tmp_path, url, ca=trusted, child=True).status == "installed"
            else:
                with pytest.raises(RefusedError, match=said):
                    update(tmp_path, url, ca=trusted)
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(EnvironmentFault, match="not a readable certificate"):
        update(tmp_path, "https://127.0.0.1:1", ca=tmp_path / "bad.pem")


@pytest.mark.parametrize(
    "repository",
    ["http://198.51.100.1/x", "ftp://localhost/x", "https://user@localhost/x", "https://", "/absent/folder"],
)
def test_unusable_addresses_are_refused_before_any_contact(repository: str) -> None:
    with pytest.raises(InputError, match="repository"):
        base_url(repository)


def test_folders_and_loopback_are_accepted(tmp_path: Path) -> None:
    assert base_url(str(tmp_path)) == f"file://{tmp_path}"
    assert base_url(f"file://{tmp_path}") == f"file://{tmp_path}"
    assert base_url("http://127.0.0.1:5/a/") == "http://127.0.0.1:5/a"
    assert base_url("https://fleet.example:8433/repo") == "https://fleet.example:8433/repo"


def test_an_unreachable_repository_is_exit_code_4(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    with served(tmp_path / "repo") as (url, _):
        pass
    with pytest.raises(RefusedError, match="cannot be reached"):
        update(tmp_path, url, child=True)
    with served(tmp_path) as (url, _), pytest.raises(RefusedError, match="status 404"):
        update(tmp_path, f"{url}/nothing")


def test_an_absent_or_foreign_root_is_named(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    with pytest.raises(InputError, match="no readable root metadata"):
        update(tmp_path, root=tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(IntegrityError, match="refused"):
        update(tmp_path, root=tmp_path / "bad.json")


def test_two_updates_at_once_are_refused(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    (tmp_path / "home" / "update").mkdir(parents=True)
    with only_one(tmp_path / "home" / "update" / ".lock"), pytest.raises(EnvironmentFault, match="another update"):
        update(tmp_path)


def test_a_clock_behind_the_last_update_is_refused(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    update(tmp_path)
    floor = ClockFloor(tmp_path / "home" / "update" / "clock.json")
    kept = floor.read()
    assert kept is not None
    assert abs(kept - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(minutes=1)
    floor.raise_to(kept + datetime.timedelta(days=3))
    floor.raise_to(kept)  # never down
    with pytest.raises(EnvironmentFault, match=r"(?s)earlier than the last verified update.*set the clock"):
        update(tmp_path)
    assert version(tmp_path) == 1


def test_a_clock_behind_the_publication_is_refused(tmp_path: Path) -> None:
    publish_toy(tmp_path, now=datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=2))
    with pytest.raises(EnvironmentFault, match="earlier than the publication"):
        update(tmp_path)
    assert version(tmp_path) is None


def test_a_damaged_floor_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "clock.json").write_text('{"floor": "yesterday"}')
    floor = ClockFloor(tmp_path / "clock.json")
    assert floor.read() is None
    floor.check(datetime.datetime(1990, 1, 1, tzinfo=datetime.UTC))


@pytest.mark.parametrize(
    ("code", "table", "kind"),
    [
        (1, {"error": "self-test"}, GoalMissed),
        (2, {"error": "bad"}, IntegrityError),
        (3, {"error": "clock"}, EnvironmentFault),
        (4, {"error": "away"}, RefusedError),
        (-9, None, EnvironmentFault),
        (1, None, EnvironmentFault),
        (0, None, EnvironmentFault),
    ],
)
def test_answers_of_the_child(code: int, table: dict[str, str] | None, kind: type[FieldfleetError]) -> None:
    line = b"chatter\n" + (json.dumps({**table, "remedy": "do"}).encode() if table else b"")
    with pytest.raises(kind):
        updater.read_answer(code, line, b"Traceback\nMemoryError")


def test_the_parent_never_holds_the_tuf_client(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    script = (
        "import sys; from pathlib import Path; from fl_clients.edge.updater import update\n"
        f"home = Path({str(tmp_path)!r}); update(home / 'home', application='{TOY}', repository=str(home / 'repo'),"
        f" root=home / 'repo/metadata/1.root.json', target='{TARGET}')\n"
        "print([m for m in ('tuf', 'securesystemslib', 'torch', 'flwr', 'rich', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    assert version(tmp_path) == 1
