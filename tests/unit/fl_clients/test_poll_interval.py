"""The length of a long poll adapts to what the way to the server bears."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fl_clients.training.poll_interval import FIRST_POLL_S, LONGEST_S, SHORTEST_S, PollInterval


@given(st.lists(st.floats(0.0, 2_000.0), max_size=30))
def test_it_stays_within_its_bounds(cuts: list[float]) -> None:
    """Something cuts connections after so many seconds, each time another number."""
    interval = PollInterval()
    for cut in cuts:
        if cut < interval.seconds:
            interval.broke(cut)
        else:
            interval.lasted(interval.seconds)
        assert SHORTEST_S <= interval.seconds <= LONGEST_S


@given(st.floats(SHORTEST_S + 1.0, 5_000.0))
def test_behind_a_box_that_forgets_it_soon_holds_polls_that_last(cut: float) -> None:
    interval, broken = PollInterval(), 0
    for _ in range(20):
        if cut < interval.seconds:
            interval.broke(cut)
            broken += 1
        else:
            interval.lasted(interval.seconds)
    assert broken <= 2
    assert interval.seconds >= min(cut, LONGEST_S) * 0.6


def test_a_short_outage_says_nothing_of_the_way() -> None:
    interval = PollInterval()
    interval.broke(3.0)
    assert interval.seconds == FIRST_POLL_S


def test_a_short_interval_is_kept() -> None:
    interval = PollInterval(0.2)
    interval.lasted(0.2)
    interval.broke(20.0)
    assert interval.seconds == 0.2
