"""FedNova (Wang et al., NeurIPS 2020): clients may take different numbers of local steps without biasing the objective.

Client i's change is divided by ||a_i||_1, the weight that its local solver gives to a constant gradient (its number of
steps, for plain SGD), and the mean of the normalised changes is scaled back (equation 7):

    x <- x + global_lr * tau_eff * sum_i p_i (y_i - x) / ||a_i||_1,    tau_eff = sum_i p_i ||a_i||_1,    p_i by examples

so that equal work is FedAvg exactly. Momentum and a proximal term (``algorithm.fednova_mu``) change a_i, not the rule.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.algorithms.base import (
    Algorithm,
    ClientUpdate,
    GradientTerms,
    LocalEnd,
    LocalWork,
    MeanAggregator,
    State,
    Update,
    add_scaled,
    cast_like,
    stepped_names,
)
from fl_core.contracts.arrays import Arrays
from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.contracts.sections import AlgorithmConfig, OptimizerConfig

STEPS, MAX_STEPS = "steps", 1e12
NORMALISED, WORK = "normalised/", "work/steps"


def effective_steps(steps: int, *, lr: float, momentum: float = 0.0, mu: float = 0.0) -> float:
    """||a||_1: how far ``steps`` of SGD go against a constant gradient of 1, in units of ``lr`` (section 3 of the paper).

    The solver's own recurrence, run on that gradient: v <- momentum v + 1 - lr mu d, d <- d + v. Its closed forms:
    steps; (1 - (1 - lr mu)^steps) / (lr mu) with a proximal term alone; the paper's sum of geometric series with momentum.
    """
    if not momentum and not mu:
        return float(steps)
    velocity = distance = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1.0 - lr * mu * distance
        distance += velocity
    return distance


def check_sgd(name: str, optimizer: OptimizerConfig) -> None:
    if optimizer.name != "sgd":
        raise InputError(
            f"algorithm {name!r} is defined for local SGD, not for optimizer.name = {optimizer.name!r}",
            remedy="--set optimizer.name=sgd",
        )


class NormalisedUpdate(ClientUpdate):
    def __init__(self, mu: float) -> None:
        self.mu = mu

    def check(self, optimizer: OptimizerConfig) -> None:
        check_sgd("fednova", optimizer)

    def terms(self) -> GradientTerms:
        return GradientTerms(proximal=self.mu)

    def finish(self, work: LocalWork) -> LocalEnd:
        found = effective_steps(work.steps, lr=work.lr, momentum=work.momentum, mu=self.mu)
        return LocalEnd(extra={STEPS: np.array(found, np.float64)})


class NormalisedAggregator(MeanAggregator):
    """Sums of n_i (y_i - x) / a_i beside those of n_i y_i (which running statistics and counters are averaged by)."""

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__()
        self.global_lr = config.global_lr

    def expected(self, reference: Arrays) -> Arrays:
        return {STEPS: np.array(1.0, np.float64)}

    def screen(self, extra: Arrays, reference: Arrays, *, origin: str) -> None:
        super().screen(extra, reference, origin=origin)
        if not 0 < (steps := float(extra[STEPS])) <= MAX_STEPS:
            raise IntegrityError(f"{origin}: beside the model: steps = {steps:g} is out of range")

    def add(self, state: State, update: Update) -> None:
        super().add(state, update)
        steps = float(update.extra[STEPS])
        state.sums[WORK] = state.sums.get(WORK, np.zeros(())) + update.weight * steps
        for name in stepped_names(state.reference):
            key = NORMALISED + name
            if key not in state.sums:
                state.sums[key] = np.zeros(state.reference[name].shape, np.float64)
            add_scaled(state.sums[key], update.arrays[name], update.weight / steps)
            add_scaled(state.sums[key], state.reference[name], -update.weight / steps)

    def finish(self, state: State) -> dict[str, npt.NDArray[Any]]:
        result = super().finish(state)
        if state.weight <= 0:
            return result
        scale = self.global_lr * float(state.sums[WORK]) / state.weight
        for name in stepped_names(state.reference):
            reference = state.reference[name]
            moved = reference.astype(np.float64) + scale * state.sums[NORMALISED + name] / state.weight
            result[name] = cast_like(moved, reference)
        return result


def build(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(NormalisedAggregator(config), NormalisedUpdate(config.fednova_mu))
