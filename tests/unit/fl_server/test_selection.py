"""Who is asked: each condition in words, chance that is repeatable, turns that go round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts import config
from fl_core.contracts.device_state import DataState, DeviceState
from fl_core.contracts.errors import ConfigError
from fl_core.contracts.sections import SelectionConfig
from fl_server.history import RoundRecord
from fl_server.selection import StateSelector, UniformSelector, by_size, version_key, why_not

TOY = "toy_regression"
GOOD = DeviceState(
    battery_level=0.9,
    charging=False,
    network="wifi",
    metered=False,
    temperature_c=30.0,
    free_storage_bytes=10**9,
    num_examples=100,
    data_age_s=60.0,
    applications={TOY: "1.2.0"},
    trains=True,
    group="vans",
    tags=("gpu", "front-camera"),
    seen_at=1_000.0,
)
FULL = SelectionConfig(
    min_battery=0.5,
    allow_metered=False,
    networks=("wifi", "ethernet"),
    max_temperature_c=45.0,
    min_free_storage=10**6,
    min_examples=10,
    max_data_age_s=3600.0,
    min_version="1.1",
    groups=("vans",),
    tags=("gpu",),
    max_state_age_s=600.0,
    unknown="refuse",
)


def changed(**values: Any) -> DeviceState:
    return DeviceState(**{**GOOD.__dict__, **values})


def selector(settings: SelectionConfig, states: Mapping[str, DeviceState], seed: int = 0) -> StateSelector:
    return StateSelector(settings, lambda: states, seed=seed, application=TOY, clock=lambda: 1_100.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"battery_level": 0.3}, "battery 0.30"),
        ({"battery_level": None, "charging": None}, "battery is unknown"),
        ({"metered": True}, "metered"),
        ({"network": "cellular"}, "network cellular"),
        ({"network": None}, "network is unknown"),
        ({"temperature_c": 60.0}, "60 C"),
        ({"free_storage_bytes": 5}, "storage"),
        ({"num_examples": 3}, "3 examples"),
        ({"data": {TOY: DataState(num_examples=3, age_s=0.0)}}, "3 examples"),
        ({"data_age_s": 4000.0}, "newest sample"),
        ({"applications": {TOY: "1.0.9"}}, "version 1.0.9"),
        ({"applications": {"other": "1.2.0"}}, f"has no {TOY}"),
        ({"trains": False}, "does not train"),
        ({"group": "cameras"}, "group cameras"),
        ({"tags": ()}, "without tag gpu"),
        ({"waiting": "quiet hours until 06:00"}, "quiet hours"),
        ({"seen_at": 0.0}, "1100 s old"),
    ],
)
def test_each_condition_is_told_in_words(values: dict[str, Any], words: str) -> None:
    assert why_not(GOOD, FULL, TOY, 1_100.0) == ""
    assert words in why_not(changed(**values), FULL, TOY, 1_100.0)


def test_a_charging_device_needs_no_charge() -> None:
    assert why_not(changed(battery_level=0.1, charging=True), FULL, TOY, 1_100.0) == ""


def test_charging_can_be_demanded() -> None:
    assert why_not(GOOD, SelectionConfig(require_charging=True), TOY, 0.0) == "not charging"


def test_a_stale_state_is_unknown_where_that_is_allowed() -> None:
    lenient = SelectionConfig(min_battery=0.5, max_state_age_s=600.0)
    assert why_not(changed(battery_level=0.1), lenient, TOY, 1_100.0) != ""
    assert why_not(changed(battery_level=0.1), lenient, TOY, 10_000.0) == ""


def test_without_conditions_it_chooses_as_chance_alone_does() -> None:
    names = [f"van-{i}" for i in range(20)]
    for number in range(1, 6):
        plain = UniformSelector(3).choose(names, 7, round=number)
        assert selector(SelectionConfig(), {}, seed=3).choose(names, 7, round=number) == plain


@given(
    st.dictionaries(st.sampled_from([f"van-{i}" for i in range(12)]), st.floats(0, 1), min_size=1),
    st.integers(0, 14),
    st.integers(1, 50),
    st.sampled_from(["uniform", "least_recent"]),
    st.randoms(use_true_random=False),
)
def test_chosen_are_able_enough_and_repeatable(
    levels: dict[str, float], count: int, number: int, fairness: str, random: Any
) -> None:
    states = {name: DeviceState(battery_level=level) for name, level in levels.items()}
    settings = SelectionConfig(min_battery=0.4, fairness=fairness)
    names = list(levels)
    first = selector(settings, states).choose(names, count, round=number)
    random.shuffle(names)
    again = selector(settings, dict(sorted(states.items(), reverse=True))).choose(names, count, round=number)
    assert first == again
    able = {name for name, level in levels.items() if level >= 0.4}
    assert set(first.chosen) <= able
    assert set(first.skipped) == set(levels) - able
    assert len(first.chosen) == (min(count, len(able)) if count else len(able))


def test_least_recent_gives_everyone_a_turn_and_goes_on_after_a_restart() -> None:
    names, settings = [f"van-{i}" for i in range(6)], SelectionConfig(fairness="least_recent")
    whole = selector(settings, {})
    records, turns = [], Counter[str]()
    for number in range(1, 7):
        chosen = whole.choose(names, 2, round=number).chosen
        turns.update(chosen)
        # one of them failed: it had its turn all the same
        records.append(RoundRecord(round=number, clients={chosen[0]: {}}, refused={chosen[1]: "failed"}))
        whole.note(records[-1])
    assert set(turns.values()) == {2}
    resumed = selector(settings, {})
    for record in records[:4]:
        resumed.note(record)
    expected = tuple(sorted({*records[4].clients, *records[4].refused}))
    assert resumed.choose(names, 2, round=5).chosen == expected


def test_chances_by_number_of_examples() -> None:
    sizes: dict[str, int | None] = {"large": 900, "small": 100, "none": 0}
    first = Counter(by_size(sizes, 1, seed=1, round=r)[0] for r in range(2_000))
    assert first["none"] == 0
    assert 0.86 < first["large"] / 2_000 < 0.94  # 0.9, five standard deviations
    assert by_size(sizes, 2, seed=1, round=1) == ("large", "small")
    assert len(by_size({"a": None, "b": None}, 1, seed=1, round=1)) == 1


@pytest.mark.parametrize(
    ("low", "high"), [("1.9", "1.10"), ("1.2", "1.2.1"), ("0.9.9", "1"), ("garbage", "0.1"), ("1.2", "1.3.rc1")]
)
def test_versions_are_compared_as_numbers(low: str, high: str) -> None:
    assert version_key(low) < version_key(high)
    assert version_key("1.2") == version_key("1.2.0")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"networks": ["pigeon"]}, "pigeon"),
        ({"min_version": "latest"}, "min_version"),
        ({"fairness": "least_recent", "weight": "examples"}, "least_recent"),
        ({"min_batery": 0.5}, "did you mean selection.min_battery"),
        ({"min_battery": 50}, "accepted: 0.0 to 1.0"),
    ],
)
def test_a_wrong_setting_names_the_file_and_the_key(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse(SelectionConfig, table, origin="preset.toml", prefix="selection.")
    assert words in str(error.value)
    assert "preset.toml" in str(error.value)
