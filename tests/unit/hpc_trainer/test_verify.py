"""``verify-loss``: passes what is right, and sees each of the usual mistakes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fl_core.contracts.errors import InputError
from hpc_trainer.verify import KINDS, chosen_worlds, compare
from hpc_trainer.verify_command import FAULTS
from tests.helpers import APPLICATIONS, fieldfleet


def verify_loss(*arguments: str, code: int) -> dict[str, Any]:
    done = fieldfleet("verify-loss", "--data", "generated", "--json", *arguments, timeout=280)
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["passed"] == (code == 0)
    return found


@pytest.mark.timeout(300)
def test_two_processes_with_batch_norm_equal_one_in_float64() -> None:
    found = verify_loss("--app", "toy_regression", "--procs", "1,2", code=0)["applications"][0]
    assert (found["steps"], found["norm"], found["tolerance"]) == (40, "batch", 1e-12)
    (two,) = found["comparisons"]
    assert set(two["deviations"]) == set(KINDS)
    assert max(two["deviations"].values()) < 1e-12


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("norm", ["batch", "ghost", "group"])
@pytest.mark.parametrize("name", APPLICATIONS)
def test_every_application_at_two_and_four_processes(name: str, norm: str, dtype: str) -> None:
    verify_loss("--app", name, "--dtype", dtype, "--set", f"model.norm={norm}", code=0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_seen(fault: str) -> None:
    found = verify_loss("--app", "toy_regression", "--procs", "2", "--break", fault, code=1)["applications"][0]
    (two,) = found["comparisons"]
    assert max(two["deviations"].values()) > 1e-3
    assert two["worst"]["weights"] or two["worst"]["losses"]


def test_a_deviation_is_relative_to_the_largest_of_its_kind_and_names_its_place() -> None:
    one = {"losses/each step": np.array([2.0, 4.0]), "weights/a": np.ones(3), "weights/b": np.array([10.0])}
    other = {**one, "losses/each step": np.array([2.0, 4.4]), "weights/a": np.array([1.0, 1.0, 0.5])}
    found = compare(one, other, 2)
    assert found.deviations == {"losses": pytest.approx(0.1), "weights": pytest.approx(0.05)}
    assert found.worst["weights"] == "a"
    assert found.within(0.2)
    assert not found.within(0.06)
    assert not compare(one, {**one, "weights/a": np.array([1, np.nan, 1])}, 2).within(1e9)
    assert not compare(one, {**one, "weights/a": np.ones(4)}, 2).within(1e9)
    assert "weights/b" in compare(one, {k: v for k, v in one.items() if k != "weights/b"}, 2).error


def test_numbers_of_processes_are_checked() -> None:
    assert chosen_worlds("1,2,4") == [1, 2, 4]
    for text in ("", "1", "0,2", "two", "1,2,1000"):
        with pytest.raises(InputError, match="--procs"):
            chosen_worlds(text)
