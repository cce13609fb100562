"""A 2-D backbone shared by all views, fusion with the kinematics, gated recurrent units over time, and two heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from applications.driver_attention.config import HALVINGS, VIEWS, Config
from applications.driver_attention.pipeline import CHANNELS, STATES
from fl_core.learning.normalization import norm


def _convolution(source: int, target: int, kernel: int, stride: int, kind: str) -> nn.Sequential:
    padding = (kernel - 1) // 2
    return nn.Sequential(nn.Conv2d(source, target, kernel, stride=stride, padding=padding), norm(kind, target, dims=2))


class Block(nn.Module):
    """Residual pair of 3 x 3 convolutions (He et al., CVPR 2016) over (M, C, H, W)."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.first = _convolution(channels, channels, 3, 1, kind)
        self.second = _convolution(channels, channels, 3, 1, kind)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Backbone(nn.Module):
    """(M, 2, H, W), a frame and its change since the one before -> (M, features). The place of things is kept."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        m, d = config.model, config.data
        stages: list[nn.Module] = []
        source = 2
        for number in range(HALVINGS):
            target = m.width * 2**number
            stages += [_convolution(source, target, 4 if number == 0 else 3, 2, m.norm), nn.ReLU()]
            stages += [Block(target, m.norm) for _ in range(m.blocks if number else 0)]
            source = target
        self.stages = nn.Sequential(*stages)
        self.project = nn.Linear(source * (d.height >> HALVINGS) * (d.width >> HALVINGS), m.features)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.project(self.stages(x).flatten(1)))


class AttentionNet(nn.Module):
    """frames (N, V, T, H, W) uint8, present (N, V, T), kinematics (N, T, C) raw with NaN -> conflict (N,), state (N, 3).

    Where ``present`` is 0 a frame's pixels are not looked at. In training a third output, (N,): what the kinematics alone
    add to the logit of the conflict, for a loss of its own: beside pictures, which tell more, they would hardly be learned
    (Wang, Tran and Feiszli, CVPR 2020).
    """

    low: Tensor
    high: Tensor
    scale: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        m, d = config.model, config.data
        self.views, self.times, self.rows, self.columns = len(VIEWS), d.frames, d.height, d.width
        self.features = m.features
        for name in ("low", "high", "scale"):
            value = torch.tensor([getattr(c, name) for c in CHANNELS])
            self.register_buffer(name, value, persistent=False)
        self.backbone = Backbone(config)
        self.fuse = nn.Linear(self.views * (m.features + 1) + 2 * len(CHANNELS), m.hidden)
        self.over_time = nn.GRU(m.hidden, m.hidden, batch_first=True)
        self.felt_over_time = nn.GRU(2 * len(CHANNELS), m.motion, batch_first=True)
        self.by_motion = nn.Linear(2 * m.motion, 1)
        self.conflict = nn.Linear(2 * m.hidden, 1)
        self.state = nn.Linear(2 * m.hidden, len(STATES))

    def seen(self, frames: Tensor, present: Tensor) -> Tensor:
        """(N, T, V (features + 1)): what each view shows at each time, and whether there is a frame."""
        there = present.unsqueeze(-1).unsqueeze(-1)
        x = (frames.to(present.dtype) * (1 / 64) - 2) * there
        both = there[:, :, 1:] * there[:, :, :-1]
        change = (x[:, :, 1:] - x[:, :, :-1]) * both
        change = torch.cat([torch.zeros_like(x[:, :, :1]), change], dim=2)
        pairs = torch.stack([x, change], dim=3).reshape(-1, 2, self.rows, self.columns)
        found = self.backbone(pairs).reshape(-1, self.views, self.times, self.features) * present.unsqueeze(-1)
        found = torch.cat([found, present.unsqueeze(-1)], dim=3)
        return found.permute(0, 2, 1, 3).reshape(-1, self.times, self.views * (self.features + 1))

    def felt(self, kinematics: Tensor) -> Tensor:
        """(N, T, 2 C): scaled readings, and a mask; what is outside a channel's range is missing and reads 0."""
        there = (kinematics >= self.low) & (kinematics <= self.high)
        value = torch.where(there, kinematics, torch.zeros_like(kinematics)) / self.scale
        return torch.cat([value, there.to(kinematics.dtype)], dim=2)

    def forward(self, frames: Tensor, present: Tensor, kinematics: Tensor) -> tuple[Tensor, ...]:
        felt = self.felt(kinematics)
        together = torch.cat([self.seen(frames, present), felt], dim=2)
        summary = ends(self.over_time(torch.relu(self.fuse(together)))[0])
        by_motion = self.by_motion(ends(self.felt_over_time(felt)[0])).squeeze(1)
        conflict = self.conflict(summary).squeeze(1) + by_motion
        return (conflict, self.state(summary), by_motion) if self.training else (conflict, self.state(summary))


def ends(states: Tensor) -> Tensor:
    """(N, T, F) -> (N, 2 F): the last, and the largest of each feature."""
    return torch.cat([states[:, -1], states.amax(dim=1)], dim=1)


def build_model(config: Config) -> nn.Module:
    torch.manual_seed(0)
    return AttentionNet(config)
