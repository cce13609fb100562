"""The one place for torch's private memory tools: what a training step would hold, without allocating it.

A contract test fails where a new version of torch moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

KINDS = {
    "PARAM": "parameters",
    "BUFFER": "parameters",
    "GRAD": "gradients",
    "ACT": "activations",
    "TEMP": "temporaries",
    "OPT": "optimizer",
    "OTH": "inputs",
}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass
class Tracked:
    """Bytes by kind at the highest point of a forward and backward pass, and the operations of both."""

    peak: dict[str, int] = field(default_factory=dict)
    forward_flops: int = 0
    backward_flops: int = 0

    @property
    def total(self) -> int:
        return sum(self.peak.values())


@contextmanager
def unallocated() -> Iterator[None]:
    """Tensors made in here have shapes and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


class _Scratch(TorchDispatchMode):
    """What convolutions hold inside themselves on a processor: oneDNN copies operands into its own blocked layout.

    Told by no tensor. Where channels lie together (channels_last) it reads inputs as they are and copies weights alone;
    elsewhere inputs and gradients too.
    """

    def __init__(self, tracker: MemTracker, device: str) -> None:
        super().__init__()
        self.tracker, self.device = tracker, device
        self.peak: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.device == "cpu" and name == "convolution":
            self._note(_forward_copies(args[0], args[1], result))
        elif self.device == "cpu" and name == "convolution_backward":
            self._note(_backward_copies(*args[:3]))
        return result

    def _note(self, held: int) -> None:
        now = snapshot(self.tracker, "current")
        now["temporaries"] = now.get("temporaries", 0) + held
        if sum(now.values()) > sum(self.peak.values()):
            self.peak = now


def _forward_copies(source: Tensor, weight: Tensor, result: Tensor) -> int:
    """Beside operands and result: the weights put channels last and blocked; else input and weights blocked, and after
    them the result before it is unblocked."""
    if _channels_last(source) or _channels_last(weight):
        return 2 * _bytes(weight) + _uncommon(source)
    return max(_bytes(source) + _bytes(weight), _bytes(result))


def _backward_copies(gradient: Tensor, source: Tensor, weight: Tensor) -> int:
    """Beside operands and both gradients: the weights as in the forward pass and their gradient blocked; else both operands
    of the weights' gradient blocked, and after them that gradient."""
    if _channels_last(source) or _channels_last(weight):
        return 3 * _bytes(weight) + _uncommon(source) + _uncommon(gradient)
    return max(_bytes(source) + _bytes(gradient), _bytes(weight))


def _channels_last(value: Tensor) -> bool:
    layout = CHANNELS_LAST.get(value.dim())
    return layout is not None and value.is_contiguous(memory_format=layout) and not value.is_contiguous()


def _uncommon(value: Tensor) -> int:
    """Bytes of a copy with channels last, where they are not yet."""
    return 0 if value.is_contiguous(memory_format=CHANNELS_LAST[value.dim()]) else _bytes(value)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def snapshot(tracker: MemTracker, when: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for device in tracker.get_tracker_snapshot(when).values():
        for kind, amount in device.items():
            name = KINDS.get(str(kind).rpartition(".")[2])
            if name:
                found[name] = found.get(name, 0) + int(amount)
    return found


def track(
    model: nn.Module,
    inputs: list[Tensor],
    targets: Tensor,
    loss: Callable[[Any, Tensor], tuple[Tensor, Tensor]],
    device: str,
) -> Tracked:
    """One forward and backward pass of ``loss``; all tensors are made by ``unallocated()``."""
    tracker = MemTracker()
    tracker.track_external(model, *inputs, targets)
    with tracker, _Scratch(tracker, device) as scratch:
        numerator, denominator = loss(model(*inputs), targets)
        (numerator / denominator.detach()).backward()
    del numerator, denominator
    model.zero_grad()
    with FlopCounterMode(display=False) as forward:  # on its own: it takes some kernels apart, which then hold more
        numerator, denominator = loss(model(*inputs), targets)
    with FlopCounterMode(display=False) as backward:
        (numerator / denominator.detach()).backward()
    peak = snapshot(tracker, "peak")
    if sum(scratch.peak.values()) > sum(peak.values()):
        peak = scratch.peak
    return Tracked(peak, forward.get_total_flops(), backward.get_total_flops())


def elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def element_size(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()
