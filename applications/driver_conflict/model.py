"""Physics-derived channels and a temporal convolution net, one graph from raw sensor readings to a logit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from applications.driver_conflict import pipeline
from applications.driver_conflict.config import Config
from fl_core.learning.normalization import norm

G_FTPS2 = 32.174
G_MPS2 = 9.80665
MPS_PER_MPH = 0.44704
RADIANS = 0.017453292519943295


def _earlier(x: Tensor, rows: int) -> Tensor:
    """x (N, T) moved later by ``rows``: each row sees the value that far back (the first rows see themselves)."""
    return torch.cat([x[:, :rows], x[:, :-rows]], dim=1)


class Features(nn.Module):
    """window (N, T, C), raw with NaN -> (N, F, T): scaled readings, masks and quantities of traffic-conflict analysis.

    Anything outside a channel's physical range, NaN and infinities count as missing and read as 0 beside a mask of 0.
    """

    low: Tensor
    high: Tensor
    count = 23

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor([c.low for c in pipeline.CHANNELS]), persistent=False)
        self.register_buffer("high", torch.tensor([c.high for c in pipeline.CHANNELS]), persistent=False)

    def forward(self, window: Tensor) -> Tensor:
        present = (window >= self.low) & (window <= self.high)
        value = torch.where(present, window, torch.zeros_like(window))
        mask = present.to(window.dtype)
        v = {name: value[:, :, i] for i, name in enumerate(pipeline.NAMES)}
        m = {name: mask[:, :, i] for i, name in enumerate(pipeline.NAMES)}
        speed = torch.where(m["speed_vehicle_mph"] > 0, v["speed_vehicle_mph"], v["speed_gps_mph"])
        speed_mask = torch.maximum(m["speed_vehicle_mph"], m["speed_gps_mph"])
        rows = [
            speed / 40,
            speed_mask,
            v["yaw_rate_dps"] / 10,
            (v["lat_acc_g"] / 0.25).clamp(-4, 4),
            (v["long_acc_g"] / 0.25).clamp(-4, 4),
            v["brake"],
            m["brake"],
            (v["turn_signal"] > 0).to(window.dtype),
            torch.amax(mask, dim=2),
        ]
        for distance, rate in pipeline.RADARS:
            seen = m[distance] * m[rate]
            range_ft = torch.where(seen > 0, v[distance], torch.full_like(speed, 1000.0))
            closing = -v[rate] * seen
            positive = torch.relu(closing)
            rows += [
                seen,
                (20 / range_ft).clamp(0, 3),
                closing / 20,
                (2 * closing / (range_ft + 3)).clamp(-3, 3),
                (positive * positive / (2 * G_FTPS2 * range_ft) * 4).clamp(0, 4),
            ]
        both = speed_mask * _earlier(speed_mask, 5)
        change = (speed - _earlier(speed, 5)) * both * (MPS_PER_MPH / 0.5 / G_MPS2)
        rows.append((change * 4).clamp(-4, 4))
        turning = speed * MPS_PER_MPH * v["yaw_rate_dps"] * RADIANS / G_MPS2
        rows.append(((v["lat_acc_g"] - turning) * 4 * m["lat_acc_g"] * speed_mask).clamp(-4, 4))
        jerk_x = v["long_acc_g"] - _earlier(v["long_acc_g"], 3)
        jerk_y = v["lat_acc_g"] - _earlier(v["lat_acc_g"], 3)
        rows.append((4 * jerk_x * m["long_acc_g"] * _earlier(m["long_acc_g"], 3)).clamp(-4, 4))
        rows.append((4 * jerk_y * m["lat_acc_g"] * _earlier(m["lat_acc_g"], 3)).clamp(-4, 4))
        return torch.stack(rows, dim=1)


class Block(nn.Module):
    """Residual pair of convolutions over (N, W, T)."""

    def __init__(self, width: int, dilation: int, kind: str) -> None:
        super().__init__()
        self.first = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.norm1 = norm(kind, width, dims=1)
        self.second = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.norm2 = norm(kind, width, dims=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.first(x)))
        return torch.relu(x + self.norm2(self.second(y)))


class ConflictNet(nn.Module):
    """window (N, T, C) -> logit of a conflict (N,), logits of its kind (N, 5)."""

    def __init__(self, width: int, blocks: int, kind: str, dropout: float) -> None:
        super().__init__()
        self.features = Features()
        self.stem = nn.Conv1d(Features.count, width, 5, stride=2, padding=2)
        self.stem_norm = norm(kind, width, dims=1)
        self.blocks = nn.Sequential(*[Block(width, 2 ** (i % 4), kind) for i in range(blocks)])
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(3 * width, 1)
        self.incident = nn.Linear(3 * width, len(pipeline.INCIDENTS))

    def forward(self, window: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem_norm(self.stem(self.features(window))))
        x = self.blocks(x)
        judged = x[:, :, -(pipeline.WINDOW_ROWS // 2) :]
        pooled = torch.cat([judged.mean(dim=2), judged.amax(dim=2), x.mean(dim=2)], dim=1)
        summary = self.dropout(pooled)
        return self.head(summary).squeeze(1), self.incident(summary)


def build_model(config: Config) -> nn.Module:
    torch.manual_seed(0)
    m = config.model
    return ConflictNet(m.width, m.blocks, m.norm, m.dropout)
