"""The folds of the driving benchmark: every vehicle in one, and a driver of several vehicles too."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from applications.driver_conflict.data import Drives, Event
from benchmarks.driver_conflict import folds


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=40), st.integers(1, 5))
def test_no_vehicle_and_no_driver_is_in_two_folds(drives: list[tuple[int, int]], count: int) -> None:
    facts = [{"subject_id": str(d), "event_start_row": "0", "event_end_row": "9", "speed_ok": "1"} for _, d in drives]
    rows = np.zeros((40, 1), np.float32)
    events = [Event(i, f"vehicle-{v}", rows, facts[i]) for i, (v, _) in enumerate(drives)]
    raw = Drives(("x",), tuple(events))
    parts = folds(raw, count)
    assert len(parts) == count
    assert sorted(c for part in parts for c in part) == list(raw.client_ids())
    place = {client: k for k, part in enumerate(parts) for client in part}
    for driver in range(1, 7):  # 0 is an unknown driver
        assert len({place[e.client] for e in events if e.facts["subject_id"] == str(driver)}) <= 1
