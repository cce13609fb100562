"""Services are stopped in reverse order, each of them, whatever happens."""

from __future__ import annotations

import logging

import pytest

from fl_server.services import Services


class Recorder:
    def __init__(self, name: str, told: list[str], *, fails: str = "") -> None:
        self.name, self.told, self.fails = name, told, fails

    def start(self) -> None:
        self._do("start")

    def stop(self) -> None:
        self._do("stop")

    def _do(self, what: str) -> None:
        self.told.append(f"{what} {self.name}")
        if self.fails == what:
            raise RuntimeError(f"{what} {self.name}")


def test_in_order_and_in_reverse() -> None:
    told: list[str] = []
    with Services() as services:
        services.start(Recorder("a", told))
        services.start(Recorder("b", told))
        told.append("work")
    assert told == ["start a", "start b", "work", "stop b", "stop a"]


def test_a_failed_start_stops_what_runs() -> None:
    told: list[str] = []

    def run() -> None:
        with Services() as services:
            services.start(Recorder("a", told))
            services.start(Recorder("b", told, fails="start"))

    with pytest.raises(RuntimeError, match="start b"):
        run()
    assert told == ["start a", "start b", "stop a"]


def test_a_failed_stop_does_not_keep_the_others_running(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    with caplog.at_level(logging.ERROR), Services() as services:
        services.start(Recorder("a", told))
        services.start(Recorder("b", told, fails="stop"))
    assert told[-2:] == ["stop b", "stop a"]
    assert "Recorder failed" in caplog.text
