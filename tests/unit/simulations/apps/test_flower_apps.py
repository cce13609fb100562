"""Unmodified Flower projects over our Grid: against a plain sequential twin, against a hand computation, and broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Context, RecordDict

from fl_core.contracts.errors import InputError
from fl_core.flower.adapter import apps as adapter
from fl_core.learning import seeding
from simulations.apps.client import seed_everything
from simulations.apps.project import read_project
from simulations.apps.run import AppResult, simulate_app
from tests.helpers import ROOT, fieldfleet
from tests.unit.simulations.apps.plain_grid import PlainGrid

APPS = ROOT / "tests" / "flower_apps"
STRATEGIES = (
    *("FedAvg", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi", "FedProx", "FedMedian", "FedTrimmedAvg", "QFedAvg"),
    *("Krum", "MultiKrum", "CloseFriends"),
)


@pytest.fixture(autouse=True)
def app_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading an app puts its folder on sys.path: not beyond the test."""
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))


def run(name: str, *overrides: str, clients: int = 5, workers: int = 0, seed: int = 0) -> AppResult:
    return simulate_app(read_project(APPS / name, overrides), num_clients=clients, workers=workers, seed=seed)


def twin(name: str, *overrides: str, clients: int = 5, seed: int = 0) -> RecordDict:
    project = read_project(APPS / name, overrides)
    app = adapter.load_client_app(project.client, project.folder)
    server = adapter.load_server_app(project.server, project.folder)
    context = Context(1, 1, {}, RecordDict(), dict(project.run_config))
    grid = PlainGrid(app, clients, project.run_config, seed)
    seed_everything(seeding.key(seed, "flower app", "server"))
    server(grid, context)
    return context.state


