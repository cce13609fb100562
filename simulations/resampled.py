"""Populations of any size over the examples of an application: each client draws its own from them, when it is asked for.

    --population 1000000:size=30,alpha=0.3

Client number i draws the shares of its labels from Dirichlet(alpha L p), with L labels and p their shares in all examples (Hsu et
al. 2019; where labels are equally frequent, Dirichlet(alpha)), then its examples with
replacement: the same ones for the same seed, in any process. Memory does not grow with the population. What is learned does
not either: there is no more in a million such clients than in the examples that they draw from. It is for the
behaviour of rounds, selection and engines at size.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fl_core.contracts.config import number, parse
from fl_core.contracts.errors import ConfigError, InputError
from fl_core.learning import seeding
from fl_core.learning.examples import Examples
from simulations.partitioners.base import label_numbers

PREFIX = "client-"
MOST = 10**9


@dataclass(frozen=True, kw_only=True)
class Options:
    """size: examples of a client (the median, with a spread); alpha: small = few labels each, 0 = all alike; spread: of the
    logarithm of sizes.
    """

    clients: int = number(1000, low=1, high=MOST)
    size: int = number(30, low=1, high=1_000_000)
    alpha: float = number(0.5, low=0.0, high=1e6)
    spread: float = number(0.0, low=0.0, high=3.0)


def read_spec(spec: str) -> Options:
    """ "N" or "N:KEY=VALUE,...". Raises ConfigError."""
    count, _, rest = spec.partition(":")
    if not count.isascii() or not count.isdigit():
        raise ConfigError(
            f"--population {spec}: {count!r} is no number of clients", remedy="--population 1000000:size=30"
        )
    table: dict[str, object] = {"clients": int(count)}
    for item in filter(None, rest.split(",")):
        key, equals, raw = item.partition("=")
        if not equals or key.strip() == "clients":
            raise ConfigError(f"--population {spec}: {item!r} is not size=, alpha= or spread=")
        try:
            table[key.strip()] = tomllib.loads(f"v = {raw.strip()}")["v"]
        except tomllib.TOMLDecodeError:
            table[key.strip()] = raw.strip()
    found: Options = parse(Options, table, origin=f"--population {spec}")
    return found


class ResampledPopulation:
    """A ``Population``: see the module."""

    def __init__(self, examples: Examples, options: Options, seed: int) -> None:
        if not len(examples):
            raise InputError("--population: there are no examples to draw from")
        self._options, self._seed, self._examples = options, seed, examples
        labels = label_numbers(examples)
        self._order = np.argsort(labels, kind="stable")
        self._counts = np.bincount(labels)
        self._starts = np.cumsum(self._counts) - self._counts
        self._digits = max(7, len(str(options.clients - 1)))

    def __len__(self) -> int:
        return self._options.clients

    def name(self, index: int) -> str:
        return f"{PREFIX}{index:0{self._digits}}"

    def find(self, name: str) -> int:
        rest = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and rest.isascii() and rest.isdigit():
            index = int(rest)
            if index < len(self) and self.name(index) == name:
                return index
        raise KeyError(name)

    def size(self, index: int) -> int:
        if not self._options.spread:
            return self._options.size
        draw = seeding.generator(self._seed, "population size", index).normal(0.0, self._options.spread)
        return max(1, round(self._options.size * float(np.exp(draw))))

    def examples(self, index: int) -> Examples:
        rows = self._rows(seeding.generator(self._seed, "population", index), self.size(index))
        found = self._examples.take(rows)
        ids = np.char.add(found.columns["example_id"].astype(str), [f"#{place}" for place in range(len(rows))])
        owner = np.full(len(rows), self.name(index))
        return Examples(found.inputs, found.targets, {**found.columns, "client": owner, "example_id": ids})

    def _rows(self, rng: np.random.Generator, size: int) -> npt.NDArray[np.int64]:
        shares = self._counts / self._counts.sum()
        if self._options.alpha:
            present = np.flatnonzero(shares)
            drawn = rng.dirichlet(np.maximum(self._options.alpha * len(present) * shares[present], 1e-6))
            shares = np.zeros_like(shares)
            shares[present] = drawn if np.isfinite(drawn).all() else 1.0 / len(present)
        parts = [
            self._order[self._starts[label] + rng.integers(0, self._counts[label], count)]
            for label, count in enumerate(rng.multinomial(size, shares / shares.sum()).tolist())
            if count
        ]
        found: npt.NDArray[np.int64] = rng.permutation(np.concatenate(parts))
        return found
