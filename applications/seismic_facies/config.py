"""[model] and [data] of seismic_facies, beside the sections that all applications share."""

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

# Reflection configurations after Mitchum, Vail and Sangree (AAPG Memoir 26, 1977); their order is the labels' order.
FACIES = ("parallel", "wavy", "clinoform", "chaotic", "transparent", "channel")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    dims: int = number(
        3, low=2, high=3, help="3, or 2: a net of inline slices, each on its own (the twin to compare with)"
    )
    width: int = number(8, low=4, high=256, help="channels at full resolution; each level below has twice as many")
    levels: int = number(4, low=2, high=6, help="resolutions; data.crop must be a multiple of 2^(levels-1)")
    stem: int = number(
        1, low=1, high=2, help="2: no convolutions at full resolution but the first, which steps by two, and the last"
    )
    attributes: bool = flag(False, help="give each level the gradient structure tensor (dip, coherence) of its scale")
    norm: str = choice("batch", *NORMS)
    class_weights: tuple[float, ...] = sequence(
        (), low=0.0, high=1e3, help="of each class in the loss, in the order of data.classes; [] = all equal"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    classes: tuple[str, ...] = sequence(FACIES, help="label 0, 1, ...; label 255 is a voxel without a label")
    crop: int = number(32, low=8, high=512, help="side of the cubic sub-volume that the model takes, in samples")
    stride: int = number(32, low=4, high=512, help="between neighbouring sub-volumes of a volume")
    in_memory_mb: int = number(2048, low=0, help="larger data sets stay on disk and are read sub-volume by sub-volume")
    clients: int = number(24, low=1, high=100_000, help="surveys that the generator makes")
    volumes_per_client: int = number(4, low=1, high=10_000, help="blocks of a generated survey")
    inlines: int = number(64, low=8, high=4096, help="of a generated volume")
    crosslines: int = number(64, low=8, high=4096, help="of a generated volume")
    samples: int = number(64, low=8, high=4096, help="of a generated trace")
    noise: float = number(1.0, low=0.0, high=10.0, help="factor on the noise's amplitude of generated surveys")
    reference: str = choice(
        "auto", "auto", "stored", "measured",
        help="spectrum and noise of generated volumes: measured on $FIELDFLEET_DATA/seismic_f3, or as stored; auto: measured where it lies there",
    )  # fmt: skip
    holdout_fraction: float = number(0.2, low=0.0, high=0.9, help="share of surveys kept out of training")
    validation_fraction: float = number(
        0.2, low=0.0, high=0.9, help="share of each survey's volumes kept for validation"
    )
    mirror: float = number(0.5, low=0.0, high=1.0, help="augmentation: chance to mirror each lateral axis")
    turn: float = number(0.5, low=0.0, high=1.0, help="augmentation: chance to exchange inlines and crosslines")
    gain: float = number(0.2, low=0.0, high=2.0, help="augmentation: standard deviation of the logarithm of a gain")

    def __post_init__(self) -> None:
        if not 2 <= len(set(self.classes)) == len(self.classes) <= 254 or not all(self.classes):
            raise ConfigError(f"data.classes = {list(self.classes)} must be 2 to 254 different names")
        if self.stride > self.crop:
            raise ConfigError(
                f"data.stride = {self.stride} leaves gaps between sub-volumes of {self.crop}",
                remedy=f"set data.stride to at most {self.crop}",
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
        step = 2 ** (self.model.levels - 1)
        if self.data.crop % step:
            raise ConfigError(
                f"data.crop = {self.data.crop} is not a multiple of {step}, which {self.model.levels} levels need",
                remedy="change data.crop or model.levels",
            )
        weights = self.model.class_weights
        if weights and (len(weights) != len(self.data.classes) or not min(weights) > 0):
            raise ConfigError(
                f"model.class_weights has {len(weights)} entries, data.classes {len(self.data.classes)}",
                remedy="give each class a weight above 0, or [] for equal weights",
            )
