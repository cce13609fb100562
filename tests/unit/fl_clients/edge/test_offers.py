"""What a device makes of the server's word on its repository."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_clients.edge.offers import LONGEST_SPREAD_S, Offer, Offers

steps = st.lists(st.tuples(st.sampled_from(["publish", "hear", "look"]), st.sampled_from(["a", "b"])), max_size=40)


@given(steps)
def test_nothing_that_was_announced_is_missed(moves: list[tuple[str, str]]) -> None:
    """After each announcement, a device that looks wherever it is told to look has what is offered."""
    offers = Offers({"a": "stable", "b": "stable"})
    generation, offered = 0, {"a": 0, "b": 0}
    installed: dict[str, int | None] = {"a": None, "b": None}
    due: set[str] = set()
    for move, name in moves:
        if move == "publish":
            generation += 1
            offered[name] += 1
        elif move == "hear" and generation:
            versions = {n: {"stable": v} for n, v in offered.items() if v}
            due |= set(offers.hear(Offer(generation, versions), installed))
            for other in ("a", "b"):
                assert other in due or installed[other] == offered[other] or (not offered[other])
        elif move == "look":
            installed[name] = offered[name] or None
            due.discard(name)
            assert not offers.looked(name, generation), "nothing newer was announced than what was just seen"


def test_an_announcement_during_a_look_asks_for_another_one() -> None:
    offers = Offers({"a": "stable"})
    assert offers.hear(Offer(5), {"a": 1}) == ["a"]
    assert offers.hear(Offer(6), {"a": 1}) == ["a"]
    assert offers.looked("a", 5)
    assert not offers.looked("a", 6)
    assert offers.hear(Offer(6), {"a": 2}) == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"repository": True}, None),
        ({"repository": -1}, None),
        ({"repository": 2**60}, None),
        ({"repository": 3}, Offer(3)),
        ({"repository": 3, "models": [], "spread_s": "x"}, Offer(3, {}, LONGEST_SPREAD_S)),
        ({"repository": 3, "models": {"a": {"stable": 2}}, "spread_s": 1}, Offer(3, {"a": {"stable": 2}}, 1.0)),
    ],
)
def test_a_message_is_read_with_care(body: dict[str, Any], expected: Offer | None) -> None:
    assert Offer.from_body(body) == expected


def test_odd_versions_lead_to_a_look() -> None:
    for odd in ({"a": 5}, {"a": {"stable": "2"}}, {"a": {"other": 1}}):
        assert Offers({"a": "stable"}).hear(Offer(1, odd), {"a": 1}) == ["a"]
