"""The agent's relation to its server, with a server that does as the test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_clients.connection import Unreachable, Unregistered
from fl_clients.edge import contact as module
from fl_clients.edge.contact import OFTEN_S, REFRESH_S, SELDOM_S, Contact, ContactKeeper
from tests.helpers import eventually


@given(st.lists(st.sampled_from(["ok", "away", "refused", "incomplete"]), max_size=200))
def test_pauses_stay_within_their_bounds(steps: list[Any]) -> None:
    contact, failures = Contact(clock=lambda: 5.0), 0
    for step in steps:
        contact.note("ok" if step == "incomplete" else step, "why")
        pause = contact.pause(complete=step != "incomplete")
        failures = 0 if step in ("ok", "incomplete") else failures + 1
        if step == "ok":
            assert pause == REFRESH_S
        else:
            assert 0 < pause <= (SELDOM_S if step == "incomplete" or failures > module.OFTEN else OFTEN_S)
    assert contact.facts()["state"] in ("starting", "ok", "away", "refused")


class Server:
    def __init__(self) -> None:
        self.answer: Exception | None = None
        self.asked = self.told = self.changes = 0
        self.complete = True
        self.keeper = ContactKeeper(
            self._ask,
            welcomed=lambda found: None,
            changed=self._change,
            complete=lambda: self.complete,
            tell=self._tell,
        )

    def _ask(self) -> Any:
        self.asked += 1
        if self.answer is not None:
            raise self.answer

    def _tell(self) -> None:
        self.told += 1
        if self.answer is not None:
            raise self.answer

    def _change(self) -> None:
        self.changes += 1


@contextmanager
def kept(server: Server) -> Iterator[ContactKeeper]:
    stop = threading.Event()
    thread = threading.Thread(target=server.keeper.run, args=(stop,))
    thread.start()
    try:
        yield server.keeper
    finally:
        stop.set()
        server.keeper.ring()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_S", "FIRST_INCOMPLETE_S", "TELL_EVERY_S"):
        monkeypatch.setattr(module, name, 0.02)


def state(server: Server) -> Callable[[], str]:
    return lambda: server.keeper.contact.state


def test_it_asks_until_it_is_welcomed_and_then_leaves_the_server_alone() -> None:
    server = Server()
    server.answer = Unreachable("down")
    with kept(server) as keeper:
        eventually(lambda: server.asked >= 3)
        assert state(server)() == "away"
        server.answer = Unregistered("who?", remedy="register")
        eventually(lambda: state(server)() == "refused")
        assert "register" in keeper.contact.reason
        server.answer = None
        eventually(lambda: state(server)() == "ok")
        asked = server.asked
        keeper.tell_soon()
        eventually(lambda: server.told == 1)
        assert server.asked == asked
        assert server.changes == 3


def test_a_broker_that_stays_away_is_asked_about() -> None:
    server = Server()
    with kept(server) as keeper:
        eventually(lambda: state(server)() == "ok")
        asked = server.asked
        keeper.doubt()
        keeper.tell_soon()  # by the time it is told, the doubt was dealt with
        eventually(lambda: server.told == 1)
        assert server.asked <= asked + 1
        server.complete = False
        keeper.doubt()
        eventually(lambda: server.asked >= asked + 2)


def test_what_could_not_be_told_is_told_after_the_outage() -> None:
    server = Server()
    with kept(server) as keeper:
        eventually(lambda: state(server)() == "ok")
        server.answer = Unreachable("down")
        keeper.tell_soon()
        eventually(lambda: state(server)() == "away")
        told = server.told
        server.answer = None
        eventually(lambda: state(server)() == "ok")
        eventually(lambda: server.told > told)
