"""A model's last linear layer from sums over the clients, in ONE round, equal to what all data together would give.

    client:  with features x of the frozen model (what the layer is fed) and targets y (one-hot for classes):
             n, sum x, sum x x^T, sum y, sum y x^T
    server:  adds them up, and solves for the layer

The sums do not know who added what to them, so that label skew has no effect, not even one class a client; gradients
of the layer never leave a client. ``algorithm.head_rule``:

* discriminant: Fisher's linear discriminant (one covariance for all classes; Hastie, Tibshirani and Friedman, section 4.3), as
  in federated learning from class statistics (CCVR, Luo et al., NeurIPS 2021; Fed3R, Fanì et al., ICML 2024).
* least_squares: ridge regression on the targets.
* whitening: W^T W = S^-1, b = -W m of all examples, whatever their targets: the layer's output has the squared Mahalanobis
  distance as its squared norm. W is lower triangular: output k is what the features before k leave unexplained of feature k, in
  units of its deviation.

The layer is ``algorithm.head``. Covariances shrink towards their diagonal by ``algorithm.head_shrinkage``. All other
arrays stay as they are.

With ``algorithm.head_invariance`` = w > 0 the discriminant also takes sum over its classes of (sum x)(sum x)^T / n from each client. Less the
same of all clients together it is how far clients of one class lie apart: a nuisance that is added, w times, to the covariance within the
classes (as within-class covariance normalisation does with the sessions of a speaker: Hatch, Kajarekar and Stolcke, ICSLP 2006). What comes
out then depends on how the data lie over clients, as it is meant to; a class that one client alone has adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fl_core.algorithms.base import (
    Algorithm,
    ClientUpdate,
    GradientTerms,
    LocalEnd,
    LocalStart,
    LocalWork,
    MeanAggregator,
    State,
    Update,
    add_scaled,
    cast_like,
)
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.errors import ConfigError, InputError, IntegrityError
from fl_core.contracts.sections import AlgorithmConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

SUMS = "head/"
COUNT, FIRST, SECOND, TARGETS, CROSS, OWN = "count", "sum", "moment", "targets", "cross", "own"
MAX_COUNT = 1e12
ABSENT = 10.0  # how far below every other class one without examples starts
Table = dict[str, npt.NDArray[Any]]
Float64 = npt.NDArray[np.float64]


def head_of(arrays: Arrays, name: str) -> tuple[str, str]:
    """(weight, bias) of the layer to solve: the named one, else ``head``, else the only linear one. Raises ConfigError."""
    linear = sorted(
        k.removesuffix(".weight")
        for k, v in arrays.items()
        if k.endswith(".weight") and v.ndim == 2 and k.removesuffix("weight") + "bias" in arrays
    )
    wanted = name or ("head" if "head" in linear else linear[0] if len(linear) == 1 else "")
    if wanted not in linear:
        raise ConfigError(
            f"algorithm.head = {name!r} names no linear layer with a bias",
            remedy=f"known: {', '.join(linear) or 'none'}",
        )
    return f"{wanted}.weight", f"{wanted}.bias"


class MeasuredUpdate(ClientUpdate):
    """Takes no step: what the client sends are sums over its training examples."""

    frozen = True

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config

    def terms(self) -> GradientTerms | None:
        return None  # no way of doing local updates but the sequential one knows sums

    def begin(self, start: LocalStart) -> ClientUpdate:
        return MeasuredRound(self.config, start)


class MeasuredRound(MeasuredUpdate):
    """One client's sums, in float64."""

    def __init__(self, config: AlgorithmConfig, start: LocalStart) -> None:
        super().__init__(config)
        weight, _ = head_of(start.reference, config.head)
        self._layer, shape = weight.removesuffix(".weight"), start.reference[weight].shape
        self._sums = zeros(shape, config.head_rule)
        self._parts = avoids_clients(config, shape[0])

    def observe(self, model: nn.Module, batches: Iterable[tuple[tuple[Tensor, ...], Tensor]]) -> None:
        found: list[Tensor] = []
        hook = model.get_submodule(self._layer).register_forward_pre_hook(lambda _, given: found.append(given[0]))
        try:
            for inputs, targets in batches:
                found.clear()
                model(*inputs)
                x = found[-1].double().cpu().numpy()
                if x.ndim != 2 or len(x) != len(targets):
                    raise InputError(f"{self._layer} is fed {x.shape}, statistics_head needs one vector an example")
                add_examples(self._sums, x, targets.numpy())
        finally:
            hook.remove()

    def finish(self, work: LocalWork) -> LocalEnd:
        if self._parts:
            self._sums[OWN] = between(self._sums)
        return LocalEnd(extra=dict(self._sums))