def plain(state: RecordDict) -> dict[str, Any]:
    """Everything that an app kept, as values that can be compared bit for bit; times of day left out."""
    return {
        name: {k: v.data if isinstance(v, Array) else v for k, v in record.items() if k != "at"}
        for name, record in state.items()
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_flowers_and_foreign_strategies_end_in_the_bits_of_the_plain_twin(strategy: str) -> None:
    expected = plain(twin("numpy_linear", f"strategy={strategy}"))
    assert plain(run("numpy_linear", f"strategy={strategy}").context.state) == expected
    assert set(expected) >= {"arrays", "train-3", "evaluate-3"}


def test_worker_processes_change_nothing() -> None:
    """Sampling, the clients' process-wide generators, Context.state, mods: whatever the number of workers."""
    settings = ("strategy=FedAdam", "fraction-train=0.6", "num-server-rounds=4")
    expected = plain(twin("numpy_linear", *settings, clients=7, seed=5))
    for workers in (0, 1, 3):
        found = run("numpy_linear", *settings, clients=7, seed=5, workers=workers)
        assert plain(found.context.state) == expected
        assert not found.tally.failed
    assert len(set(expected["metrics"]["drawn"])) == 7, "each client has a stream of its own"
    assert plain(run("numpy_linear", *settings, clients=7, seed=6).context.state) != expected


def test_fedavg_equals_a_hand_computation() -> None:
    """FedAvg sums in the order of its sample, so 1e-14 here; with sums that are exact in any order, to the bit."""
    from numpy_linear.client_app import data

    weights = np.zeros(3)
    parts = [data(Context(1, 1, {"partition-id": i}, RecordDict(), {"features": 3})) for i in range(5)]
    sizes = [len(x) for x, _ in parts]
    for _ in range(3):
        steps = [weights - 0.1 * (x.T @ (x @ weights - y) / len(x)) for x, y in parts]
        weights = sum(step * (n / sum(sizes)) for step, n in zip(steps, sizes, strict=True))
    found = run("numpy_linear").context.state
    np.testing.assert_allclose(found["arrays"].to_numpy_ndarrays()[0], weights, rtol=1e-14)
    assert found["train-3"]["rounds"] == pytest.approx(3.0), "Context.state lives on from round to round"
    assert found["train-1"]["went-through-mod"] == pytest.approx(1.0)
    assert found["metrics"]["rows"] == sizes
    exact = run("numpy_linear", "exact=true", clients=4, workers=2).context.state["arrays"]
    assert exact.to_numpy_ndarrays()[0].tolist() == [3 * (1 + 2 + 3 + 4) / 4 / 4] * 3


def test_the_interface_before_the_message_api() -> None:
    for workers in (0, 2):
        result = run("legacy_linear", clients=4, workers=workers)
        assert dict(result.tally.replies) == {"train": 12, "evaluate": 12}
        assert not result.tally.failed
    from legacy_linear.app import KEPT, Linear

    weights = np.zeros(2)
    clients = [Linear(i) for i in range(4)]
    total = sum(len(c.x) for c in clients)
    for _ in range(3):
        weights = sum(c.fit([weights], {})[0][0] * len(c.x) for c in clients) / total
    np.testing.assert_allclose(KEPT["weights"], weights, rtol=1e-12)  # it sums in the order of arrival


def test_a_torch_project_with_personal_layers_and_nothing_seeded_repeats_itself() -> None:
    expected = plain(twin("torch_digits", clients=4))
    found = run("torch_digits", clients=4, workers=2)
    assert plain(found.context.state) == expected
    assert expected["steps"] == {"opened": 1, "closed": 1}
    assert dict(found.tally.replies) == {"train": 4, "evaluate": 8}


# broken clients


def test_a_failing_client_is_an_error_reply_as_flower_makes_it() -> None:
    for workers in (0, 2):
        result = run("numpy_linear", "fail=2:raise", workers=workers)
        assert dict(result.tally.failed) == {"train": 3}
        assert result.tally.reasons[0] == "partition 2: ValueError: the sensor is broken"
        assert "arrays" in result.context.state, "FedAvg goes on with the others"


def test_a_worker_that_dies_is_replaced_and_its_client_asked_once_more(tmp_path: Path) -> None:
    marker = tmp_path / "died"
    found = run("numpy_linear", f"fail=3:once {marker}", workers=2)
    assert marker.exists()
    assert not found.tally.failed
    expected = plain(twin("numpy_linear", f"fail=3:once {marker}"))
    assert plain(found.context.state) == expected, "done again exactly once: the same bits"


def test_a_client_that_kills_its_worker_every_time_costs_one_error_a_round() -> None:
    result = run("numpy_linear", "fail=1:exit", workers=2)
    assert dict(result.tally.failed) == {"train": 3}
    assert "the worker process died over this message, twice" in result.tally.reasons[0]


def test_a_changed_run_config_is_refused_and_the_state_stays() -> None:
    result = run("numpy_linear", "fail=0:config")
    assert dict(result.tally.failed) == {"train": 3}
    assert "run_config" in result.tally.reasons[0]


# broken projects


def project(
    folder: Path, package: str, *, config: str = "", server: str = "", client: str = "", **replace: str
) -> Path:
    text = (APPS / "numpy_linear" / "pyproject.toml").read_text()
    text = text.replace("numpy_linear.", f"{package}.").replace('fail = ""', f'fail = ""\n{config}')
    for old, new in replace.items():
        text = text.replace(old.replace("__", "-"), new)
    (folder / package).mkdir(parents=True)
    (folder / "pyproject.toml").write_text(text)
    (folder / package / "__init__.py").touch()
    for name, given in (("server_app.py", server), ("client_app.py", client)):
        source = (APPS / "numpy_linear" / "numpy_linear" / name).read_text()
        (folder / package / name).write_text(given or source.replace("numpy_linear", package))
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"serverapp": "nothing"}, 'pyproject.toml: not a Flower project: .*"serverapp" missing'),
        ({"version": "nothing"}, '"version" missing in'),
        ({"publisher": "nothing"}, '"publisher" missing'),
        ({"server_app:app": "server_app"}, "Missing attribute in"),
        ({"server_app:app": "server_app:other"}, "Unable to load attribute other"),
        ({"client_app:app": "client_app:stamp"}, "is a function, not a ClientApp"),
        ({"client_app:app": "no_such_file:app"}, "ModuleNotFoundError: No module named"),
        ({"options.num__supernodes = 5": "options.num-supernodes = ["}, "not a Flower project"),
    ],
)
def test_a_broken_project_is_refused_with_its_place(
    tmp_path: Path, change: dict[str, str], words: str, request: pytest.FixtureRequest
) -> None:
    folder = project(tmp_path / "app", f"broken_{abs(hash(request.node.name)) % 10**8}", **change)
    with pytest.raises(InputError, match=f"(?s){words}"):
        simulate_app(read_project(folder), num_clients=2, workers=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_import_error_names_the_line_and_the_remedy(tmp_path: Path, workers: int) -> None:
    folder = project(tmp_path / "app", f"importing_{workers}", client="import os\nimport no_such_package_at_all\n")
    with pytest.raises(InputError, match=r"no_such_package_at_all.*client_app.py:2") as refused:
        simulate_app(read_project(folder), num_clients=2, workers=workers)
    assert refused.value.remedy == "install what the app needs here: no_such_package_at_all"


def test_errors_of_the_server_app_name_its_line(tmp_path: Path) -> None:
    server = (
        "from flwr.serverapp import ServerApp\napp = ServerApp()\n@app.main()\ndef main(grid, context):\n    1 / 0\n"
    )
    folder = project(tmp_path / "app", "dividing", server=server)
    with pytest.raises(InputError, match=r"the ServerApp failed: ZeroDivisionError.*server_app.py:5"):
        simulate_app(read_project(folder), num_clients=2, workers=0)


def test_an_app_that_waits_for_more_clients_than_there_are_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.serverapp.strategy import strategy_utils

    monkeypatch.setattr(strategy_utils, "sleep", lambda seconds: None)
    with pytest.raises(InputError, match="waits for more clients than the 1 that there are") as refused:
        run("numpy_linear", clients=1)
    assert refused.value.remedy == "--num-clients N"


def test_a_client_app_that_returns_no_reply_is_an_error_reply(tmp_path: Path) -> None:
    client = "from flwr.clientapp import ClientApp\napp = ClientApp()\n@app.train()\ndef t(m, c):\n    return None\n"
    client += "@app.query()\ndef q(m, c):\n    return m\n"
    server = """
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    nodes = list(grid.get_node_ids())
    sent = [Message(RecordDict(), nodes[0], "train"), Message(RecordDict(), nodes[0], "query"), Message(RecordDict(), 7, "train")]
    replies = list(grid.send_and_receive(sent, timeout=60))
    assert [r.error.reason for r in replies] == [
        "partition 0: TypeError: the ClientApp returned a NoneType, not a reply to its message",
        "partition 0: TypeError: the ClientApp returned a Message that replies to another one, not a reply to its message",
        "no client has the node id 7",
    ]
"""
    simulate_app(
        read_project(project(tmp_path / "app", "silent", server=server, client=client)), num_clients=2, workers=0
    )


# configuration


def test_run_config_and_rounds() -> None:
    folder = APPS / "numpy_linear"
    found = read_project(folder, ["lr=1", "strategy=FedAdam", "fail=7"], rounds=9)
    assert found.run_config["lr"] == 1.0
    assert type(found.run_config["lr"]) is float
    assert (found.run_config["num-server-rounds"], found.run_config["fail"]) == (9, "7")
    assert (found.num_clients, read_project(APPS / "torch_digits").num_clients) == (5, 2)
    assert read_project(APPS / "torch_digits", ["train.lr=0.5"]).run_config["train.lr"] == 0.5
    assert read_project(APPS / "legacy_linear", rounds=2).run_config == {"rounds": 2}


def test_run_config_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("num-server-rounds = 8\n[train]\nhidden = 7\n")
    found = read_project(APPS / "torch_digits", [str(tmp_path / "own.toml")]).run_config
    assert (found["num-server-rounds"], found["train.hidden"]) == (8, 7)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["no-such=1"], "no-such: not a key of .*pyproject.toml"),
        (["num-server-rounds=many"], "num-server-rounds = 'many': must be int"),
        (["num-server-rounds=true"], "must be int"),
        (["lr"], "'lr' is malformed"),
        (["missing.toml"], "missing.toml: no such file"),
    ],
)
def test_wrong_run_config_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_project(APPS / "numpy_linear", overrides)


def test_the_command(tmp_path: Path) -> None:
    found = fieldfleet("simulate", "--flower-app", APPS / "numpy_linear", "--rounds", "1", "--workers", "1", "--json")
    assert found.returncode == 0, found.stderr
    document = json.loads(found.stdout)
    assert (document["flower_app"], document["num_clients"]) == ("numpy-linear", 5)
    assert document["replies"] == {"query": 5, "query.draw": 5, "train": 5, "evaluate": 5}
    refused = fieldfleet("simulate", "--flower-app", tmp_path)
    assert refused.returncode == 2
    assert "Cannot find pyproject.toml" in refused.stderr
    every = fieldfleet("simulate", "--flower-app", APPS / "numpy_linear", "toy_regression")
    assert (every.returncode, "APP has no part in --flower-app" in every.stderr) == (2, True)
