"""[model] and [data] of plant_segmentation, beside the sections that all applications share."""

from __future__ import annotations

from dataclasses import dataclass, field

from fl_core.contracts.config import choice, number
from fl_core.contracts.errors import ConfigError
from fl_core.contracts.sections import (
    NORMS,
    AlgorithmConfig,
    ExportConfig,
    OptimizerConfig,
    PretrainConfig,
    SelectionConfig,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    task: str = choice(
        "instances", "instances", "semantic", help="semantic: foreground only, all of it counts as one instance"
    )
    width: int = number(24, low=4, high=512, help="channels at half resolution; each level below has twice as many")
    levels: int = number(4, low=2, high=6, help="resolutions below full; data.image_size is a multiple of 2^levels")
    norm: str = choice("batch", *NORMS)
    seed_radius: float = number(3.0, low=0.5, high=100.0, help="pixels: how far from its plant's centre a seed reaches")
    min_distance: int = number(4, low=1, high=100, help="grouping: pixels between the centres of two plants, at least")
    min_pixels: int = number(10, low=1, high=100_000, help="grouping: smaller instances are given to their neighbours")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    image_size: int = number(96, low=16, high=2048, help="side of the square tile that the model takes, in pixels")
    stride: int = number(96, low=8, high=2048, help="between neighbouring tiles of a larger photograph")
    long_side: int = number(
        0, low=0, high=20_000, help="photographs are scaled to this long side first; 0 = as they are"
    )
    clients: int = number(30, low=1, high=100_000, help="fields that the generator makes")
    images_per_client: int = number(20, low=2, high=100_000, help="photographs of a generated field")
    maize_share: float = number(
        0.6, low=0.0, high=1.0, help="share of generated fields that grow maize, the others rosettes"
    )
    view: float = number(0.85, low=0.1, high=10.0, help="metres of ground across a generated photograph, on average")
    min_visible: int = number(12, low=0, help="pixels: smaller pieces of a generated plant are left unlabelled")
    holdout_fraction: float = number(0.2, low=0.0, high=0.9, help="share of clients kept out of training")
    validation_fraction: float = number(
        0.1, low=0.0, high=0.9, help="share of each client's photographs kept for validation"
    )
    mirror: float = number(0.5, low=0.0, high=1.0, help="augmentation: chance of a mirror image")
    turn: float = number(0.75, low=0.0, high=1.0, help="augmentation: chance of a quarter, half or three-quarter turn")
    shift: float = number(
        0.0,
        low=0.0,
        high=1.0,
        help="augmentation: share of tiles shifted around by a random step, mirrored at the edge",
    )
    colour: float = number(0.2, low=0.0, high=1.0, help="augmentation: strength of brightness, contrast and colour")

    def __post_init__(self) -> None:
        if self.stride > self.image_size:
            raise ConfigError(
                f"data.stride = {self.stride} leaves gaps between tiles of {self.image_size}",
                remedy=f"set data.stride to at most {self.image_size}",
            )


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
        step = 2**self.model.levels
        if self.data.image_size % step:
            raise ConfigError(
                f"data.image_size = {self.data.image_size} is not a multiple of {step}, which {self.model.levels} levels need",
                remedy="change data.image_size or model.levels",
            )