def avoids_clients(config: AlgorithmConfig, outputs: int) -> bool:
    """Raises ConfigError where there are no classes to part from the clients."""
    if config.head_invariance > 0 and (config.head_rule != "discriminant" or outputs < 2):
        raise ConfigError(
            "algorithm.head_invariance is for a discriminant of two classes or more",
            remedy="set it to 0, or algorithm.head_rule to 'discriminant'",
        )
    return config.head_invariance > 0


def between(sums: Mapping[str, Float64]) -> Float64:
    """(D, D): sum over the classes of (sum x)(sum x)^T / n."""
    counts = sums[TARGETS]
    present = counts > 0
    scaled = sums[CROSS][present] / np.sqrt(counts[present])[:, None]
    made: Float64 = scaled.T @ scaled
    return made


def zeros(shape: tuple[int, ...], rule: str) -> dict[str, Float64]:
    """The sums of nothing, for a layer of (outputs, features)."""
    outputs, features = shape
    made = {COUNT: np.zeros(()), FIRST: np.zeros(features), SECOND: np.zeros((features, features))}
    if rule != "whitening":
        made |= {TARGETS: np.zeros(outputs), CROSS: np.zeros((outputs, features))}
    return made


def add_examples(sums: dict[str, Float64], x: Float64, targets: npt.NDArray[Any]) -> None:
    """x: (N, D); targets: (N,) classes, (N,) numbers for one output, or (N, K)."""
    sums[COUNT] += float(len(x))
    sums[FIRST] += x.sum(0)
    sums[SECOND] += x.T @ x
    if TARGETS not in sums:
        return
    outputs = len(sums[TARGETS])
    if targets.ndim == 1 and outputs > 1:
        if targets.dtype.kind not in "iu" or targets.min(initial=0) < 0 or targets.max(initial=0) >= outputs:
            raise InputError(f"statistics_head: the targets are no classes from 0 to {outputs - 1}")
        y = np.eye(outputs)[targets]
    else:
        y = targets.astype(np.float64).reshape(len(x), -1)
    if y.shape != (len(x), outputs):
        raise InputError(f"statistics_head: targets {targets.shape} do not fit a layer of {outputs} outputs")
    sums[TARGETS] += y.sum(0)
    sums[CROSS] += y.T @ x


