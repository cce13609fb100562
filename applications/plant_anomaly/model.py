"""A convolutional autoencoder with a small bottleneck, a heat map of lesions, and a whitened latent vector.

The latent vector holds the smooth maximum of the heat, the error of the reconstruction and the mean of each bottleneck channel.
``head`` whitens it by the mean and covariance of healthy plants: algorithm ``statistics_head`` with ``algorithm.head_rule =
"whitening"`` computes them exactly, in one round, from sums that clients send. Until then it is the identity. The whitening is
triangular, so that its first outputs are the heat, and what the heat leaves unexplained of the error: evidence, of which less than
healthy plants have speaks for no disease and counts nothing, or little within ``model.evidence_margin``. The bottleneck's part counts by
its logarithm once it is as large as healthy plants make it: another place or light moves it further than a disease does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from applications.plant_anomaly.config import Config, ModelConfig
from applications.plant_anomaly.pipeline import EVIDENCE, latent_size
from fl_core.learning.normalization import norm


def layer(source: int, target: int, kind: str, stride: int = 1) -> nn.Sequential:
    kernel = 4 if stride == 2 else 3
    return nn.Sequential(
        nn.Conv2d(source, target, kernel, stride=stride, padding=1, bias=kind == "none"),
        norm(kind, target, dims=2),
        nn.ReLU(),
    )


class Block(nn.Module):
    """Residual pair of 3 x 3 convolutions."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.first = layer(channels, channels, kind)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=kind == "none"), norm(kind, channels, dims=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.first(x)))


class Whitening(nn.Module):
    """A linear layer that no gradient changes."""

    weight: Tensor
    bias: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(size))
        self.register_buffer("bias", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class AnomalyNet(nn.Module):
    """image (N, S, S, 3) uint8 -> reconstruction (N, 3, S, S), heat (N, 1, S, S), latent (N, D)."""

    evidence: Tensor

    def __init__(self, m: ModelConfig, size: int) -> None:
        super().__init__()
        self.knee, self.sharpness, self.margin = m.latent_knee, m.heat_sharpness, m.evidence_margin
        w, kind, blocks, latent = (m.width, 2 * m.width, 4 * m.width), m.norm, m.blocks, m.latent
        self.first = layer(3, w[0], kind, 2)
        self.second = nn.Sequential(layer(w[0], w[1], kind, 2), *(Block(w[1], kind) for _ in range(blocks)))
        self.third = nn.Sequential(layer(w[1], w[2], kind, 2), *(Block(w[2], kind) for _ in range(blocks)))
        self.bottleneck = nn.Conv2d(w[2], latent, 1)
        up = [nn.Conv2d(latent, w[2], 3, padding=1), nn.ReLU()]
        for source, target in ((w[2], w[1]), (w[1], w[0])):
            up += [nn.ConvTranspose2d(source, target, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*up, nn.ConvTranspose2d(w[0], 3, 4, stride=2, padding=1))
        self.raise_second = nn.ConvTranspose2d(w[2], w[1], 2, stride=2)
        self.join_second = layer(2 * w[1], w[1], kind)
        self.raise_first = nn.ConvTranspose2d(w[1], w[0], 2, stride=2)
        self.join_first = layer(2 * w[0], w[0], kind)
        self.fine = nn.ConvTranspose2d(w[0], 1, 2, stride=2)
        self.coarse = nn.ConvTranspose2d(latent, 1, 8, stride=8)
        self.head = Whitening(size)
        # The mean square of a healthy plant's latent vector stays 1, whatever the weights and the margin.
        weights = (m.heat_weight, m.error_weight)
        scale = math.sqrt(size / (size - len(weights) + sum(weights) * one_sided(self.margin)))
        parts = torch.full((size,), scale)
        parts[: len(weights)] *= torch.tensor(weights).sqrt()
        self.register_buffer("evidence", parts, persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = image.permute(0, 3, 1, 2).to(self.head.weight.dtype) * (1 / 64) - 2
        first = self.first(x)
        second = self.second(first)
        third = self.third(second)
        code = self.bottleneck(third)
        reconstruction = self.decoder(code)
        y = self.join_second(torch.cat([second, self.raise_second(third)], dim=1))
        y = self.join_first(torch.cat([first, self.raise_first(y)], dim=1))
        heat = self.fine(y) + self.coarse(code)
        error = torch.log((reconstruction - x).abs().mean(dim=(1, 2, 3)) + 1e-3)
        pixels = heat.flatten(1)
        highest = (torch.logsumexp(self.sharpness * pixels, dim=1) - math.log(pixels.shape[1])) / self.sharpness
        white = self.head(torch.cat([highest[:, None], error[:, None], code.mean(dim=(2, 3))], dim=1))
        code_part = white[:, EVIDENCE:]
        beyond = (code_part.square().mean(dim=1, keepdim=True) / self.knee).clamp(min=1.0)
        code_part = code_part * torch.sqrt((1 + torch.log(beyond)) / beyond)  # its square: the knee x (1 + log beyond)
        latent = torch.cat([torch.relu(white[:, :EVIDENCE] + self.margin), code_part], dim=1) * self.evidence
        return reconstruction, heat, latent


def one_sided(margin: float) -> float:
    """Mean square of max(0, z + margin) for a standard normal z: 1/2 without a margin."""
    below = 0.5 * (1 + math.erf(margin / math.sqrt(2)))
    return (1 + margin**2) * below + margin * math.exp(-0.5 * margin**2) / math.sqrt(2 * math.pi)


def build_model(config: Config) -> nn.Module:
    torch.manual_seed(0)
    return AnomalyNet(config.model, latent_size(config))
