"""Shampoo (Gupta, Koren & Singer, ICML 2018, arXiv:1802.09568) in the blocked, grafted form of Anil et al. (arXiv:2002.09018).

pytorch-optimizer's ScalableShampoo: statistics of every dimension in blocks of ``max_factor``, their inverse roots every
``update_every`` steps, and in each tensor the norm of an RMSProp step, so that learning rates are Adam's. Its state lies in
objects; here it is told as tensors, so that checkpoints hold arrays alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from pytorch_optimizer import ScalableShampoo

from fl_core.contracts.sections import OptimizerConfig
from fl_core.optimizers import trainable

RMSPROP = 3  # LayerWiseGrafting.RMSPROP


def build(
    model: torch.nn.Module, config: OptimizerConfig, group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    return Shampoo(
        trainable(model),
        lr=config.lr,
        betas=(config.momentum or 0.9, config.decay),
        moving_average_for_momentum=True,
        weight_decay=config.weight_decay,
        decoupled_weight_decay=True,
        start_preconditioning_step=config.update_every,
        preconditioning_compute_steps=config.update_every,
        block_size=config.max_factor,
        graft_type=RMSPROP,
        matrix_eps=1e-6,
        nesterov=False,
    )


class Shampoo(ScalableShampoo):  # type: ignore[misc]
    def state_dict(self) -> dict[str, Any]:
        document: dict[str, Any] = super().state_dict()
        document["state"] = {index: _tensors(entries) for index, entries in document["state"].items()}
        return document

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters]
        for index, parameter in enumerate(parameters):  # the library makes its objects where it sees a gradient
            parameter.grad = torch.zeros_like(parameter) if index in state_dict["state"] else None
        for group in self.param_groups:
            self.init_group(group)
        for index, parameter in enumerate(parameters):
            parameter.grad = gradients[index]
            if index in state_dict["state"]:
                _restore(self.state[parameter], state_dict["state"][index])


def _tensors(entries: dict[str, Any]) -> dict[str, Any]:
    conditioner, graft = entries["pre_conditioner"], entries["graft"]
    return {
        "momentum": entries["momentum"],
        "statistics": list(conditioner.statistics),
        "roots": list(conditioner.pre_conditioners),
        "graft_momentum": graft.momentum,
        "graft_statistics": graft.statistics,
    }


def _restore(entries: dict[str, Any], stored: dict[str, Any]) -> None:
    conditioner, graft = entries["pre_conditioner"], entries["graft"]
    entries["momentum"].copy_(stored["momentum"])
    for mine, theirs in (
        (conditioner.statistics, stored.get("statistics", [])),
        (conditioner.pre_conditioners, stored.get("roots", [])),
    ):
        for place, value in zip(mine, theirs, strict=True):
            place.copy_(value)
    graft.momentum.copy_(stored["graft_momentum"])
    graft.statistics.copy_(stored["graft_statistics"])
