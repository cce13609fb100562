"""A home from before several applications is taken over, whole, wherever a crash cuts the move."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fl_clients.edge.home import AgentHome
from fl_clients.edge.layout import migrate
from fl_clients.edge.settings import settings_text
from fl_clients.edge.slots import Slots, current_bundle
from fl_clients.edge.updater import update
from tests.bundles import TARGET, TOY, publish_toy
from tests.helpers import ROOT


def old_home(work: Path, *, key: str = f'application = "{TOY}"') -> AgentHome:
    """As the first version left it: two updates, the second in use, some predictions; settings with the old key."""
    home = AgentHome(work / "home")
    (home.folder / "predictions").mkdir(parents=True)
    (home.folder / "predictions" / "20260101T000000-v1.csv").write_text("example_id\n")
    text = settings_text(url="https://localhost:1", name="v", applications=[])
    home.settings_file.write_text(text.replace("applications = []", key), encoding="utf-8")
    for seed in (0, 1):
        publish_toy(work, seed=seed)
        renewed(work, home.folder)
    return home


def renewed(work: Path, folder: Path) -> str:
    root = work / "repo" / "metadata" / "1.root.json"
    return update(folder, application=TOY, repository=str(work / "repo"), root=root, target=TARGET).status


def check(work: Path, home: AgentHome) -> None:
    own = home.application(TOY)
    bundle = current_bundle(own.folder)
    assert bundle is not None
    assert bundle.manifest.version == 2
    assert Slots(own.folder).state().versions == {"A": 1, "B": 2}
    assert [file.name for file in own.predictions.iterdir()] == ["20260101T000000-v1.csv"]
    assert not any((home.folder / part).exists() for part in ("slots", "update", "predictions"))
    assert (own.folder / "update" / "clock.json").is_file(), "the floor under the clock came along"
    assert renewed(work, own.folder) == "up-to-date"


@pytest.mark.parametrize("key", [f'application = "{TOY}"', f'applications = ["driver_conflict", "{TOY}"]'])
def test_an_old_home_is_taken_over(tmp_path: Path, key: str) -> None:
    home = old_home(tmp_path, key=key)
    assert TOY in home.settings().device.names
    for _ in range(2):
        migrate(home, home.settings())
        check(tmp_path, home)


CRASHING = """
import os, pathlib, signal, sys
from fl_clients.edge import layout
from fl_clients.edge.home import AgentHome
from fl_core.storage import atomic
left = [int(sys.argv[2])]
def crashing(function):
    def call(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call
os.rename, atomic.fsync_folder = crashing(os.rename), crashing(atomic.fsync_folder)
home = AgentHome(pathlib.Path(sys.argv[1]))
layout.migrate(home, home.settings())
"""


def test_kill_9_at_each_step_is_made_good_by_the_next_start(tmp_path: Path) -> None:
    home = old_home(tmp_path)
    step, code = 0, -9
    while code == -9:
        step += 1
        command = [sys.executable, "-c", CRASHING, str(home.folder), str(step)]
        code = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False).returncode
        assert code in (0, -9)
        # back to where the first version left it, but for what this crash had moved already
        if code == -9:
            migrate(home, home.settings())
            check(tmp_path, home)
            for part in ("slots", "update", "predictions"):
                (home.application(TOY).folder / part).rename(home.folder / part)
    assert step > 9
    check(tmp_path, home)


def test_a_new_home_has_nothing_to_move(tmp_path: Path) -> None:
    home = AgentHome(tmp_path)
    home.settings_file.write_text(settings_text(url="https://localhost:1", name="v", applications=[TOY]))
    migrate(home, home.settings())
    assert [path.name for path in tmp_path.iterdir()] == ["agent.toml"]
