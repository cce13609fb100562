"""Presets and overrides: refused with file, key and accepted values; parse and to_table are inverses."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts import config as configuration
from fl_core.contracts.config import (
    apply_overrides,
    at_default,
    choice,
    describes,
    flag,
    known,
    number,
    parse,
    read_toml,
    sequence,
    text,
    to_table,
)
from fl_core.contracts.errors import ConfigError, ExitCode
from tests.helpers import refusal


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: int = number(3, low=1, high=9)
    rate: float = number(0.5, low=0.0, high=1.0)
    kind: str = choice("a", "a", "b")
    on: bool = flag(False)
    note: str = text("")
    sizes: tuple[int, ...] = sequence((1, 2), low=0, high=100)
    limit: float | None = number(None, low=0.0)


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    top: int = number(0)

    def __post_init__(self) -> None:
        if self.top > 5 and not self.inner.on:
            raise ValueError("top above 5 needs inner.on")


def refused(table: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse(Outer, table, origin="site/preset.toml")
    assert error.value.exit_code == ExitCode.WRONG_INPUT
    message = str(error.value)
    assert "site/preset.toml" in message
    return message


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"innner": {}}, ["innner", "did you mean inner", "accepted: inner, top"]),
        ({"inner": {"cuont": 1}}, ["inner.cuont", "did you mean inner.count", "sizes"]),
        ({"inner": 3}, ["inner must be a table"]),
        ({"inner": {"count": 0}}, ["inner.count = 0", "1 to 9"]),
        ({"inner": {"count": 10**400}}, ["inner.count", "1 to 9"]),
        ({"inner": {"count": True}}, ["inner.count must be an integer"]),
        ({"inner": {"count": 2.0}}, ["inner.count must be an integer"]),
        ({"inner": {"rate": "fast"}}, ["inner.rate must be a number", "'fast'"]),
        ({"inner": {"rate": float("nan")}}, ["inner.rate", "0.0 to 1.0"]),
        ({"inner": {"rate": 10**400}}, ["inner.rate", "0.0 to 1.0"]),
        ({"inner": {"limit": float("inf")}}, ["inner.limit"]),
        ({"inner": {"kind": "c"}}, ["inner.kind = 'c'", "accepted: a, b"]),
        ({"inner": {"on": 1}}, ["inner.on must be true or false"]),
        ({"inner": {"note": None}}, ["inner.note must be a string"]),
        ({"inner": {"sizes": 4}}, ["inner.sizes must be a list"]),
        ({"inner": {"sizes": [1, "x"]}}, ["inner.sizes must be an integer"]),
        ({"inner": {"sizes": [101]}}, ["inner.sizes", "0 to 100"]),
        ({"top": 6}, ["top above 5 needs inner.on"]),
    ],
)
def test_wrong_values_name_file_key_and_accepted(table: Any, words: list[str]) -> None:
    message = refused(table)
    assert [w for w in words if w not in message] == []


def test_integers_serve_as_numbers() -> None:
    found = parse(Outer, {"inner": {"rate": 1}}, origin="x").inner.rate
    assert (found, type(found)) == (1.0, float)


def test_overrides_are_toml_values_or_bare_strings() -> None:
    table = {"inner": {"count": 2, "kind": "a"}}
    found = apply_overrides(table, ["inner.count=4", "inner.kind=b", "inner.sizes=[3, 4]", "inner.on=true", "top = 1"])
    assert found == {"inner": {"count": 4, "kind": "b", "sizes": [3, 4], "on": True}, "top": 1}
    assert table == {"inner": {"count": 2, "kind": "a"}}, "the preset was changed in place"
    assert apply_overrides({}, ["a.b.c=1"]) == {"a": {"b": {"c": 1}}}
    assert apply_overrides({}, ["inner.note=x=y"]) == {"inner": {"note": "x=y"}}


@pytest.mark.parametrize("item", ["inner.count", "=3", "inner.=3", ".count=3", "", "inner..count=3"])
def test_malformed_overrides_show_how_to_write_them(item: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        apply_overrides({}, [item])


def test_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a section"):
        apply_overrides({"top": 1}, ["top.count=3"])


def test_toml_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        read_toml(tmp_path / "absent.toml")
    for content in (b"a = ", b"\xff\xfe", b"a = 1\na = 2\n"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
            read_toml(tmp_path / "bad.toml")


def test_a_table_nested_without_end_is_refused() -> None:
    from fl_core.learning.application import application

    table: dict[str, Any] = {}
    for _ in range(5000):
        table = {"model": table}
    with pytest.raises(ConfigError, match="the request"):
        application("toy_regression").configure_from(table, origin="the request")


inners = st.builds(
    Inner,
    count=st.integers(1, 9),
    rate=st.floats(0, 1),
    kind=st.sampled_from(["a", "b"]),
    on=st.booleans(),
    note=st.text(max_size=20),
    sizes=st.lists(st.integers(0, 100), max_size=4).map(tuple),
    limit=st.none() | st.floats(0, 1e300),
)


@given(inner=inners, top=st.integers(-10, 5))
def test_parse_inverts_to_table_also_through_json(inner: Inner, top: int) -> None:
    config = Outer(inner=inner, top=top)
    assert parse(Outer, to_table(config), origin="x") == config
    assert parse(Outer, json.loads(json.dumps(to_table(config))), origin="x") == config


@dataclass(frozen=True, kw_only=True)
class OlderInner:
    count: int = number(3, low=1, high=9)
    rate: float = number(0.5, low=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class Older:
    inner: OlderInner = field(default_factory=OlderInner)


@given(inner=inners, top=st.integers(-10, 5))
def test_an_older_schema_reads_what_it_knows_or_names_what_it_would_need(inner: Inner, top: int) -> None:
    config = Outer(inner=inner, top=top)
    table = known(Older, to_table(config), frozenset(at_default(config)))
    newer = {f.name for f in dataclasses.fields(Inner)} - {"count", "rate"}
    used = [name for name in newer if getattr(inner, name) != getattr(Inner(), name)]
    if not used and top == 0:
        assert parse(Older, table, origin="x") == Older(inner=OlderInner(count=inner.count, rate=inner.rate))
    else:
        with pytest.raises(ConfigError, match="unknown key"):
            parse(Older, table, origin="x")


def test_a_section_that_is_not_known_is_passed_over_only_while_it_says_nothing() -> None:
    @dataclass(frozen=True, kw_only=True)
    class OnlyTop:
        top: int = number(0)

    for inner, accepted in ((Inner(), True), (Inner(count=4), False)):
        config = Outer(inner=inner, top=2)
        table = known(OnlyTop, to_table(config), frozenset(at_default(config)))
        assert ("inner" not in table) is accepted


@given(inner=inners, top=st.integers(-10, 5), other=inners)
def test_a_table_describes_its_own_configuration_alone(inner: Inner, top: int, other: Inner) -> None:
    config = Outer(inner=inner, top=top)
    table = json.loads(json.dumps(to_table(config)))
    assert describes(table, config)
    assert describes(to_table(config, chosen=True), config), "what it lacks is at its default"
    assert describes(table, Outer(inner=other, top=top)) is (to_table(other) == to_table(inner))
    assert not describes({**table, "removed": 1}, config)
    assert not describes({**table, "inner": 3}, config)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([f.name for f in dataclasses.fields(Inner)]) | st.text(max_size=5)


@given(table=st.dictionaries(st.sampled_from(["inner", "top"]), json_values | st.dictionaries(names, json_values)))
def test_any_json_is_a_configuration_or_a_config_error(table: dict[str, Any]) -> None:
    message = refusal(ConfigError, lambda: configuration.parse(Outer, table, origin="request"))
    assert message is None or message.startswith("request:")
