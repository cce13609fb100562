"""[model] and [data] of driver_attention, beside the sections that all applications share."""

from __future__ import annotations

from dataclasses import dataclass, field

from fl_core.contracts.config import choice, flag, number, sequence
from fl_core.contracts.errors import ConfigError
from fl_core.contracts.sections import (
    NORMS,
    AlgorithmConfig,
    ExportConfig,
    OptimizerConfig,
    PretrainConfig,
    SelectionConfig,
)

VIEWS = ("front", "cabin", "side")
HALVINGS = 3  # of a frame's sides, inside the model


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    width: int = number(
        8, low=4, high=512, help="channels of the backbone's first stage; twice as many on each next one"
    )
    blocks: int = number(0, low=0, high=8, help="residual blocks behind each of the backbone's later stages")
    features: int = number(32, low=4, high=4096, help="numbers that the backbone makes of one frame of one view")
    hidden: int = number(64, low=8, high=4096, help="state of the recurrent unit over time")
    motion: int = number(32, low=4, high=4096, help="state of the recurrent unit over the kinematics alone")
    norm: str = choice("group", *NORMS)
    motion_weight: float = number(
        0.5, low=0.0, high=10.0, help="of the conflict by the kinematics alone in the loss, beside by everything"
    )
    state_weight: float = number(0.5, low=0.0, high=10.0, help="of the driver's state in the loss, beside the conflict")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    clients: int = number(40, low=1, high=100_000, help="vehicles that the generator makes")
    clips_per_client: int = number(48, low=1, high=100_000, help="clips of a generated vehicle")
    height: int = number(32, low=16, high=512, help="rows of a frame; frames of other sizes are resampled")
    width: int = number(48, low=16, high=512, help="columns of a frame")
    frames: int = number(15, low=4, high=256, help="of each view in a clip")
    rate_hz: float = number(5.0, low=1.0, high=30.0, help="frames a second")
    missing_views: tuple[str, ...] = sequence(
        (), help="cameras taken as absent, such as ['cabin'], to see what is lost"
    )
    missing_kinematics: bool = flag(False, help="take the kinematics as absent, to see what is lost")
    holdout_fraction: float = number(0.25, low=0.0, high=0.9, help="share of vehicles kept out of training")
    validation_fraction: float = number(
        0.1, low=0.0, high=0.9, help="share of each vehicle's clips kept for validation"
    )
    drop_view: float = number(
        0.2, low=0.0, high=0.9, help="augmentation: chance that a view is absent; one always stays"
    )
    drop_all_views: float = number(
        0.05, low=0.0, high=0.9, help="augmentation: chance that no view is there, and the kinematics therefore are"
    )
    drop_kinematics: float = number(0.2, low=0.0, high=1.0, help="augmentation: chance that the kinematics are absent")
    shift: float = number(
        0.06, low=0.0, high=0.5, help="augmentation: how far a camera may sit askew, as a share of the frame's sides"
    )
    late_start: float = number(
        0.2, low=0.0, high=1.0, help="augmentation: chance that a clip begins late, by up to a half"
    )
    light: float = number(0.2, low=0.0, high=1.0, help="augmentation: strength of brightness and contrast")


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
        step = 2**HALVINGS
        for name in ("height", "width"):
            if getattr(self.data, name) % step:
                raise ConfigError(f"data.{name} = {getattr(self.data, name)} must be a multiple of {step}")
        if odd := sorted(set(self.data.missing_views) - set(VIEWS)):
            raise ConfigError(f"data.missing_views: {odd[0]!r} is not a view; views: {', '.join(VIEWS)}")
