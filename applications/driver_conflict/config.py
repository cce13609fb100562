"""[model] and [data] of driver_conflict, beside the sections that all applications share."""

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

SENSOR_NAMES = ("speed", "gps", "yaw", "acceleration", "front_radar", "rear_radar", "brake", "turn_signal")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    width: int = number(48, low=8, high=4096, help="channels of the temporal convolutions")
    blocks: int = number(1, low=1, high=32, help="residual blocks of dilation 1, 2, 4, 8, 1, ...")
    norm: str = choice("group", *NORMS)
    dropout: float = number(0.0, low=0.0, high=0.9, help="share of the summary's values that training leaves out")
    incident_weight: float = number(0.3, low=0.0, high=10.0, help="of the kind of a conflict in the loss")
    incident_balance: float = number(
        0.5, low=0.0, high=1.0, help="kinds judged as frequent as they are (0) to all equally frequent (1)"
    )
    label_smoothing: float = number(0.0, low=0.0, high=0.5, help="of the conflict")
    positive_weight: float = number(1.0, low=0.01, high=100.0, help="weight of a conflict window in the loss")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    clients: int = number(24, low=1, high=100_000, help="vehicles that the generator makes")
    events_per_client: int = number(6, low=1, high=1000, help="mean number of events of a generated vehicle")
    holdout_fraction: float = number(0.25, low=0.0, high=0.9, help="share of vehicles kept out of training")
    validation_fraction: float = number(
        0.2, low=0.0, high=0.9, help="share of each vehicle's events kept for validation"
    )
    training_hop: int = number(
        15,
        low=1,
        high=15,
        help="rows between two windows to train on; those off the protocol's grid of 15 are never scored",
    )
    missing_sensors: tuple[str, ...] = sequence((), help="sensors taken as absent, such as ['front_radar']")
    truncate: float = number(0.3, low=0.0, high=1.0, help="augmentation: share of windows with shortened history")
    drop_sensor: float = number(0.3, low=0.0, high=1.0, help="augmentation: chance that a sensor is silent")
    mirror: float = number(0.5, low=0.0, high=1.0, help="augmentation: chance that left and right are exchanged")
    calibration: float = number(
        1.0, low=0.0, high=10.0, help="augmentation: size of the errors of calibration, relative to ordinary ones"
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
        if odd := sorted(set(self.data.missing_sensors) - set(SENSOR_NAMES)):
            raise ConfigError(f"data.missing_sensors: {odd[0]!r} is not a sensor; sensors: {', '.join(SENSOR_NAMES)}")