class HeadAggregator(MeanAggregator):
    """Sums of the clients' sums; nothing is weighted, nothing depends on who sent what."""

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__()
        self.config = config

    def expected(self, reference: Arrays) -> Arrays:
        weight, _ = head_of(reference, self.config.head)
        rule = self.config.head_rule
        if rule == "whitening" and reference[weight].shape[0] != reference[weight].shape[1]:
            raise ConfigError(
                f"algorithm.head_rule = 'whitening' needs a square layer, {weight} is {list(reference[weight].shape)}"
            )
        made = zeros(reference[weight].shape, rule)
        return {**made, OWN: made[SECOND].copy()} if avoids_clients(self.config, len(reference[weight])) else made

    def solved(self, reference: Arrays) -> frozenset[str]:
        return frozenset(head_of(reference, self.config.head))

    def screen(self, extra: Arrays, reference: Arrays, *, origin: str) -> None:
        super().screen(extra, reference, origin=origin)
        if not 0 < (count := float(extra[COUNT])) <= MAX_COUNT:
            raise IntegrityError(f"{origin}: beside the model: count = {count:g} is out of range")
        if len(extra.get(TARGETS, ())) > 1 and self.config.head_rule == "discriminant" and extra[TARGETS].min() < 0:
            raise IntegrityError(f"{origin}: beside the model: a class has less than no examples")
        for name in sorted({SECOND, OWN} & set(extra)):
            if np.diagonal(extra[name]).min() < 0 or not np.allclose(extra[name], extra[name].T, rtol=1e-6):
                raise IntegrityError(f"{origin}: beside the model: {name} is no sum of squares")

    def add(self, state: State, update: Update) -> None:
        super().add(state, update)
        for name, value in update.extra.items():
            key = SUMS + name
            if key not in state.sums:
                state.sums[key] = np.zeros(value.shape, np.float64)
            add_scaled(state.sums[key], value, 1.0)

    def finish(self, state: State) -> dict[str, npt.NDArray[Any]]:
        result = super().finish(state)
        if state.weight <= 0:
            return result
        names = head_of(state.reference, self.config.head)
        sums = {k.removeprefix(SUMS): v for k, v in state.sums.items() if k.startswith(SUMS)}
        for name, value in zip(names, solve(sums, self.config), strict=True):
            result[name] = cast_like(value, state.reference[name])
        return result


def solve(sums: Mapping[str, Float64], config: AlgorithmConfig) -> tuple[Float64, Float64]:
    """(weight (K, D), bias (K,)) from the sums over all examples."""
    count = float(sums[COUNT])
    mean = sums[FIRST] / count
    scatter = sums[SECOND] - count * np.outer(mean, mean)
    if config.head_rule == "whitening":
        half = half_inverse(scatter / count, config.head_shrinkage)
        # S^-1 = h h^T and, with the columns of h^T reversed, R^T R for the triangular R of its QR decomposition (signs made positive)
        upper: Float64 = np.linalg.qr(half.T[:, ::-1])[1]
        lower = upper[::-1, ::-1]
        weight = lower * np.sign(np.diagonal(lower))[:, None]
        return weight, -weight @ mean
    targets, cross = sums[TARGETS], sums[CROSS]
    if config.head_rule == "least_squares" or len(targets) == 1:
        half = half_inverse(scatter / count, config.head_shrinkage)
        weight = (cross - np.outer(targets, mean)) / count @ half @ half.T
        return weight, targets / count - weight @ mean
    present = targets > 0
    means = np.where(present[:, None], cross / np.maximum(targets, 1e-300)[:, None], mean)
    within = (sums[SECOND] - (means * targets[:, None]).T @ means) / count
    if OWN in sums:
        within = within + config.head_invariance * (sums[OWN] - between(sums)) / count
    half = half_inverse(within, config.head_shrinkage)
    weight = (means - mean) @ half @ half.T
    bias = -0.5 * (((means @ half) ** 2).sum(1) - ((mean @ half) ** 2).sum())
    if config.head_prior == "counts":
        bias = bias + np.log(np.maximum(targets, 1e-300) / targets.sum())
    bias[~present] = bias[present].min(initial=0.0) - ABSENT
    return weight, bias


def half_inverse(covariance: Float64, share: float) -> Float64:
    """(D, D) h with S^-1 = h h^T, S shrunk towards its diagonal: features of any scale, and no eigenvalue of the correlations below
    a millionth."""
    spread = np.sqrt(np.maximum(np.diagonal(covariance), 0))
    spread = np.maximum(spread, 1e-6 * float(spread.max(initial=0)) or 1.0)
    correlation = (covariance + covariance.T) / 2 / np.outer(spread, spread)
    values, vectors = np.linalg.eigh((1 - share) * correlation + share * np.eye(len(spread)))
    half: Float64 = vectors / np.sqrt(np.maximum(values, 1e-6)) / spread[:, None]
    return half


def build(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(HeadAggregator(config), MeasuredUpdate(config))
