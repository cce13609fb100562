"""maize_leaf: how its photographs are divided."""

from __future__ import annotations

from dataclasses import replace

from applications.plant_disease.clients import Facts
from applications.plant_disease.data import Leaf, Leaves
from benchmarks import maize_leaf


def test_no_group_is_parted_and_each_class_of_each_domain_is_tested() -> None:
    raw = maize_leaf.generated()
    twins = [replace(x, facts=replace(x.facts, file=f"again/{x.facts.file}")) for x in raw.leaves[::3]]
    raw = Leaves((*raw.leaves, *twins), True)  # each third photograph has a near-duplicate
    first, second = maize_leaf.split(raw, 0), maize_leaf.split(raw, 1)
    for parts in (first, second):
        groups = {name: {x.facts.group for x in leaves} for name, leaves in parts.items()}
        assert not groups["train"] & groups["test"]
        assert len(parts["train"]) + len(parts["test"]) == len(raw.leaves)
        assert {kind(x.facts) for x in parts["test"]} == {kind(x.facts) for x in raw.leaves}
        assert all(x.facts.domain == "lab" for x in parts["lab"])
        assert 0.15 < len(parts["test"]) / len(raw.leaves) < 0.35
    assert names(first["test"]) != names(second["test"])
    assert names(first["test"]) == names(maize_leaf.split(raw, 0)["test"])


def kind(facts: Facts) -> tuple[str, str]:
    return facts.domain, facts.label


def names(leaves: tuple[Leaf, ...]) -> list[str]:
    return [x.facts.file for x in leaves]
