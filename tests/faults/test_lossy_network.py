"""A device in a network namespace of its own, behind a link that loses packets, is slow, or is cut: real TCP over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fl_server.home import ListenSettings, MqttSettings, ServerSettings, create_home
from tests.fault_arena import NAMES, Arena, arena
from tests.fault_table import Fault
from tests.federation import DeviceProcess
from tests.helpers import eventually
from tests.lossy_link import HOST, LossyLink, lossy_link

pytestmark = pytest.mark.slow
ROUNDS = 3
VICTIM = NAMES[0]
CHECKED = "nobody exits; each round counts it, once, trained once"


@contextmanager
def far_away(folder: Path) -> Iterator[tuple[Arena, LossyLink]]:
    """The first device is on the other side of the link."""
    listen = ListenSettings(host="0.0.0.0", names=(HOST,))
    home = create_home(folder / "home", ServerSettings(fleet="test", listen=listen, mqtt=MqttSettings(mode="off")))
    with lossy_link() as link:

        def prepare(device: DeviceProcess) -> None:
            if device.name == VICTIM:
                device.url = f"https://{HOST}:{device.url.rpartition(':')[2]}"
                device.program = link.inside(device.program)

        with arena(folder, home=home, prepare=prepare) as field:
            yield field, link


def well(field: Arena) -> None:
    field.check_model()
    field.check_trained()
    eventually(lambda: all(not list(d.folder.glob("fleet/outbox/*.reply")) for d in field.devices), 90)
    field.check_acknowledged()
    for device in field.devices:
        assert device.process is not None
        assert device.process.poll() is None, device.log()


@pytest.mark.parametrize(("loss", "delay"), [(0.3, 0.0), (0.1, 0.3), (0.0, 2.0)])
def test_a_bad_link_all_the_time(fault: Fault, tmp_path: Path, loss: float, delay: float) -> None:
    fault.about("bad link (namespace)", f"{loss:.0%} of packets lost each way, {delay:g} s one way", CHECKED)
    with far_away(tmp_path) as (field, link):
        link.loss, link.delay_s = loss, delay
        with fault.recovery():
            field.begin(ROUNDS)
            field.finish(240)
        assert link.passed > 20
        assert loss == 0 or link.lost > 0
        link.loss = link.delay_s = 0.0
        well(field)


@pytest.mark.parametrize("during", ["training", "waiting"])
def test_a_partition(fault: Fault, tmp_path: Path, during: str) -> None:
    fault.about("partition (namespace)", during, CHECKED)
    with far_away(tmp_path) as (field, link):
        victim, other = field.device(VICTIM), field.device(NAMES[1])
        held = victim if during == "training" else other
        field.after[1] = lambda: held.switch("hold", True)
        field.begin(ROUNDS)
        eventually(lambda: 2 in held.seen(), 60)
        if during == "waiting":
            eventually(lambda: [e for e, _ in victim.events].count("reply") == 2, 60)
        link.up, before = False, link.lost
        held.switch("hold", False)
        eventually(lambda: link.lost > before + 2, 60)
        link.up = True
        with fault.recovery():
            field.wait_round(2 if during == "training" else 3)
        field.finish()
        well(field)
