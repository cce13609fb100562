"""A trained model as it lies in a folder, a checkpoint (torch) or a bundle (onnxruntime): its configuration and what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_core.contracts import bundle as bundles
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import InputError
from fl_core.learning.application import Application, Outputs
from fl_core.learning.examples import Examples

Predict = Callable[[Examples], Outputs]


@dataclass(frozen=True)
class Trained:
    """seen: the clients that it was trained on."""

    config: Any
    predict: Predict
    seen: tuple[str, ...]


def load(application: Application, folder: Path, overrides: Iterable[str] = ()) -> Trained:
    """Raises InputError for a model of another application; of a bundle the first target is taken."""
    is_bundle = bundles.is_bundle(folder)
    found: Any = bundles.open_bundle(folder) if is_bundle else checkpoints.load(folder)
    if found.manifest.application != application.name:
        raise InputError(f"{folder}: is a model of {found.manifest.application}, not of {application.name}")
    config = application.configure_from(found.manifest.config, overrides, origin=f"{folder}/manifest.json")
    make = _from_bundle if is_bundle else _from_checkpoint
    return Trained(config, make(application, config, found), tuple(found.manifest.clients_seen))


def _from_bundle(application: Application, config: Any, bundle: Any) -> Predict:
    from fl_core.runtime.session import open_session, run_application

    session = open_session(bundle, next(iter(bundle.manifest.targets)))
    return lambda examples: run_application(application, config, session, examples)


def _from_checkpoint(application: Application, config: Any, found: Any) -> Predict:
    from fl_core.learning.torch_arrays import predict, set_arrays

    model = application.build_model(config)
    set_arrays(model, found.arrays, origin="the checkpoint")
    return lambda examples: predict(model, application, config, examples)
