"""Networks from problem to design: a U-Net (Ronneberger et al. 2015; 3-D: Çiçek et al. 2016), and residual blocks that work in
space and on low cosine modes (after the Fourier neural operator, Li et al. 2021; cosines since the box is not periodic).

Both take any grid that their halvings divide, with the same weights. The last step fills exactly the wanted volume.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from applications.topology_optimisation import pipeline
from applications.topology_optimisation.config import Config, ModelConfig
from fl_core.learning.normalization import norm

BISECTIONS, NEWTON_STEPS = 18, 2
SOLID = 24.0  # a logit from which an element is solid, or void below its negative, to the last bit
NODE_CHANNELS = 8  # force, its size, held directions, volume fraction
MAX_CHANNELS = 16  # times the width


def average(x: Tensor) -> Tensor:
    """(N, D, H, W) -> (N, 1, 1, 1), axis by axis: float32 sums over a whole fine grid are 1e-4 off in some runtimes."""
    for axis in (3, 2, 1):
        x = x.mean(dim=axis, keepdim=True)
    return x


def fill(logits: Tensor, fraction: Tensor) -> Tensor:
    """(N, D, H, W), (N,) -> densities sigmoid(logits + shift) whose mean is ``fraction``.

    The shift is found by bisection without gradients; the Newton steps that end it carry the gradient of the constraint.
    """
    wanted = fraction.reshape(-1, 1, 1, 1).to(logits.dtype)
    fixed = logits.detach()  # and so nothing here is kept for gradients
    low = -fixed.amax(dim=(1, 2, 3), keepdim=True) - SOLID  # all void
    high = -fixed.amin(dim=(1, 2, 3), keepdim=True) + SOLID  # all solid
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        over = average(torch.sigmoid(fixed + middle)) > wanted
        high = torch.where(over, middle, high)
        low = torch.where(over, low, middle)
    shift = (low + high) / 2
    for _ in range(NEWTON_STEPS):
        density = torch.sigmoid(logits + shift)
        slope = average(density * (1 - density))
        shift = shift - (average(density) - wanted) / (slope + 1e-6)
    return torch.sigmoid(logits + shift)


class Convolution(nn.Sequential):
    def __init__(self, source: int, target: int, kind: str, *, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(source, target, 3, stride=stride, padding=1, bias=kind == "none"), norm(kind, target, dims=3)
        )


class Block(nn.Module):
    """A residual pair of 3 x 3 x 3 convolutions."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.first, self.second = Convolution(channels, channels, kind), Convolution(channels, channels, kind)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class CosineBlock(nn.Module):
    """A residual block: channels mixed mode by mode over the lowest cosines of each axis, beside a 3 x 3 x 3 convolution."""

    def __init__(self, channels: int, modes: int, kind: str) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(modes**3, channels, channels) / math.sqrt(channels))
        self.local = Convolution(channels, channels, kind)
        self.mix = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        channels, *sides = x.shape[1:]
        bases = [cosines(side, self.modes, x) for side in sides]
        low = x
        for basis in bases:  # each pass turns the first axis into modes and moves it to the end
            low = torch.movedim(torch.movedim(low, 2, -1) @ basis, -1, -1)
        mixed = torch.matmul(low.reshape(-1, channels, self.modes**3).permute(2, 0, 1), self.weight)
        wide = mixed.permute(1, 2, 0).reshape(-1, channels, self.modes, self.modes, self.modes)
        for basis in bases:
            wide = torch.movedim(wide, 2, -1) @ basis.T
        return torch.relu(x + self.mix(torch.relu(wide + self.local(x))))


def cosines(side: int, modes: int, like: Tensor) -> Tensor:
    """(side, modes): the first vectors of the orthonormal discrete cosine transform (DCT-II)."""
    at = torch.arange(side, dtype=like.dtype, device=like.device) + 0.5
    order = torch.arange(modes, dtype=like.dtype, device=like.device)
    table = torch.cos(math.pi / side * at[:, None] * order[None, :]) * math.sqrt(2 / side)
    scale = torch.where(order == 0, math.sqrt(0.5), 1.0).to(like.dtype)
    return table * scale * (order < side).to(like.dtype)


