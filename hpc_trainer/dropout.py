"""Dropout whose masks are keyed by (seed, epoch, sample), the layer and the element: never by process or batch.

torch draws masks from one stream a process, so that a sample's mask depends on who computes it and on what came before.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from fl_core.contracts.errors import ConfigError
from fl_core.learning.micro_batch import current

KINDS: dict[type[nn.Module], int] = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 1, nn.Dropout3d: 1}
OTHERS = (nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)
GOLDEN, FIRST, SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # as int64


def key_dropout(model: nn.Module, prefix: str = "") -> nn.Module:
    """Every dropout layer replaced, in place. Raises ConfigError for layers whose randomness cannot be keyed."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if type(child) in KINDS:
            setattr(model, name, KeyedDropout(child.p, path, channels=KINDS[type(child)] == 1))  # type: ignore[arg-type]
        elif isinstance(child, OTHERS) or (
            isinstance(child, (nn.RNNBase, nn.MultiheadAttention)) and child.dropout > 0
        ):
            raise ConfigError(
                f"{path} ({type(child).__name__}) draws random numbers by process, not by sample",
                remedy="use nn.Dropout layers, or set its dropout to 0",
            )
        else:
            key_dropout(child, f"{path}.")
    return model


class KeyedDropout(nn.Module):
    """(N, ...) -> the same shape; ``channels``: whole channels (N, C, ...) are dropped together.

    A layer that is called twice in one forward pass drops the same elements both times.
    """

    def __init__(self, p: float, name: str, *, channels: bool) -> None:
        super().__init__()
        self.p, self.channels = p, channels
        self.stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        if self.p == 1:
            return input * 0.0
        keys = current().keys
        if keys is None or len(keys) != len(input):
            raise ConfigError(
                "a dropout layer was called on something else than a batch of samples",
                remedy="its input's first dimension must be the batch",
            )
        shape = input.shape[1:2] if self.channels else input.shape[1:]
        each = torch.from_numpy(keys.view("int64").copy()).to(input.device) + self.stream
        place = torch.arange(math.prod(shape), device=input.device, dtype=torch.int64)
        kept = uniform(each[:, None] * GOLDEN + place * FIRST).ge(self.p).view(-1, *shape)
        mask = kept.view(*kept.shape, *(1,) * (input.dim() - kept.dim()))
        return input * (mask.to(input.dtype) / (1 - self.p))


def uniform(z: Tensor) -> Tensor:
    """int64 -> float64 in [0, 1) by the SplitMix64 finaliser (Steele et al., OOPSLA 2014); int64 wraps as uint64 does."""
    z = (_mixed(z, 30)) * FIRST
    z = (_mixed(z, 27)) * SECOND
    z = _mixed(z, 31)
    made: Tensor = ((z >> 11) & (2**53 - 1)).double() * 2.0**-53
    return made


def _mixed(z: Tensor, shift: int) -> Tensor:
    mixed: Tensor = z ^ ((z >> shift) & (2 ** (64 - shift) - 1))
    return mixed
