"""A U-Net over volumes (Çiçek et al., MICCAI 2016), and the same net over inline slices (Ronneberger et al., 2015).

The 2-D net takes and gives the same sub-volumes, but sees one inline at a time: what it cannot know is how the
neighbouring inlines go on. With sqrt(3) times the width it has as many parameters.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from applications.seismic_facies.config import Config
from fl_core.learning.normalization import norm

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
CHANNELS_TOGETHER = {2: torch.channels_last, 3: torch.channels_last_3d}
UP = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def block(dims: int, channels: tuple[int, ...], kind: str) -> nn.Sequential:
    """Convolutions of width 3, each followed by normalisation and ReLU."""
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(channels):
        layers += [CONV[dims](i, o, 3, padding=1, bias=kind == "none"), norm(kind, o, dims=dims), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """amplitude (N, 1, D, H, W) -> logits (N, classes, D, H, W); sides are multiples of 2^(levels-1).

    At full resolution, where most of the time goes, there is one convolution on each side instead of two.
    """

    def __init__(self, dims: int, classes: int, width: int, levels: int, kind: str) -> None:
        super().__init__()
        self.dims = dims
        w = [width * 2**k for k in range(levels)]
        self.pool = POOL[dims](2)
        self.down = nn.ModuleList([block(dims, (1, w[0]), kind)])
        self.down.extend(block(dims, (w[k - 1], w[k], w[k]), kind) for k in range(1, levels))
        self.raise_ = nn.ModuleList(UP[dims](w[k + 1], w[k], 2, stride=2) for k in range(levels - 1))
        self.up = nn.ModuleList([block(dims, (2 * w[0], w[0]), kind)])
        self.up.extend(block(dims, (2 * w[k], w[k], w[k]), kind) for k in range(1, levels - 1))
        self.head = CONV[dims](w[0], classes, 1)

    def forward(self, amplitude: Tensor) -> Tensor:
        if self.dims == 3:
            return self.net(amplitude)
        _, c, d, h, w = amplitude.shape
        slices = amplitude.transpose(1, 2).reshape(-1, c, h, w)
        return self.net(slices).reshape(-1, d, self.head.out_channels, h, w).transpose(1, 2)

    def net(self, x: Tensor) -> Tensor:
        kept = []
        x = x.clone(memory_format=CHANNELS_TOGETHER[self.dims])  # which processors' kernels like best
        for k, down in enumerate(self.down):
            x = down(x if k == 0 else self.pool(x))
            kept.append(x)
        for k in range(len(self.up) - 1, -1, -1):
            x = self.up[k](torch.cat([kept[k], self.raise_[k](x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def receptive_radius(levels: int) -> int:
    """How many samples to each side an output voxel can depend on: a tile's exact margin, a multiple of its alignment.

    Counted from the output back: convolutions of the way up and down at each level's spacing, plus what pooling and
    transposed convolutions of width 2 add, at most one sample of the finer level each.
    """
    reach = 0
    for k in range(levels):
        convolutions = 2 if k == levels - 1 else (2 if k == 0 else 4)
        reach += convolutions * 2**k
        if k:
            reach += 2 * 2 ** (k - 1)
    step: int = 2 ** (levels - 1)
    return -(-reach // step) * step


def build_model(config: Config) -> nn.Module:
    torch.manual_seed(0)
    m = config.model
    return UNet(m.dims, len(config.data.classes), m.width, m.levels, m.norm)
