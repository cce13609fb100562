"""A small residual network (He et al., CVPR 2016) of plain convolutions and ReLU, which int8 hardware runs well."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


class LeafNet(nn.Module):
    """image (N, H, W, 3) uint8 -> logits (N, classes). Scaling of the pixels is part of the graph."""

    def __init__(self, classes: int, width: int, blocks: int, kind: str) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        source = 3
        for number, multiple in enumerate(STAGES):
            target = multiple * width
            kernel = 4 if number == 0 else 3
            stages += [_convolution(source, target, kernel, 2, kind), nn.ReLU()]
            stages += [Block(target, kind) for _ in range(blocks if number else 0)]  # the first stage is the dear one
            source = target
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(2 * source, classes)

    def features(self, image: Tensor) -> Tensor:
        """(N, 2 x channels): mean and maximum over the image; small lesions show in the second."""
        scaled = image.permute(0, 3, 1, 2).to(self.head.weight.dtype) * (1 / 64) - 2
        maps = self.stages(scaled)
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(image))
        return logits


def build_model(config: Config) -> nn.Module:
    torch.manual_seed(0)
    return LeafNet(len(config.data.classes), config.model.width, config.model.blocks, config.model.norm)
