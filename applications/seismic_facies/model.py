"""A U-Net over volumes (Çiçek et al., MICCAI 2016), and the same net over inline slices (Ronneberger et al., 2015).

The 2-D net takes and gives the same sub-volumes, but sees one inline at a time: what it cannot know is how the
neighbouring inlines go on. With sqrt(3) times the width it has as many parameters.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from applications.seismic_facies.config import Config, ModelConfig
from fl_core.learning.normalization import norm

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
CHANNELS_TOGETHER = {2: torch.channels_last, 3: torch.channels_last_3d}
CONVOLVE = {2: functional.conv2d, 3: functional.conv3d}
MEAN = {2: functional.avg_pool2d, 3: functional.avg_pool3d}
UP = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

LEAST_ENERGY = 1e-3  # of the squared gradient, of amplitudes with a root mean square of 1


def block(dims: int, channels: tuple[int, ...], kind: str, *, stride: int = 1) -> nn.Sequential:
    """Convolutions of width 3, each followed by normalisation and ReLU."""
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(channels):
        convolution = CONV[dims](i, o, 3, stride=stride, padding=1, bias=kind == "none")
        if kind == "none":  # nothing else keeps the size of what goes through (He et al. 2015)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        layers += [convolution, norm(kind, o, dims=dims), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def raised(dims: int, i: int, o: int, kind: str) -> nn.Module:
    """To twice the resolution; each output is a sum over ``i`` inputs, since steps and width are alike."""
    layer = UP[dims](i, o, 2, stride=2)
    if kind == "none":
        nn.init.normal_(layer.weight, std=i**-0.5)
    return layer


def energies(amplitude: Tensor) -> Tensor:
    """(N, 1, ...) -> (N, 1 + pairs, ...): the squared amplitude, and the products of its gradient's components, pair by pair."""
    dims = amplitude.dim() - 2
    kernel = amplitude.new_zeros(dims, 1, *[3] * dims)
    for axis in range(dims):
        for end in (0, 2):
            kernel[(axis, 0, *(end if a == axis else 1 for a in range(dims)))] = (end - 1) / 2
    gradient = CONVOLVE[dims](amplitude, kernel, padding=1)
    pairs = itertools.combinations_with_replacement(range(dims), 2)
    return torch.cat([amplitude**2, *(gradient[:, a : a + 1] * gradient[:, b : b + 1] for a, b in pairs)], dim=1)


def dips(means: Tensor) -> Tensor:
    """``energies`` averaged over neighbourhoods -> as many channels: the gradient structure tensor relative to its trace, without the
    last element (which the others tell), and the logarithms of the trace and of the energy.

    How steep reflections are and how much that varies is what interpreters look at (Chopra and Marfurt 2005); a network of sums
    and thresholds takes long to find it.
    """
    dims = means.dim() - 2
    pairs = list(itertools.combinations_with_replacement(range(dims), 2))
    trace = sum(
        (means[:, 1 + k : 2 + k] for k, (a, b) in enumerate(pairs) if a == b), start=torch.zeros_like(means[:, :1])
    )
    sizes = torch.log(torch.cat([trace, means[:, :1]], dim=1) + LEAST_ENERGY)
    return torch.cat([means[:, 1:-1] / (trace + LEAST_ENERGY), sizes / 4], dim=1)


class UNet(nn.Module):
    """amplitude (N, 1, D, H, W) -> logits (N, classes, D, H, W); sides are multiples of 2^(levels-1).

    Most of the time goes at full resolution, so there is one convolution on each side there instead of two. With ``stem`` 2
    there is none: the first convolution steps by two samples, the last one, transposed, gives each of the eight its logits.
    With ``attributes`` every level below full resolution is given ``dips`` at its own scale.
    """

    def __init__(self, classes: int, m: ModelConfig) -> None:
        super().__init__()
        dims, width, levels, kind, stem = m.dims, m.width, m.levels, m.norm, m.stem
        finest = stem - 1  # the first level with convolutions of its own
        self.dims, self.finest, self.attributes, self.classes = dims, finest, m.attributes, classes
        more = 1 + dims * (dims + 1) // 2 if m.attributes else 0
        w = [width * 2**k for k in range(levels)]
        self.pool = POOL[dims](2)
        if stem == 1:
            self.enter: nn.Module = nn.Identity()
            first, leave = block(dims, (1, w[0]), kind), [block(dims, (2 * w[0], w[0]), kind)]
            self.head: nn.Module = CONV[dims](w[0], classes, 1)
        else:
            self.enter = block(dims, (1, w[1]), kind, stride=2)
            first, leave = block(dims, (w[1] + more, w[1]), kind), []
            self.head = UP[dims](w[1], classes, 2, stride=2)
        self.down = nn.ModuleList([first])
        self.down.extend(block(dims, (w[k - 1] + more, w[k], w[k]), kind) for k in range(finest + 1, levels))
        self.raise_ = nn.ModuleList(raised(dims, w[k + 1], w[k], kind) for k in range(finest, levels - 1))
        self.up = nn.ModuleList(leave)
        self.up.extend(block(dims, (2 * w[k], w[k], w[k]), kind) for k in range(1, levels - 1))

    def forward(self, amplitude: Tensor) -> Tensor:
        if self.dims == 3:
            return self.net(amplitude)
        _, c, d, h, w = amplitude.shape
        slices = amplitude.transpose(1, 2).reshape(-1, c, h, w)
        return self.net(slices).reshape(-1, d, self.classes, h, w).transpose(1, 2)

    def net(self, x: Tensor) -> Tensor:
        kept = []
        x = x.clone(memory_format=CHANNELS_TOGETHER[self.dims])  # which processors' kernels like best
        means = energies(x) if self.attributes else x
        x = self.enter(x)
        for level, down in enumerate(self.down, start=self.finest):
            if level > self.finest:
                x = self.pool(x)
            if self.attributes and level:
                means = MEAN[self.dims](means, 2)
                x = torch.cat([x, dips(means)], dim=1)
            x = down(x)
            kept.append(x)
        for k in range(len(self.up) - 1, -1, -1):
            x = self.up[k](torch.cat([kept[k], self.raise_[k](x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def receptive_radius(m: ModelConfig) -> int:
    """How many samples to each side an output voxel can depend on: a tile's exact margin, a multiple of its alignment.

    Counted from the output back: convolutions of the way up and down at each level's spacing, plus what pooling and
    transposed convolutions of width 2 add, at most one sample of the finer level each.
    """
    levels, stem = m.levels, m.stem
    convolutions = [4] * levels
    convolutions[0], convolutions[-1] = 2, 2
    if stem == 2:
        convolutions[0] = 1
        convolutions[1] -= 1
    reach = sum(n * 2**k for k, n in enumerate(convolutions)) + sum(2 * 2 ** (k - 1) for k in range(stem, levels))
    step: int = 2 ** (levels - 1)
    radius: int = -(-reach // step) * step
    return radius


def build_model(config: Config) -> nn.Module:
    torch.manual_seed(0)
    return UNet(len(config.data.classes), config.model)
