"""A linear model, or one hidden layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from applications.toy_regression.config import Config
from fl_core.learning.normalization import norm


class Regressor(nn.Module):
    """features (N, F) -> value (N,)."""

    def __init__(self, features: int, hidden: int, kind: str) -> None:
        super().__init__()
        width = hidden or features
        self.body = (
            nn.Sequential(nn.Linear(features, hidden), norm(kind, hidden, dims=1), nn.ReLU())
            if hidden
            else nn.Identity()
        )
        self.head = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        value: Tensor = self.head(self.body(features)).squeeze(1)
        return value


def build_model(config: Config) -> nn.Module:
    torch.manual_seed(0)
    return Regressor(config.data.features, config.model.hidden, config.model.norm)
