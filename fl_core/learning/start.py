"""A checkpoint to start training from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.arrays import check_like
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.errors import InputError, IntegrityError
from fl_core.learning.application import Application
from fl_core.learning.torch_arrays import get_arrays


def start_from(application: Application, config: Any, folder: Path) -> Checkpoint:
    """Raises InputError for a checkpoint of another application or another model, IntegrityError for a damaged one."""
    start = checkpoints.load(folder)
    if start.manifest.application != application.name:
        raise InputError(f"--from {folder}: is a checkpoint of {start.manifest.application}, not of {application.name}")
    try:
        check_like(start.arrays, get_arrays(application.build_model(config)), origin=f"--from {folder}")
    except IntegrityError as error:
        remedy = "its model has another configuration: repeat the --set model.* options it was made with"
        raise InputError(error.message, remedy=remedy) from None
    return start