def node_fields(force: Tensor, fixed: Tensor, fraction: Tensor) -> Tensor:
    """(N, 8, elements...): the means over each element's nodes of force, its size and held directions; the volume fraction."""
    held = fixed.to(force.dtype)
    size = torch.sqrt((force * force).sum(dim=1, keepdim=True) + 1e-12)
    fields = torch.cat([force, size, held], dim=1)
    # pooling by 2 and 1, written as a convolution: runtimes are slow at pooling in three dimensions
    each = torch.eye(fields.shape[1], dtype=force.dtype, device=force.device)[..., None, None, None].expand(
        -1, -1, 2, 2, 2
    )
    cells = functional.conv3d(fields, each / 4)
    volume = fraction.reshape(-1, 1, 1, 1, 1).to(force.dtype) + torch.zeros_like(cells[:, :1])
    return torch.cat([cells, volume], dim=1)


class Designer(nn.Module):
    """force, fixed, volume_fraction, response -> density (N, D, H, W).

    Only the first and the last convolution see the finest grid; the body works on the grid half as fine.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        m = config.model
        side = pipeline.response_size(config)
        self.halved = bool(side) and side != config.data.size
        extra = pipeline.RESPONSE_CHANNELS if side else 0
        inner = 2 * m.width
        self.enter = Convolution(NODE_CHANNELS + (0 if self.halved else extra), inner, m.norm, stride=2)
        self.enter_response = nn.Conv3d(extra, inner, 1, bias=False) if self.halved else None
        self.body: nn.Module = UNet(inner, m) if m.architecture == "unet" else Spectral(inner, m)
        self.up = nn.ConvTranspose3d(inner, m.width, 2, stride=2)
        self.recall = nn.Conv3d(NODE_CHANNELS, m.width, 1)  # of the problem, without the price of a wide convolution
        self.leave = Convolution(m.width, m.width, m.norm)
        self.head = nn.Conv3d(m.width, 1, 1)
        self.sharpness = m.sharpness

    def forward(self, force: Tensor, fixed: Tensor, volume_fraction: Tensor, response: Tensor | None = None) -> Tensor:
        nodes = node_fields(force, fixed, volume_fraction)
        if response is None or self.enter_response is not None:
            x = self.enter(nodes)
        else:
            x = self.enter(torch.cat([nodes, response], dim=1))
        if response is not None and self.enter_response is not None:
            x = x + self.enter_response(response)
        x = torch.relu(self.up(self.body(torch.relu(x))) + self.recall(nodes))
        x = torch.relu(self.leave(x))
        logits = self.head(x).squeeze(1)
        return fill(logits if self.training else self.sharpness * logits, volume_fraction)


class UNet(nn.Module):
    def __init__(self, width: int, m: ModelConfig) -> None:
        super().__init__()
        widths = [width * min(2**k, MAX_CHANNELS) for k in range(m.depth + 1)]
        self.first = Block(width, m.norm)
        self.down, self.encode, self.up, self.decode = (nn.ModuleList() for _ in range(4))
        for fine, coarse in itertools.pairwise(widths):
            self.down.append(nn.Sequential(Convolution(fine, coarse, m.norm, stride=2), nn.ReLU()))
            self.encode.append(Block(coarse, m.norm))
            self.up.append(nn.ConvTranspose3d(coarse, fine, 2, stride=2))
            self.decode.append(nn.Sequential(Convolution(2 * fine, fine, m.norm), nn.ReLU(), Block(fine, m.norm)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        kept = []
        for down, encode in zip(self.down, self.encode, strict=True):
            kept.append(x)
            x = encode(down(x))
        for i in reversed(range(len(self.up))):
            x = self.decode[i](torch.cat([kept.pop(), self.up[i](x)], dim=1))
        return x


class Spectral(nn.Sequential):
    def __init__(self, width: int, m: ModelConfig) -> None:
        super().__init__(*(CosineBlock(width, m.modes, m.norm) for _ in range(m.depth)))


def build_model(config: Config) -> nn.Module:
    torch.manual_seed(0)
    return Designer(config)
