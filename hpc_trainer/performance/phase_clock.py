"""Times and memory of the stages of training steps on one rank, and the times as a trace in Chrome's format."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fl_core.runtime.machine import resident_bytes
from fl_core.storage import atomic
from hpc_trainer import phases

GRADIENTS_WAIT = "gradients_wait"  # the end of the backward pass: own gradients are done, others' are awaited


class EnoughSteps(Exception):
    """Raised on every rank where the next step would begin."""


@dataclass
class Step:
    """began, and (stage, begin, end) in seconds of the monotonic clock; memory: the most that each stage held above ``base``, what was
    held when the step began."""

    began: float
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    base: int = 0
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Up to the optimiser's end: evaluation and checkpoints come after the step."""
        return max((end for name, _, end in self.spans if name == phases.OPTIMIZER), default=self.began) - self.began

    def of(self, stage: str) -> float:
        return sum(end - begin for name, begin, end in self.spans if name == stage)


class PeakMemory:
    """The most bytes held since the last reset: resident ones of the process (Linux), or torch's on a GPU."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else resident_bytes()

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else resident_bytes("VmHWM")


class PhaseClock:
    """``Trainer(phase=clock)``. The backward stage is split where this rank's last gradient is done."""

    def __init__(self, limit: int, *, memory: bool = False) -> None:
        self.limit = limit
        self.steps: list[Step] = []
        self._memory = PeakMemory() if memory else None
        self._last_gradient = 0.0

    def watch(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient)

    def _gradient(self, parameter: Tensor) -> None:
        self._last_gradient = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if name == phases.INPUT:
            if len(self.steps) == self.limit:
                raise EnoughSteps
            self.steps.append(Step(time.perf_counter(), base=self._memory.now() if self._memory else 0))
        step = self.steps[-1]
        if self._memory:
            self._memory.reset()
        begin = time.perf_counter()
        yield
        end = time.perf_counter()
        if self._memory:
            step.memory[name] = max(step.memory.get(name, 0), self._memory.peak() - step.base)
        if name == phases.BACKWARD and begin < self._last_gradient < end:
            step.spans += [(name, begin, self._last_gradient), (GRADIENTS_WAIT, self._last_gradient, end)]
        else:
            step.spans.append((name, begin, end))

    def document(self, skip: int) -> dict[str, Any]:
        """Seconds of each stage of each step after the first ``skip``, and of whole steps."""
        kept = [s for s in self.steps[skip:] if s.seconds]
        stages = dict.fromkeys(name for s in kept for name, _, _ in s.spans)
        return {"steps": [s.seconds for s in kept], "stages": {n: [s.of(n) for s in kept] for n in stages}}

    def write_trace(self, path: Path, rank: int) -> None:
        """To be opened in chrome://tracing or Perfetto: one process a rank, microseconds."""
        events: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        ]
        for number, step in enumerate(self.steps):
            for name, begin, end in step.spans:
                event = {"name": name, "ph": "X", "pid": rank, "tid": 0, "args": {"step": number}}
                events.append({**event, "ts": begin * 1e6, "dur": (end - begin) * 1e6})
        atomic.write_json(path, {"traceEvents": events, "displayTimeUnit": "ms"})
