"""[model] and [data] of plant_disease, beside the sections that all applications share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fl_core.contracts.config import choice, number, sequence
from fl_core.contracts.errors import ConfigError
from fl_core.contracts.sections import (
    NORMS,
    AlgorithmConfig,
    ExportConfig,
    OptimizerConfig,
    PretrainConfig,
    SelectionConfig,
)

MAIZE = ("northern_leaf_blight", "common_rust", "gray_leaf_spot", "healthy")
# The partition that ``read`` makes without knowing a configuration; the defaults of [data] are the same.
CLIENTS = 24
ALPHA = 0.5


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    width: int = number(16, low=8, high=256, help="channels of the first stage; the last has eight times as many")
    blocks: int = number(1, low=1, high=8, help="residual blocks in each of the four stages")
    norm: str = choice("group", *NORMS)
    colour_bins: int = number(
        0, low=0, high=64, help="bins of soft histograms of colours and gradients beside the learned features; 0 = none"
    )
    symmetries: int = number(
        1,
        low=1,
        high=8,
        help="outside training the mean over this many mirror images and quarter turns, as many times the work: 1, 2, 4 or 8",
    )
    label_smoothing: float = number(0.05, low=0.0, high=0.5)
    class_weights: tuple[float, ...] = sequence(
        (), low=0.0, high=1e3, help="of each class in the loss, in the order of data.classes; [] = all equal"
    )

    def __post_init__(self) -> None:
        if self.symmetries not in (1, 2, 4, 8):
            raise ConfigError(f"model.symmetries = {self.symmetries}", remedy="1, 2, 4 or 8")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    classes: tuple[str, ...] = sequence(MAIZE, help="the labels; their order is the order of the model's outputs")
    image_size: int = number(128, low=32, high=1024, help="side of the square image that the model takes, in pixels")
    client_column: str = choice(
        "auto", "auto", "site", "domain", "dirichlet", help="auto: site where present, else dirichlet"
    )
    dirichlet_clients: int = number(CLIENTS, low=1, high=100_000, help="clients made by label skew, over all domains")
    dirichlet_alpha: float = number(ALPHA, low=1e-3, high=1e6, help="label skew: small = few classes a client")
    clients: int = number(24, low=1, high=100_000, help="sites that the generator makes")
    images_per_client: int = number(30, low=2, high=100_000, help="images of a generated site")
    holdout_fraction: float = number(0.1, low=0.0, high=0.9, help="share of clients kept out of training")
    validation_fraction: float = number(
        0.1, low=0.0, high=0.9, help="share of each client's groups kept for validation"
    )
    zoom: float = number(0.3, low=0.0, high=0.9, help="augmentation: a crop's side is at least 1 - zoom of the image's")
    rotate: float = number(15.0, low=0.0, high=180.0, help="augmentation: degrees, beside quarter turns and mirrors")
    colour: float = number(0.2, low=0.0, high=1.0, help="augmentation: strength of brightness, contrast and colour")
    background: float = number(
        0.3, low=0.0, high=1.0, help="augmentation: share of images whose plain background is replaced"
    )

    copies: tuple[str, ...] = sequence(
        (),
        help="balanced sampling: DOMAIN:N has a pass of training see each image of that domain N times, differently augmented",
    )

    def copies_of(self) -> dict[str, int]:
        """Domain -> how often a pass of training sees its images. Raises ConfigError."""
        found = {}
        for entry in self.copies:
            domain, _, count = entry.rpartition(":")
            if not domain or not count.isdigit() or not 1 <= int(count) <= 100:
                raise ConfigError(
                    f"data.copies: {entry!r} is not accepted", remedy="write DOMAIN:N with N from 1 to 100"
                )
            found[domain] = int(count)
        return found

    def __post_init__(self) -> None:
        self.copies_of()
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes) or not all(self.classes):
            raise ConfigError(f"data.classes = {list(self.classes)} must be at least two different names")


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        weights: Any = self.model.class_weights
        if weights and (len(weights) != len(self.data.classes) or not sum(weights) > 0):
            raise ConfigError(
                f"model.class_weights has {len(weights)} entries, data.classes {len(self.data.classes)}",
                remedy="give each class a weight, one at least above 0, or [] for equal weights",
            )
