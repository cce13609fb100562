"""The clients of a simulation by number: names and examples are made when they are asked for, never all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, overload, runtime_checkable

import numpy as np

from fl_core.learning.examples import Examples


@runtime_checkable
class Population(Protocol):
    """``len`` clients, numbered in the sorted order of their names."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def find(self, name: str) -> int:
        """The number of this client. Raises KeyError."""

    def size(self, index: int) -> int:
        """How many examples it has, or about as many: what its time is predicted from."""

    def examples(self, index: int) -> Examples: ...


class Names(Sequence[str]):
    """The sorted names of a population, without a list of them in memory."""

    is_sorted = True

    def __init__(self, population: Population) -> None:
        self._population = population

    def __len__(self) -> int:
        return len(self._population)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._population.name(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._population.name(index % len(self))

    def __iter__(self) -> Iterator[str]:
        return (self._population.name(i) for i in range(len(self)))

    def __contains__(self, name: object) -> bool:
        try:
            self._population.find(str(name))
        except KeyError:
            return False
        return True


class ExamplesPopulation:
    """The clients of examples in memory. Each client's part is a view of arrays that are sorted by client."""

    def __init__(self, examples: Examples, names: Sequence[str]) -> None:
        owners = examples.columns["client"]
        if len(owners) and np.any(owners[1:] < owners[:-1]):
            examples = examples.take(np.argsort(owners, kind="stable"))
            owners = examples.columns["client"]
        self._examples, self._names = examples, sorted(names)
        wanted = np.array(self._names, dtype=owners.dtype if len(owners) else np.str_)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._first: list[int] = np.searchsorted(owners, wanted, side="left").tolist()
        self._end: list[int] = np.searchsorted(owners, wanted, side="right").tolist()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def find(self, name: str) -> int:
        return self._numbers[name]

    def size(self, index: int) -> int:
        return self._end[index] - self._first[index]

    def examples(self, index: int) -> Examples:
        return self._examples.take(slice(self._first[index], self._end[index]))


class GeneratedPopulation:
    """``count`` clients whose examples ``make(number)`` gives: the same ones for the same number, in any process.

    Their names are ``prefix`` and the number, with zeros in front, so that names sort as numbers do.
    """

    def __init__(
        self, count: int, make: Callable[[int], Examples], *, size: int, prefix: str = "client-", digits: int = 0
    ) -> None:
        self._count, self._make, self._size, self._prefix = count, make, size, prefix
        self._digits = max(digits, len(str(max(0, count - 1))))

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"{self._prefix}{index:0{self._digits}}"

    def find(self, name: str) -> int:
        number = name.removeprefix(self._prefix)
        if name.startswith(self._prefix) and number.isascii() and number.isdigit():
            index = int(number)
            if index < self._count and self.name(index) == name:
                return index
        raise KeyError(name)

    def size(self, index: int) -> int:
        return self._size

    def examples(self, index: int) -> Examples:
        return self._make(index)
