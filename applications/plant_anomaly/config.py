"""[model] and [data] of plant_anomaly, beside the sections that all applications share."""

from __future__ import annotations

from dataclasses import dataclass, field

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

STEP = 8  # the encoder halves the sides three times


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    width: int = number(
        16, low=4, high=512, help="channels after the first layer; four times as many at the bottleneck"
    )
    blocks: int = number(1, low=0, high=8, help="residual blocks at each of the two lower resolutions")
    latent: int = number(
        6, low=2, high=256, help="channels of the bottleneck; the latent vector has one of each, and two more"
    )
    norm: str = choice("group", *NORMS)
    heat_weight: float = number(
        2.0, low=0.0, high=1e3, help="of the heat in the score, beside 1 of each bottleneck channel"
    )
    error_weight: float = number(2.0, low=0.0, high=1e3, help="of the reconstruction's error in the score")
    heat_sharpness: float = number(
        1.0, low=0.1, high=100.0, help="of the heat's smooth maximum: 1 sums up many pixels, 100 is the hottest one"
    )
    evidence_margin: float = number(
        0.0,
        low=0.0,
        high=10.0,
        help="standard deviations below the healthy plants' mean from which heat and error count upwards",
    )
    latent_knee: float = number(
        0.75,
        low=0.01,
        high=1e9,
        help="mean square of the whitened bottleneck (1 = healthy plants) above which it counts by its logarithm",
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    healthy: tuple[str, ...] = sequence(
        ("healthy",), help="the labels of healthy plants, the only ones that are learned from"
    )
    image_size: int = number(96, low=16, high=1024, help="side of the square image that the model takes, in pixels")
    clients: int = number(30, low=1, high=100_000, help="fields that the generator makes")
    images_per_client: int = number(
        24, low=3, high=100_000, help="photographs of a generated field; every third one is of sick plants"
    )
    view: float = number(0.4, low=0.1, high=10.0, help="metres of ground across a generated photograph, on average")
    holdout_fraction: float = number(0.2, low=0.0, high=0.9, help="share of clients kept out of training")
    validation_fraction: float = number(
        0.2, low=0.0, high=0.9, help="share of each client's groups kept for validation"
    )
    rotate: float = number(1.0, low=0.0, high=1.0, help="augmentation: chance of a mirror image and of a quarter turn")
    colour: float = number(0.2, low=0.0, high=1.0, help="augmentation: strength of brightness, contrast and colour")
    paint: float = number(0.7, low=0.0, high=1.0, help="augmentation: share of healthy images that get made-up lesions")

    def __post_init__(self) -> None:
        if self.image_size % STEP:
            raise ConfigError(
                f"data.image_size = {self.image_size} is not a multiple of {STEP}", remedy="change data.image_size"
            )
        if not self.healthy:
            raise ConfigError("data.healthy names no label", remedy='such as data.healthy=["healthy"]')


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
