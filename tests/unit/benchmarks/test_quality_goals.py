"""Goals of `benchmarks quality` are judged by the mean over the seeds, and only where their rows are there."""

from __future__ import annotations

from typing import Any

from benchmarks import quality
from benchmarks.quality import UNSEEN, Goal, Plan


def row(**values: float) -> dict[int, dict[str, Any]]:
    return {int(seed[1:]): {UNSEEN: {"num_examples": 10, "metrics": {"roc_auc": v}}} for seed, v in values.items()}


def test_goals_compare_the_seeds_that_rows_share_and_leave_out_what_is_not_there() -> None:
    plan = Plan(
        goals=(
            Goal(row="pooled", least=0.95),
            Goal(row="pooled", above="floor", least=0.1),
            Goal(row="pooled", above="twin", least=0.0),
            Goal(row="federated", least=0.5),
        )
    )
    rows = {"pooled": row(s0=0.94, s1=0.98), "floor": row(s1=0.89, s2=0.1)}
    assert quality.goals(rows, plan) == {
        "roc_auc of pooled 0.9600, at least 0.95, 2 seeds": True,
        "roc_auc of pooled less floor 0.0900, at least 0.1, 1 seeds": False,
    }
    assert quality.goals({}, plan) == {}


def test_the_rows_that_goals_name_are_rows_of_the_plan() -> None:
    for name, plan in quality.PLANS.items():
        known = {"pooled", *(f"pooled, {condition}" for condition in plan.conditions)}
        for goal in plan.goals:
            assert goal.row in known, name
            assert goal.above in known or goal.above.startswith("floor: ") or not goal.above, name
