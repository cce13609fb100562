"""Batches made ahead by a thread, in the same order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

T = TypeVar("T")
M = TypeVar("M")


def ahead(items: Iterable[T], make: Callable[[T], M], depth: int) -> Iterator[tuple[T, Callable[[], M]]]:
    """Each item with a function that gives ``make(item)``; while an item is used, the ``depth`` next are being made."""
    if depth == 0:
        for item in items:
            yield item, partial(make, item)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting: deque[tuple[T, Future[M]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(make, item)))
                if len(waiting) > depth:
                    first, made = waiting.popleft()
                    yield first, made.result
            while waiting:
                first, made = waiting.popleft()
                yield first, made.result
        finally:
            for _, made in waiting:
                made.cancel()
