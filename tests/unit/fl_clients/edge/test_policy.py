"""When a device trains: each rule in words, quiet hours around midnight, and a device's days on a simulated clock."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fl_clients.edge.condition import (
    BURST,
    REFILL_S,
    Bucket,
    Condition,
    TrainingDay,
    matters,
    rounded,
)
from fl_clients.edge.policy import BATTERY_MARGIN, TEMPERATURE_MARGIN, Decision, PolicySettings, decide, quiet_left
from fl_core.contracts import config
from fl_core.contracts.device_state import DataState, DeviceState
from fl_core.contracts.errors import ConfigError

NOON = datetime.datetime(2026, 3, 1, 12, 0, 0)
FULL = PolicySettings(
    train_min_battery=0.5,
    train_require_charging=True,
    train_max_temperature_c=60.0,
    train_on_metered=False,
    quiet_hours="22:00-06:00",
    max_train_s_per_day=100.0,
)
GOOD = DeviceState(battery_level=0.8, charging=True, temperature_c=40.0, metered=False)


def at(hour: int, minute: int = 0) -> datetime.datetime:
    return NOON.replace(hour=hour, minute=minute)


@pytest.mark.parametrize(
    ("values", "now", "trained", "words"),
    [
        ({}, NOON, 0.0, ""),
        ({"battery_level": 0.4}, NOON, 0.0, "battery 0.40, 0.50 needed"),
        ({"charging": False}, NOON, 0.0, "not charging"),
        ({"charging": None}, NOON, 0.0, "charging is not known"),
        ({"temperature_c": 61.0}, NOON, 0.0, "61 C"),
        ({"temperature_c": None}, NOON, 0.0, "temperature is not known"),
        ({"metered": True}, NOON, 0.0, "metered network"),
        ({"metered": None}, NOON, 0.0, "is not known"),
        ({}, at(23), 0.0, "quiet hours until 06:00"),
        ({}, at(5, 59), 0.0, "quiet hours"),
        ({}, at(6), 0.0, ""),
        ({}, NOON, 100.0, "100 s are allowed"),
        ({"battery_level": None}, NOON, 0.0, ""),  # on mains
    ],
)
def test_each_rule_is_told_in_words(values: dict[str, Any], now: datetime.datetime, trained: float, words: str) -> None:
    found = decide(FULL, DeviceState(**{**GOOD.__dict__, **values}), now, trained)
    assert found.allowed == (words == "")
    assert words in found.reason


def test_without_rules_everything_is_allowed() -> None:
    assert not PolicySettings().restricts
    assert decide(PolicySettings(), DeviceState(), NOON, 1e9).allowed


def test_what_made_it_wait_must_be_clearly_better() -> None:
    policy = PolicySettings(train_min_battery=0.5, train_max_temperature_c=60.0)
    low = DeviceState(battery_level=0.5 + BATTERY_MARGIN / 2, temperature_c=40.0)
    warm = DeviceState(battery_level=0.9, temperature_c=60.0 - TEMPERATURE_MARGIN / 2)
    for state in (low, warm):
        assert decide(policy, state, NOON, 0.0).allowed
        assert not decide(policy, state, NOON, 0.0, waiting=True).allowed


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 86_399))
def test_quiet_hours_end_when_they_say(first: int, last: int, second: int) -> None:
    hours = f"{first // 60:02}:{first % 60:02}-{last // 60:02}:{last % 60:02}"
    now = at(0) + datetime.timedelta(seconds=second)
    left = quiet_left(hours, now)
    minutes = {m % 1440 for m in range(first, first + ((last - first) % 1440 or 1440))}
    assert (left > 0) == (second // 60 in minutes)
    if left and first != last:
        end = now + datetime.timedelta(seconds=left)
        assert (end.hour, end.minute, end.second) == (last // 60, last % 60, 0)
        assert quiet_left(hours, end) == 0


@pytest.mark.parametrize("hours", ["22-6", "24:00-01:00", "22:00", "22:00-06:60", "22:00-06:00 "])
def test_malformed_hours_are_refused_with_the_key(hours: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse(PolicySettings, {"quiet_hours": hours}, origin="agent.toml", prefix="policy.")
    assert "quiet_hours" in str(error.value)


class Days(RuleBasedStateMachine):
    """A device on a simulated clock: it never trains against its rules, and waiting always has a reason that is true."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = PolicySettings(train_min_battery=0.4, quiet_hours="22:00-06:00", max_train_s_per_day=3_600.0)
        self.now, self.level, self.trained, self.decision = NOON, 0.6, 0.0, Decision()
        self.today = self.now.date()

    def _decide(self) -> None:
        state = DeviceState(battery_level=self.level)
        self.decision = decide(self.policy, state, self.now, self.trained, waiting=not self.decision.allowed)

    @rule(minutes=st.integers(1, 600), change=st.floats(-0.3, 0.3))
    def time_passes(self, minutes: int, change: float) -> None:
        before, self.now = self.decision, self.now + datetime.timedelta(minutes=minutes)
        self.level = min(1.0, max(0.0, self.level + change))
        if self.now.date() != self.today:
            self.today, self.trained = self.now.date(), 0.0
        self._decide()
        if before.lasts_s > minutes * 60:
            assert not self.decision.allowed, "it said that it would last"

    @precondition(lambda self: self.decision.allowed)
    @rule(seconds=st.floats(1, 1_800))
    def trains(self, seconds: float) -> None:
        self.trained += seconds
        self._decide()

    @invariant()
    def never_against_the_rules(self) -> None:
        if self.decision.allowed:
            assert 6 <= self.now.hour < 22
            assert self.level >= 0.4
            assert self.trained < 3_600.0


