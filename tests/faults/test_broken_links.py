"""A device behind a link that breaks in the ways networks do, by a TCP proxy in user space (it works on every machine).

Loss of single packets and partitions of a network namespace: ``test_lossy_network.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fault_arena import BIG, NAMES, Arena, arena
from tests.fault_proxy import TcpProxy
from tests.fault_table import Fault
from tests.helpers import eventually

ROUNDS = 3
VICTIM = NAMES[0]
UP, DOWN = True, False
CHECKED = "nobody exits; the same round goes on; trained once, counted once"


@pytest.mark.parametrize(
    ("direction", "megabytes"),
    [(UP, 2), pytest.param(UP, 0.1, marks=pytest.mark.slow), pytest.param(DOWN, 2, marks=pytest.mark.slow)],
)
def test_a_reset_in_the_middle_of_a_transfer(fault: Fault, tmp_path: Path, direction: bool, megabytes: float) -> None:
    words = f"{'upload' if direction == UP else 'download'} after {megabytes} of 4 MB"
    fault.about("connection reset", words, CHECKED)
    with arena(tmp_path, proxied=True, model=BIG) as field:

        def cut() -> None:
            field.proxy.cut_after = (direction, int(megabytes * 1e6))

        field.after[1] = cut
        field.begin(ROUNDS)
        field.wait_round(1)
        eventually(lambda: field.proxy.cut_after is None, 60)
        with fault.recovery():
            field.wait_round(2)
        field.finish()
        well(field)


@pytest.mark.slow
def test_resets_all_the_time(fault: Fault, tmp_path: Path) -> None:
    fault.about("connection reset", "each connection after 6 MB, 5 rounds of 8 MB", CHECKED)
    with arena(tmp_path, proxied=True, model=BIG) as field:
        cuts = 0
        field.begin(5)
        while len(field.records) < 5 and field.failure is None:
            if field.proxy.cut_after is None:
                cuts += 1
                field.proxy.cut_after = (cuts % 2 == 0, 6_000_000)
            eventually(lambda: field.proxy.cut_after is None or len(field.records) == 5 or field.failure, 60)
        field.finish()
        assert cuts >= 4
        well(field)


def reset_all(proxy: TcpProxy) -> None:
    proxy.refusing = True
    proxy.reset()


def silent(proxy: TcpProxy) -> None:
    proxy.open = False


def healed(proxy: TcpProxy) -> None:
    proxy.refusing, proxy.open, proxy.delay_s = False, True, 0.0


@pytest.mark.parametrize("during", ["training", pytest.param("waiting", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "breaks"),
    [("server port closed (resets)", reset_all), pytest.param("partition (silence)", silent, marks=pytest.mark.slow)],
)
def test_an_outage_of_the_link(
    fault: Fault, tmp_path: Path, name: str, breaks: Callable[[TcpProxy], None], during: str
) -> None:
    fault.about(name, f"{during}, healed before the deadline", CHECKED)
    with arena(tmp_path, proxied=True) as field:
        victim, other = field.device(VICTIM), field.device(NAMES[1])
        held = victim if during == "training" else other
        field.after[1] = lambda: held.switch("hold", True)
        field.begin(ROUNDS)
        eventually(lambda: 2 in held.seen(), 60)
        if during == "waiting":
            eventually(lambda: [e for e, _ in victim.events].count("reply") == 2, 60)
        breaks(field.proxy)
        held.switch("hold", False)
        if during == "training":
            eventually(lambda: list((victim.folder / "fleet" / "outbox").glob("*.reply")), 60)
        else:
            field.wait_round(2)
        assert len(field.records) == (1 if during == "training" else 2)
        healed(field.proxy)
        with fault.recovery():
            field.wait_round(2 if during == "training" else 3)
        field.finish()
        well(field)


@pytest.mark.slow
def test_a_half_open_connection(fault: Fault, tmp_path: Path) -> None:
    """The server's side of the long poll is gone, the device's stands: only its own time limit can tell it."""
    fault.about(
        "half-open connection", "long poll, server side lost", "the device notices by its poll's time limit (here 60 s)"
    )
    with arena(tmp_path, proxied=True) as field:
        victim, other = field.device(VICTIM), field.device(NAMES[1])
        field.after[1] = lambda: other.switch("hold", True)
        field.begin(ROUNDS)
        eventually(lambda: 2 in other.seen() and [e for e, _ in victim.events].count("reply") == 2, 60)
        eventually(lambda: len(field.superlink.bell._doors) == 1, 30)
        field.proxy.forget_server_side()
        with fault.recovery():
            other.switch("hold", False)
            field.wait_round(3, 120)
        field.finish()
        well(field)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2.0, 0.3])
def test_latency(fault: Fault, tmp_path: Path, seconds: float) -> None:
    fault.about("latency", f"{seconds:g} s each way, all the time", CHECKED)
    with arena(tmp_path, proxied=True) as field:
        field.proxy.delay_s = seconds
        with fault.recovery():
            field.begin(ROUNDS)
            field.finish(200)
        well(field)


@pytest.mark.slow
def test_a_partition_that_outlasts_the_deadline(fault: Fault, tmp_path: Path) -> None:
    fault.about(
        "partition (silence)", "longer than the deadline", "rounds go on without it; it is back for the next one"
    )
    with arena(tmp_path, proxied=True) as field:
        victim = field.device(VICTIM)
        field.after[1] = lambda: silent(field.proxy)
        field.after[2] = lambda: field.device(NAMES[1]).switch("hold", True)
        field.begin(4, "algorithm.min_clients=1", "algorithm.deadline_s=12")
        assert field.wait_round(2).late == [VICTIM]
        healed(field.proxy)
        with fault.recovery():
            eventually(lambda: VICTIM in field.superlink.grid().device_names().values(), 90)
        field.device(NAMES[1]).switch("hold", False)
        field.finish()
        assert VICTIM in field.records[3].clients
        field.check_model([sorted(record.clients) for record in field.records])
        assert victim.process is not None
        assert victim.process.poll() is None


def well(field: Arena) -> None:
    field.check_model()
    field.check_trained()
    eventually(lambda: all(not list(d.folder.glob("fleet/outbox/*.reply")) for d in field.devices), 30)
    field.check_acknowledged()
    for device in field.devices:
        assert device.process is not None
        assert device.process.poll() is None, device.log()
        assert "Traceback" not in device.log()
