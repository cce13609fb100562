"""[model] and [data] of topology_optimisation, beside the sections that all applications share."""

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
    architecture: str = choice("unet", "unet", "fourier", help="U-Net, or convolutions in space and in Fourier modes")
    width: int = number(8, low=4, high=1024, help="channels of the finest grid; twice as many on the next")
    depth: int = number(2, low=1, high=6, help="unet: halvings below the grid half as fine; fourier: blocks")
    modes: int = number(4, low=1, high=64, help="fourier: modes kept on each axis")
    norm: str = choice("group", *NORMS)
    sharpness: float = number(
        2.5,
        low=0.1,
        high=100.0,
        help="factor on the logits outside training: a design is to be solid or void, not likely",
    )
    compliance_weight: float = number(
        0.0, low=0.0, high=10.0, help="of log compliance by its adjoint in the loss, beside the supervised densities"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    size: int = number(16, low=4, high=256, help="elements along each side of the cube")
    clients: int = number(8, low=1, high=100_000, help="companies that the generator makes")
    problems_per_client: int = number(6, low=1, high=100_000, help="problems of a generated company")
    iterations: int = number(40, low=1, high=1000, help="of SIMP, for each generated design")
    in_memory_mb: int = number(2048, low=0, help="larger data sets are memory-mapped, and read when a batch needs them")
    response: str = choice(
        "coarse", "none", "coarse", "full", help="grid on which the solid box is analysed for the model's input"
    )
    symmetry: str = choice(
        "mirror", "none", "mirror", "upright", "cube",
        help="augmentation: the plane that leaves wall and ground alone, the 8 that leave the ground, or all 48",
    )  # fmt: skip
    judged: int = number(
        16, low=0, high=1_000_000, help="examples whose compliance is computed by a metrics call; the others' is not"
    )
    holdout_fraction: float = number(0.125, low=0.0, high=0.9, help="share of clients kept out of training")
    validation_fraction: float = number(
        0.1, low=0.0, high=0.9, help="share of each client's groups kept for validation"
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
        step = 2 ** (1 + (self.model.depth if self.model.architecture == "unet" else 0))
        if self.data.size % step:
            raise ConfigError(
                f"data.size = {self.data.size}: this model needs a multiple of {step}",
                remedy="change data.size, or lower model.depth",
            )