TestDays = Days.TestCase
TestDays.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# the condition over time


class Device:
    def __init__(self, folder: Path, policy: PolicySettings | None = None) -> None:
        self.state, self.time, self.now = DeviceState(battery_level=0.9, charging=False), 0.0, NOON
        self.condition = Condition(
            policy or PolicySettings(),
            lambda: self.state,
            folder,
            clock=lambda: self.time,
            now=lambda: self.now,
            skew=lambda: 0.26,
        )

    def change(self, **values: Any) -> None:
        self.state = DeviceState(**{**self.state.__dict__, **values})
        self.time += 10.0


def test_only_what_matters_is_news(tmp_path: Path) -> None:
    device = Device(tmp_path)
    assert device.condition.facts()["battery_level"] == 0.9
    assert device.condition.facts()["clock_skew_s"] == 0.3
    for values, news in (
        ({}, False),
        ({"battery_level": 0.87}, False),
        ({"battery_level": 0.85}, True),
        ({"battery_level": 0.85, "free_memory_bytes": 5}, False),
        ({"charging": True}, True),
        ({"temperature_c": 30.0}, True),
        ({"temperature_c": 33.0}, False),
        ({"data": {"toy": DataState(num_examples=10)}}, True),
        ({"data": {"toy": DataState(num_examples=11)}}, False),
        ({"data": {"toy": DataState(num_examples=20)}}, True),
    ):
        device.change(**values)
        assert device.condition.news() == news, values


def test_a_restless_device_says_little(tmp_path: Path) -> None:
    device, told = Device(tmp_path), 0
    device.condition.facts()
    for _ in range(8_640):  # a day in steps of 10 s
        device.change(charging=not device.state.charging)
        told += device.condition.news()
    assert told <= BURST + 86_400 / REFILL_S + 1


def test_why_it_waits_is_part_of_the_state(tmp_path: Path) -> None:
    device = Device(tmp_path, PolicySettings(train_min_battery=0.5))
    assert device.condition.facts()["waiting"] == ""
    device.change(battery_level=0.49)
    assert "battery" in device.condition.facts()["waiting"]
    device.change(battery_level=0.51)
    assert not device.condition.decide().allowed
    device.change(battery_level=0.6)
    assert device.condition.decide().allowed


def test_the_days_training_outlives_a_restart_and_ends_at_midnight(tmp_path: Path) -> None:
    policy = PolicySettings(max_train_s_per_day=50.0)
    first = Device(tmp_path, policy)
    first.condition.trained(45.0)
    first.condition.trained(6.0)
    assert not first.condition.decide().allowed
    first.condition.close()
    again = Device(tmp_path, policy)
    assert "51 s today" in again.condition.decide().reason
    again.now += datetime.timedelta(hours=12)
    assert again.condition.decide().allowed
    (tmp_path / "training-day.json").write_text("{")
    assert TrainingDay(tmp_path / "training-day.json").seconds(NOON) == 0.0


def test_a_bucket_refills() -> None:
    time = [0.0]
    bucket = Bucket(2, 10.0, lambda: time[0])
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    time[0] = 10.0
    assert [bucket.take() for _ in range(2)] == [True, False]
    time[0] = 1e6
    assert [bucket.take() for _ in range(3)] == [True, True, False]


@given(st.floats(0, 1), st.floats(-50, 150))
def test_rounding_is_no_news(level: float, heat: float) -> None:
    state = DeviceState(battery_level=level, temperature_c=heat)
    assert not matters(state, rounded(state))
