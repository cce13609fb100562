"""kill -9 at any moment of an update or a publication leaves something whole, and the next run goes on from it."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

from fl_clients.edge.slots import Slots, current_bundle
from fl_clients.edge.updater import update
from fl_core.delivery import names
from fl_core.delivery.repository import Repository
from fl_core.runtime.golden import golden_check
from tests.bundles import TARGET, TOY, publish_toy, toy_bundle

ROUNDS = 14


def killed_after(command: list[str], seconds: float) -> int:
    """The exit code of ``command``, killed after ``seconds`` unless it ended before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    timer = threading.Timer(seconds, process.send_signal, (signal.SIGKILL,))
    timer.start()
    try:
        return process.wait(60)
    finally:
        timer.cancel()


def updater_command(work: Path) -> list[str]:
    root = work / "repo" / "metadata" / "1.root.json"
    command = [sys.executable, "-m", "fl_clients.edge.updater", "--home", str(work / "home"), "--application", TOY]
    return [*command, "--target", TARGET, "--repository", str(work / "repo"), "--root", str(root)]


def running_version(work: Path) -> int:
    bundle = current_bundle(work / "home")
    assert bundle is not None
    golden_check(bundle, TARGET)
    return bundle.manifest.version


def test_a_killed_updater_leaves_a_verifying_slot(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    update(
        tmp_path / "home", application=TOY, repository=str(tmp_path / "repo"),
        root=tmp_path / "repo" / "metadata" / "1.root.json", target=TARGET,
    )  # fmt: skip
    rng = random.Random(7)
    for _ in range(ROUNDS):
        offered = publish_toy(tmp_path, seed=1, padding=3_000_000).version
        before = running_version(tmp_path)
        killed_after(updater_command(tmp_path), rng.uniform(0.25, 0.6))
        after = running_version(tmp_path)
        assert after in (before, offered)
    done = publish_toy(tmp_path, seed=2)
    assert killed_after(updater_command(tmp_path), 60) == 0
    assert running_version(tmp_path) == done.version
    assert Slots(tmp_path / "home").state().highest == done.version


def test_a_crash_at_each_step_of_the_switch(tmp_path: Path) -> None:
    """The same, without chance: the process ends at the n-th operation on the file system, for each n."""
    publish_toy(tmp_path)
    assert killed_after(updater_command(tmp_path), 60) == 0
    steps, ended = 0, False
    while not ended:
        steps += 1
        offered = publish_toy(tmp_path, seed=steps).version
        before = running_version(tmp_path)
        code = subprocess.run([sys.executable, "-c", CRASHING.format(steps=steps), *updater_command(tmp_path)[3:]],
                              capture_output=True, timeout=60, check=False).returncode  # fmt: skip
        assert code in (0, 77)
        ended = code == 0
        assert running_version(tmp_path) in (before, offered)
        assert steps < 60
    assert steps > 8
    assert running_version(tmp_path) == offered


CRASHING = """
import os, shutil, sys
from fl_clients.edge import updater
from fl_clients.edge.slots import Slots
left = [{steps}]
def crashing(function):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os._exit(77)
        return function(*args, **kwargs)
    return call
def install(self, *args):
    os.replace, os.fsync, os.symlink, shutil.rmtree = map(crashing, (os.replace, os.fsync, os.symlink, shutil.rmtree))
    return original(self, *args)
original, Slots.install = Slots.install, install
sys.exit(updater.main(sys.argv[1:]))
"""


def test_a_killed_publication_leaves_a_readable_repository(tmp_path: Path) -> None:
    publish_toy(tmp_path)
    bundle = toy_bundle(tmp_path / "next", seed=5, padding=3_000_000)
    command = [sys.executable, "-m", "fieldfleet", "publish", str(bundle), "--repo", str(tmp_path / "repo")]
    rng = random.Random(1)
    store = Repository(tmp_path / "repo", tmp_path / "repo-keys")
    for _ in range(8):
        killed_after(command, rng.uniform(0.2, 0.5))
        data = store.read_target(names.index_target(TOY, "stable"))
        assert data is not None
        index = names.read_index(data, application=TOY, channel="stable")
        for name in index.files:
            assert store.read_target(names.file_target(TOY, index.version, name)) is not None
    done = publish_toy(tmp_path, seed=9)
    assert killed_after(updater_command(tmp_path), 60) == 0
    assert running_version(tmp_path) == done.version
