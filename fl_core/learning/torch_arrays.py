"""Between torch modules and model arrays, and batched prediction."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fl_core.contracts.arrays import Arrays, check_like
from fl_core.learning.application import Application
from fl_core.learning.examples import Examples


def get_arrays(model: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Copies of all parameters and buffers, by name."""
    return {k: v.detach().cpu().numpy().copy() for k, v in model.state_dict().items()}


def set_arrays(model: nn.Module, arrays: Arrays, *, origin: str) -> None:
    """Load by name. Raises IntegrityError naming ``origin`` and the array that does not fit or is not finite."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    check_like(arrays, {name: tensor.cpu().numpy() for name, tensor in state.items()}, origin=origin)
    for name, tensor in state.items():
        value = arrays[name]
        tensor.copy_(torch.from_numpy(value if value.flags.writeable else np.array(value)))


def tensors(application: Application, config: Any, examples: Examples, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """The model's inputs in the order of ``forward``."""
    return tuple(
        torch.from_numpy(np.ascontiguousarray(examples.inputs[spec.name])).to(device)
        for spec in application.inputs(config)
    )


BATCH, BATCH_VALUES = 512, 2**21  # examples at once, and input values at once: volumes have many values each


def prediction_batch(examples: Examples) -> int:
    """How many examples to predict at once: activations take many times the memory of the inputs."""
    values = sum(math.prod(array.shape[1:]) for array in examples.inputs.values())
    return max(1, min(BATCH, BATCH_VALUES // max(1, values)))


def predict(
    model: nn.Module, application: Application, config: Any, examples: Examples, *, batch_size: int | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Outputs by name, each (N, ...); evaluation mode is set and the former mode restored."""
    batch_size = batch_size or prediction_batch(examples)
    names = [spec.name for spec in application.outputs(config)]
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    place = next(model.parameters())
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(examples), batch_size):
                batch = tensors(application, config, examples.take(slice(start, start + batch_size)))
                result = model(*(t.to(place) if t.is_floating_point() else t.to(place.device) for t in batch))
                for name, value in zip(names, result if isinstance(result, tuple) else (result,), strict=True):
                    parts[name].append(value.cpu().numpy())
    finally:
        model.train(training)
    specs = {spec.name: spec for spec in application.outputs(config)}
    return {n: np.concatenate(p) if p else np.zeros((0, *specs[n].shape[1:]), specs[n].dtype) for n, p in parts.items()}
