"""What this device can do, for the server that decides whom to ask. Nothing is imported to find out."""

from __future__ import annotations

import platform
from typing import Any

from fl_clients.edge.settings import AgentSettings
from fl_core.contracts.installed import application_version, is_installed, known_applications, package_version
from fl_core.runtime.machine import local_target

TRAINING_PACKAGES = ("torch", "flwr")
RUNTIME_PACKAGES = ("fieldfleet", "onnxruntime", "torch", "numpy")


def missing_for_training() -> str:
    """The first package that training needs and this device has not; "" where it has all."""
    return next((name for name in TRAINING_PACKAGES if not is_installed(name)), "")


def capabilities(settings: AgentSettings, *, train: bool, infer: bool, serve: bool) -> dict[str, Any]:
    """applications: name -> version of its package. roles: what was asked of this device and is installed."""
    names = settings.device.names or tuple(known_applications())
    versions = {name: version for name in names if (version := application_version(name)) is not None}
    runtime = {name: version for name in RUNTIME_PACKAGES if (version := package_version(name)) is not None}
    targets = {settings.of(name).target or local_target() for name in versions}
    return {
        "applications": versions,
        "roles": {
            "train": train and not missing_for_training(),
            "infer": infer and is_installed("onnxruntime"),
            "serve": serve and is_installed("grpc"),
        },
        "runtime": {**runtime, "python": platform.python_version()},
        "targets": sorted(targets or {local_target()}),
    }
