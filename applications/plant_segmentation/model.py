"""A compact U-Net (Ronneberger et al., MICCAI 2015), fully convolutional: most of it works at half resolution and below."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from applications.plant_segmentation.config import Config
from applications.plant_segmentation.pipeline import MAPS
from fl_core.learning.normalization import norm

FULL, LAST = 8, 12  # channels at full resolution, where each costs most


def block(channels: tuple[int, ...], kind: str) -> nn.Sequential:
    """Convolutions of width 3, each followed by normalisation and ReLU."""
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(channels):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=kind == "none"), norm(kind, o, dims=2), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class PlantNet(nn.Module):
    """image (N, H, W, 3) uint8 -> maps (N, 4, H, W); sides are multiples of 2^levels. Scaling of the pixels is in the graph."""

    def __init__(self, width: int, levels: int, kind: str) -> None:
        super().__init__()
        w = [width * 2**k for k in range(levels)]
        self.full = block((3, FULL), kind)
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList([block((FULL, w[0], w[0]), kind)])
        self.down.extend(block((w[k - 1], w[k], w[k]), kind) for k in range(1, levels))
        self.raise_ = nn.ModuleList(nn.ConvTranspose2d(w[k + 1], w[k], 2, stride=2) for k in range(levels - 1))
        self.up = nn.ModuleList(block((2 * w[k], w[k], w[k]), kind) for k in range(levels - 1))
        self.last = nn.ConvTranspose2d(w[0], FULL, 2, stride=2)
        self.join = block((2 * FULL, LAST), kind)
        self.head = nn.Conv2d(LAST, MAPS, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.full(image.permute(0, 3, 1, 2).to(self.head.weight.dtype) * (1 / 64) - 2)
        fine, kept = x, []
        for down in self.down:
            x = down(self.pool(x))
            kept.append(x)
        for k in range(len(self.up) - 1, -1, -1):
            x = self.up[k](torch.cat([kept[k], self.raise_[k](x)], dim=1))
        maps: Tensor = self.head(self.join(torch.cat([fine, self.last(x)], dim=1)))
        return maps


def receptive_radius(levels: int) -> int:
    """How many pixels to each side an output can depend on: a tile's exact margin, rounded up to the coarsest grid.

    Counted from the output back: two convolutions at full resolution, two (at the bottom) or four a level below, and what
    pooling and transposed convolutions of width 2 add, at most one pixel of the finer level each.
    """
    reach = 2
    for k in range(1, levels + 1):
        reach += (2 if k == levels else 4) * 2**k + 2 * 2 ** (k - 1)
    step: int = 2**levels
    return -(-reach // step) * step


def build_model(config: Config) -> nn.Module:
    torch.manual_seed(0)
    return PlantNet(config.model.width, config.model.levels, config.model.norm)
