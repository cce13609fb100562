"""The configuration sections that every application shares: [optimizer] [algorithm] [selection] [pretrain] [export]."""

from __future__ import annotations

from dataclasses import dataclass

from fl_core.contracts.config import choice, flag, number, sequence, text
from fl_core.contracts.device_state import NETWORKS

NORMS = ("batch", "group", "ghost", "none")  # of ``model.norm`` in every application
PARALLEL = ("ddp", "fsdp", "hsdp")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Used by the client's local update and by pretraining alike; names are files in fl_core/optimizers."""

    name: str = text("sgd", help="a file of fl_core/optimizers")
    lr: float = number(0.01, low=0.0, high=1e3)
    momentum: float = number(0.0, low=0.0, high=0.9999)
    weight_decay: float = number(0.0, low=0.0, high=10.0)
    clip_norm: float = number(0.0, low=0.0, help="global gradient norm; 0 = no clipping")
    trust: float = number(0.001, low=0.0, help="lars: a step's share of the norm of the weights, at lr = 1")
    damping: float = number(0.003, low=1e-12, help="kfac, shampoo: added to the curvature before it is inverted")
    decay: float = number(0.95, low=0.0, high=0.9999, help="kfac, soap: of the running averages of the curvature")
    measure_every: int = number(1, low=1, help="kfac: steps between two measurements of the curvature")
    update_every: int = number(10, low=1, help="kfac, soap, shampoo: steps between two decompositions")
    max_factor: int = number(
        2048, low=1, help="larger factors are cut into diagonal blocks (kfac; 1 = diagonal) or left out (soap)"
    )
    kl_clip: float = number(0.001, low=0.0, help="kfac: bound on a step's change of the predictions; 0 = none")
    fisher: str = choice(
        "empirical",
        "empirical",
        "sampled",
        help="kfac: curvature from the targets' gradients, or from gradients of targets that the model itself would draw",
    )
    inverses: str = choice(
        "everywhere", "everywhere", "owner", help="kfac: where decompositions are kept; owner = on one process each"
    )


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """One federated algorithm and its rounds; names are files in fl_core/algorithms."""

    name: str = text("fedavg", help="a file of fl_core/algorithms")
    clients_per_round: int = number(0, low=0, help="0 = every client")
    min_clients: int = number(1, low=1, help="a round with fewer usable replies changes nothing")
    deadline_s: float = number(600.0, low=0.1, help="seconds a round waits for replies")
    over_select: float = number(
        0.0, low=0.0, high=10.0, help="asks this share more clients and ends with the first clients_per_round replies"
    )
    late: str = choice("drop", "drop", "next", help="replies after the deadline: dropped, or counted in the next round")
    late_weight: float = number(0.5, low=0.0, high=1.0, help="factor on the weight of a reply counted a round late")
    stragglers: str = choice(
        "drop",
        "drop",
        "partial",
        help="clients too slow for the deadline: without reply, or with what they have by then",
    )
    personal: tuple[str, ...] = sequence((), help="arrays of the model that stay on each client, as ['head.*']")
    mode: str = choice("sync", "sync", "async", help="async: a model from each buffer of replies; fedbuff, fedasync")
    buffer: int = number(10, low=1, help="async: replies that make a new model; fewer than there are devices")
    max_staleness: int = number(0, low=0, help="async: replies of older models are refused; 0 = none is too old")
    local_epochs: int = number(1, low=1)
    batch_size: int = number(32, low=1)
    client_lr: float = number(0.0, low=0.0, help="learning rate of the local update; 0 = optimizer.lr")
    schedule: str = choice("constant", "constant", "cosine", help="of the client learning rate over the rounds")
    evaluate_every: int = number(1, low=0, help="rounds between client evaluations; 0 = never")
    average_last: float = number(
        0.0, low=0.0, high=1.0, help="fraction of the last rounds whose models are averaged at the end"
    )
    proximal_mu: float = number(0.01, low=0.0, help="fedprox, fedasync")
    fednova_mu: float = number(0.0, low=0.0, help="fednova: proximal term of the local objective")
    restriction: float = number(
        0.5, low=0.0, high=1.0, help="fedrs: factor of the scores of classes that a client has no example of"
    )
    feddyn_alpha: float = number(0.1, low=1e-9, help="feddyn")
    global_lr: float = number(
        1.0, low=0.0, help="scaffold, fednova, fedbuff: length of the server's step; 1 = the mean of the clients"
    )
    staleness_power: float = number(0.5, low=0.0, high=10.0, help="fedbuff, fedasync: (1 + staleness)^-power")
    mixing: float = number(0.6, low=1e-6, high=1.0, help="fedasync: share of a fresh model in the global one")
    server_lr: float = number(0.1, low=0.0, help="fedadam, fedyogi: eta")
    beta_1: float = number(0.9, low=0.0, high=0.9999)
    beta_2: float = number(0.99, low=0.0, high=0.99999)
    tau: float = number(1e-3, low=1e-12, help="fedadam, fedyogi: adaptivity")
    head: str = text(
        "", help="statistics_head: the linear layer to solve for; '' = the one called head, or the only one"
    )
    head_rule: str = choice(
        "discriminant", "discriminant", "least_squares", "whitening", help="statistics_head: what is solved for"
    )
    head_shrinkage: float = number(
        0.1, low=0.0, high=1.0, help="statistics_head: share of the diagonal in the covariance"
    )
    head_invariance: float = number(
        0.0,
        low=0.0,
        high=1e6,
        help="statistics_head: weight of how a class's means scatter over clients; above 0 the discriminant avoids such directions",
    )
    head_prior: str = choice("equal", "equal", "counts", help="statistics_head: of the classes in the discriminant")
    max_update_norm: float = number(0.0, low=0.0, help="screening: larger updates are refused; 0 = no bound")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which devices may be asked, by what they say of themselves. The defaults ask everyone who is online."""

    min_battery: float = number(0.0, low=0.0, high=1.0, help="charge, from 0 to 1; a charging device may have less")
    require_charging: bool = flag(False)
    allow_metered: bool = flag(True, help="ask devices whose way to the server costs by volume")
    networks: tuple[str, ...] = sequence((), help="accepted kinds of network; [] = any")
    max_temperature_c: float = number(0.0, low=0.0, high=150.0, help="0 = no bound")
    min_free_storage: int = number(0, low=0, high=2**50, help="bytes")
    min_examples: int = number(0, low=0, help="of this application on the device")
    max_data_age_s: float = number(0.0, low=0.0, help="age of the newest sample; 0 = any")
    min_version: str = text("", help="of the application's package on the device, as 1.2.3")
    groups: tuple[str, ...] = sequence((), help="accepted groups; [] = any")
    tags: tuple[str, ...] = sequence((), help="all of which a device must have")
    max_state_age_s: float = number(0.0, low=0.0, help="older states count as unknown; 0 = any age")
    unknown: str = choice("allow", "allow", "refuse", help="devices that do not tell what a condition asks for")
    fairness: str = choice("uniform", "uniform", "least_recent", help="least_recent: whose last turn is longest ago")
    weight: str = choice(
        "equal", "equal", "examples", help="examples: chances by number of examples, beside their weight in the mean"
    )

    def __post_init__(self) -> None:
        if odd := sorted(set(self.networks) - set(NETWORKS)):
            raise ValueError(f"networks: {odd[0]!r} is not accepted; accepted: {', '.join(NETWORKS)}")
        if self.min_version and not all(part.isascii() and part.isdigit() for part in self.min_version.split(".")):
            raise ValueError(f"min_version = {self.min_version!r} is not accepted; write 1.2.3")
        if self.fairness == "least_recent" and self.weight != "equal":
            raise ValueError("fairness = 'least_recent' leaves nothing to chance: set weight = 'equal'")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Central training: ONE global batch size, whatever the number of processes and their arrangement."""

    epochs: int = number(10, low=1)
    batch_size: int = number(64, low=1, help="global: over all processes")
    micro_batch: int = number(
        0, low=0, help="samples of a process's share computed at once, gradients add up; 0 = the whole share"
    )
    parallel: str = choice("ddp", *PARALLEL, help="what all processes do where mesh is empty")
    mesh: str = text("", help="processes in each dimension, such as data=2,spatial=2; the rest is parallel's")
    spatial_axis: int = number(
        2, low=1, high=5, help="axis of the model's inputs that spatial processes share; 2: N, C, here"
    )
    schedule_of_stages: str = choice(
        "gpipe", "gpipe", "1f1b", help="order of micro-batches in a pipeline dimension of mesh"
    )
    precision: str = choice("full", "full", "bf16", help="bf16: automatic mixed precision, parameters stay float32")
    activation_checkpointing: bool = flag(False, help="recompute activations in the backward pass: memory for time")
    compile: bool = flag(False, help="torch.compile")
    coarse: str = text("", help="factor:share,...: first steps at lower resolution, such as 4:0.3,2:0.3")
    prefetch: int = number(2, low=0, high=64, help="batches made ahead by a thread where data lie on disk; 0 = none")
    lr: float = number(0.0, low=0.0, help="0 = optimizer.lr")
    lr_batch_size: int = number(0, low=0, help="the batch size that lr is meant for, scaled from there; 0 = this one")
    lr_scaling: str = choice("linear", "linear", "sqrt", help="linear: SGD and its kin; sqrt: adaptive methods")
    schedule: str = choice("cosine", "constant", "cosine", "polynomial")
    power: float = number(1.0, low=0.0, high=10.0, help="of the polynomial schedule")
    warmup_fraction: float = number(0.05, low=0.0, high=0.9)
    warmup_steps: int = number(
        0, low=0, help="warm-up of at least so many steps, or of half of all where these are fewer"
    )
    average_last: float = number(0.0, low=0.0, high=1.0, help="fraction of the last epochs whose weights are averaged")
    checkpoint_every: int = number(1, low=1, help="epochs")
    checkpoint_steps: int = number(0, low=0, help="steps between checkpoints inside an epoch; 0 = none")
    client_share: float = number(
        1.0, low=0.01, high=1.0, help="share of the training clients whose data the centre holds"
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    targets: tuple[str, ...] = sequence(("x86",), help="files of edge_export/targets")
    opset: int = number(20, low=17, high=25)
    calibration_examples: int = number(256, low=8)
    golden_examples: int = number(16, low=1, high=1024)
    parity_tolerance: float = number(
        1e-4, low=0.0, help="fp32: largest |onnxruntime - torch| allowed, relative to the output's scale"
    )
    int8_tolerance: float = number(0.05, low=0.0, help="int8: largest mean |score difference| on the golden samples")
