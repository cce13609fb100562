"""Clients that draw their examples when they are asked for: repeatable, skewed as asked, a million of them from the command."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from fieldfleet.__main__ import main as command
from fl_core.contracts.errors import ConfigError, InputError
from simulations.resampled import Options, ResampledPopulation, read_spec
from tests.unit.simulations.test_partitioners import table


def skew(alpha: float) -> float:
    """Mean total variation distance between a client's labels and those of all examples."""
    examples = table(2000)
    whole = np.bincount(examples.targets, minlength=5) / 2000
    made = ResampledPopulation(examples, Options(clients=60, size=200, alpha=alpha), 3)
    shares = [np.bincount(made.examples(i).targets, minlength=5) / 200 for i in range(60)]
    return float(np.mean([np.abs(share - whole).sum() / 2 for share in shares]))


def test_clients_are_the_same_in_every_process_and_differ_from_each_other() -> None:
    made = ResampledPopulation(table(300), Options(clients=10**6, size=20), 1)
    other = pickle.loads(pickle.dumps(ResampledPopulation(table(300), Options(clients=10**6, size=20), 1)))
    for index in (0, 999_999):
        one, two = made.examples(index), other.examples(index)
        np.testing.assert_array_equal(one.columns["example_id"], two.columns["example_id"])
        assert set(one.columns["client"]) == {made.name(index)}
        assert len(set(one.columns["example_id"])) == len(one) == made.size(index) == 20
        assert made.find(made.name(index)) == index
    assert list(made.examples(1).columns["example_id"]) != list(made.examples(2).columns["example_id"])
    assert ResampledPopulation(table(300), Options(clients=9), 2).name(8) == "client-0000008"
    for wrong in ("client-0000009", "client-8", "other", "client-"):
        with pytest.raises(KeyError):
            ResampledPopulation(table(300), Options(clients=9), 2).find(wrong)


def test_labels_are_as_skewed_as_asked() -> None:
    assert skew(0.1) > 0.4 > skew(1.0) > skew(10.0) > skew(0.0)
    assert skew(0.0) < 0.06, "what 200 draws differ by"


def test_a_tiny_alpha_still_gives_examples() -> None:
    made = ResampledPopulation(table(50), Options(clients=5, size=7, alpha=1e-6), 0)
    assert [len(set(made.examples(i).targets.tolist())) for i in range(5)] == [1] * 5


def test_sizes_spread_around_the_median() -> None:
    made = ResampledPopulation(table(300), Options(clients=400, size=50, spread=0.7), 1)
    found = [made.size(i) for i in range(400)]
    assert found == [len(made.examples(i)) for i in range(400)]
    assert 40 < np.median(found) < 60
    assert min(found) < 20
    assert max(found) > 150


@pytest.mark.parametrize("spec", ["", "many", "-3", "10:size", "10:clients=3", "10:size=0", "10:weight=3", "0"])
def test_wrong_words_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="population"):
        read_spec(spec)


def test_nothing_to_draw_from() -> None:
    with pytest.raises(InputError, match="no examples"):
        ResampledPopulation(table(3).take(slice(0, 0)), Options(), 0)


def test_a_million_clients_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "toy_regression", "--rounds", "2", "--out", str(tmp_path / "run"), "--workers", "1", "--json"]
    words += ["--set", "algorithm.clients_per_round=20", "--set", "data.clients=6"]
    assert command([*words, "--population", "1000000:size=8,alpha=0"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["num_clients"], document["clients"]) == (1_000_000, [])
    assert len(document["history"][0]["clients"]) == 20
    assert document["held_out"], "of the data's own clients"
    assert document["metrics"]
    assert command([*words, "--population", "1000:size=8"]) != 0, "another population in the same folder"
    assert command([*words, "--population", "1000", "--partition", "iid"]) == 2
    assert "makes its own clients" in capsys.readouterr().err
