"""[model] and [data] of toy_regression, beside the sections that all applications share."""

from __future__ import annotations

from dataclasses import dataclass, field

from fl_core.contracts.config import choice, number
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
    hidden: int = number(0, low=0, high=4096, help="0 = linear model, else one hidden layer of this width")
    norm: str = choice("group", *NORMS, help="normalisation after the hidden layer")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    features: int = number(8, low=1, high=1024)
    clients: int = number(8, low=1, high=1_000_000, help="clients that the generator makes")
    examples_per_client: int = number(64, low=4)
    noise: float = number(0.1, low=0.0)
    shift: float = number(1.0, low=0.0, help="standard deviation of the clients' input means")
    holdout_fraction: float = number(0.25, low=0.0, high=0.9, help="share of clients kept out of training")
    validation_fraction: float = number(
        0.2, low=0.0, high=0.9, help="share of each client's groups kept for validation"
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
