"""A small residual network (He et al., CVPR 2016) of plain convolutions and ReLU, which int8 hardware runs well."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from applications.plant_disease.config import Config
from fl_core.learning.normalization import norm

STAGES = (1, 2, 4, 8)  # channels of each stage, as multiples of the width


def _convolution(source: int, target: int, kernel: int, stride: int, kind: str) -> nn.Sequential:
    padding = (kernel - 1) // 2
    return nn.Sequential(
        nn.Conv2d(source, target, kernel, stride=stride, padding=padding, bias=kind == "none"),
        norm(kind, target, dims=2),
    )


class Block(nn.Module):
    """Residual pair of 3 x 3 convolutions over (N, C, H, W)."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.first = _convolution(channels, channels, 3, 1, kind)
        self.second = _convolution(channels, channels, 3, 1, kind)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Histograms(nn.Module):
    """(N, 3, H, W) colours in [0, 1] -> (N, 7 x bins): square roots of soft histograms of the channels, of their shares of the sum,
    and of the gradient's strength. Triangular bins, so that each value counts in the two nearest."""

    centres: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.register_buffer("centres", torch.linspace(0, 1, bins).view(1, 1, bins, 1), persistent=False)

    def forward(self, colour: Tensor) -> Tensor:
        half = functional.avg_pool2d(colour, 2)
        share = half / (half.sum(dim=1, keepdim=True) + 0.01)
        grey = half.mean(dim=1, keepdim=True)
        down, right = grey[:, :, 1:, :-1] - grey[:, :, :-1, :-1], grey[:, :, :-1, 1:] - grey[:, :, :-1, :-1]
        strength = torch.sqrt((down.abs() + right.abs()).clamp(max=1.0) + 1e-6)
        found = [self.soft(v) for v in (half, share, strength)]
        return torch.sqrt(torch.cat(found, dim=1) + 1e-4)

    def soft(self, values: Tensor) -> Tensor:
        flat = values.flatten(2).unsqueeze(2)
        near = (1 - (flat - self.centres.to(values.dtype)).abs() * (self.bins - 1)).clamp(min=0)
        return near.mean(dim=3).flatten(1)


def symmetric(image: Tensor, count: int) -> Tensor:
    """(N, C, S, S) -> (count N, C, S, S): the images, then their mirror images left to right, both top to bottom, all of them transposed."""
    if count >= 2:
        image = torch.cat([image, image.flip(3)])
    if count >= 4:
        image = torch.cat([image, image.flip(2)])
    if count >= 8:
        image = torch.cat([image, image.transpose(2, 3)])
    return image


class LeafNet(nn.Module):
    """image (N, H, W, 3) uint8 -> logits (N, classes). Scaling of the pixels is part of the graph.

    A leaf has no upper side: in evaluation, and so on devices, the features are the mean over ``symmetries`` mirror images and turns.
    """

    def __init__(self, classes: int, width: int, blocks: int, kind: str, bins: int = 0, symmetries: int = 1) -> None:
        super().__init__()
        self.symmetries = symmetries
        stages: list[nn.Module] = []
        source = 3
        for number, multiple in enumerate(STAGES):
            target = multiple * width
            kernel = 4 if number == 0 else 3
            stages += [_convolution(source, target, kernel, 2, kind), nn.ReLU()]
            stages += [Block(target, kind) for _ in range(blocks if number else 0)]  # the first stage is the dear one
            source = target
        self.stages = nn.Sequential(*stages)
        self.histograms = Histograms(bins) if bins else None
        self.head = nn.Linear(2 * source + 7 * bins, classes)

    def features(self, image: Tensor) -> Tensor:
        """(N, 2 x channels): mean and maximum over the image; small lesions show in the second. Then the histograms, if any."""
        pixels = image.permute(0, 3, 1, 2).to(self.head.weight.dtype)
        if self.training or self.symmetries == 1:
            return self._features(pixels)
        found = self._features(symmetric(pixels, self.symmetries))
        return found.view(self.symmetries, -1, found.shape[1]).mean(dim=0)

    def _features(self, pixels: Tensor) -> Tensor:
        maps = self.stages(pixels * (1 / 64) - 2)
        found = [maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))]
        if self.histograms is not None:
            found.append(self.histograms(pixels * (1 / 255)))
        return torch.cat(found, dim=1)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(image))
        return logits


def build_model(config: Config) -> nn.Module:
    torch.manual_seed(0)
    m = config.model
    return LeafNet(len(config.data.classes), m.width, m.blocks, m.norm, m.colour_bins, m.symmetries)
