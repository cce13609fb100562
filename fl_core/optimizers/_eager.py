"""torch's optimisers without the import of its compiler.

torch 2.13 imports ``torch._dynamo`` (with sympy: one to two seconds of processor time, 70 MB) when the first optimiser is made and
at its first step, and where its state is read, so that ``torch.compile`` would not trace into them. Nothing here compiles optimisers: a device that
trains, a simulation's first round and the trainer start without it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


@functools.cache
def eager(kind: type[Kind]) -> type[Kind]:
    """The same class, with the methods that it would wrap as they were written; a torch that wraps none gives the same."""
    step: Callable[..., Any] = inspect.unwrap(kind.step)
    add: Callable[..., Any] = inspect.unwrap(kind.add_param_group)
    clear: Callable[..., Any] = inspect.unwrap(kind.zero_grad)
    read: Callable[..., Any] = inspect.unwrap(kind.state_dict)
    write: Callable[..., Any] = inspect.unwrap(kind.load_state_dict)

    class Eager(kind):  # type: ignore[valid-type, misc]
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            with torch.no_grad():
                return step(self, closure)

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            add(self, param_group)

        def zero_grad(self, set_to_none: bool = True) -> None:
            clear(self, set_to_none)

        def state_dict(self) -> dict[str, Any]:
            found: dict[str, Any] = read(self)
            return found

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            write(self, state_dict)

    Eager.__name__, Eager.__qualname__, Eager.__doc__ = kind.__name__, kind.__qualname__, kind.__doc__
    return cast(type[Kind], Eager)
