"""One ONNX model in onnxruntime: checked inputs, run in batches, small in memory; an application's model on examples.

Torch-free: for ``evaluate``, the agent and the gates of the export alike.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts.bundle import Bundle
from fl_core.contracts.errors import EnvironmentFault, InputError, IntegrityError
from fl_core.learning.application import Application, TensorSpec
from fl_core.learning.examples import Examples
from fl_core.runtime.machine import local_target

Array = npt.NDArray[Any]
MAX_MODEL_BYTES = 1 << 30
MAX_INPUT_BYTES = 1 << 30
DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int16)": "int16",
    "tensor(uint16)": "uint16",
    "tensor(int32)": "int32",
    "tensor(uint32)": "uint32",
    "tensor(int64)": "int64",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """One thread and no memory arena by default: a device shares its processor and its memory with other work."""

    threads: int = 1
    optimize: bool = True
    arena: bool = False


class Session:
    """An onnxruntime session over one model file; ``inputs`` and ``outputs`` are the model's own tensors.

    Every tensor's first dimension is the batch. Raises IntegrityError when the model cannot be loaded and
    EnvironmentFault when onnxruntime is not installed. ``run`` may be called from several threads.
    """

    def __init__(self, model: Path, options: SessionOptions | None = None) -> None:
        self.path = model
        started = time.perf_counter()
        self._session = _load(model, options or SessionOptions())
        self.load_ms = (time.perf_counter() - started) * 1e3
        self.inputs = tuple(_spec(node, model) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node, model) for node in self._session.get_outputs())

    def check(self, inputs: Mapping[str, Array]) -> int:
        """The batch size. Raises InputError naming the first input that is missing, unknown, or of a wrong type or shape."""
        return check_inputs(self.inputs, inputs, origin=self.path.name)

    def run(self, inputs: Mapping[str, Array], *, batch_size: int = 64) -> dict[str, Array]:
        """All outputs by name, each with the batch as its first dimension; at most ``batch_size`` examples at once."""
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        count = self.check(inputs)
        names = [spec.name for spec in self.outputs]
        if count == 0:
            return {s.name: np.zeros((0, *(max(d, 0) for d in s.shape[1:])), s.dtype) for s in self.outputs}
        parts = []
        for start in range(0, count, batch_size):
            feed = {name: np.ascontiguousarray(array[start : start + batch_size]) for name, array in inputs.items()}
            parts.append(self._run_once(names, feed))
        if len(parts) == 1:
            return dict(zip(names, parts[0], strict=True))
        return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}

    def _run_once(self, names: list[str], feed: dict[str, Array]) -> list[Array]:
        try:
            return list(self._session.run(names, feed))
        except Exception as error:  # onnxruntime's own exception classes are private
            raise InputError(f"{self.path.name}: the model refused its inputs: {_first_line(error)}") from None


def check_inputs(specs: tuple[TensorSpec, ...], inputs: Mapping[str, Array], *, origin: str) -> int:
    """The common batch size of ``inputs``. Raises InputError naming the input and what was expected."""
    expected = {spec.name: spec for spec in specs}
    odd = sorted(set(inputs) ^ set(expected))
    if odd:
        kind = "unknown" if odd[0] in inputs else "missing"
        raise InputError(f"{origin}: input {odd[0]!r} is {kind}", remedy=f"inputs: {', '.join(expected)}")
    counts = set()
    for name, spec in expected.items():
        array = inputs[name]
        fits = len(array.shape) == len(spec.shape) and all(
            want in (-1, got) for want, got in zip(spec.shape, array.shape, strict=False)
        )
        if str(array.dtype) != spec.dtype or not fits:
            raise InputError(
                f"{origin}: input {name!r} is {array.dtype}{list(array.shape)}",
                remedy=f"it must be {spec.dtype}{list(spec.shape)}, where -1 is the batch",
            )
        counts.add(array.shape[0])
    if len(counts) > 1:
        raise InputError(f"{origin}: the inputs differ in their batch: {sorted(counts)}")
    total = sum(array.nbytes for array in inputs.values())
    if total > MAX_INPUT_BYTES:
        raise InputError(f"{origin}: {total:,} bytes of input, over the limit of {MAX_INPUT_BYTES:,}")
    return counts.pop() if counts else 0


def choose_target(bundle: Bundle, target: str | None = None) -> str:
    """``target``, else this machine's, else the bundle's first. Raises InputError with the bundle's list."""
    if target is not None:
        bundle.model_file(target)
        return target
    if not bundle.manifest.targets:
        raise InputError(f"{bundle.folder}: the bundle holds no model")
    local = local_target()
    return local if local in bundle.manifest.targets else next(iter(bundle.manifest.targets))


def open_session(bundle: Bundle, target: str | None = None, *, threads: int = 1) -> Session:
    """Of a target that is not this machine's, the model is run as it is written: its int8 kernels may overflow here."""
    chosen = choose_target(bundle, target)
    return Session(bundle.model_file(chosen), SessionOptions(threads=threads, optimize=chosen == local_target()))


def run_application(
    application: Application, config: Any, session: Session, examples: Examples, *, batch_size: int = 64
) -> dict[str, Array]:
    """The model's raw outputs by name, (N, ...) each; ``application.postprocess`` makes columns of them.

    Raises InputError when the examples are not what the application's configuration says the model takes.
    """
    check_inputs(application.inputs(config), examples.inputs, origin=application.name)
    return session.run(examples.inputs, batch_size=batch_size)


def predict(
    application: Application,
    config: Any,
    bundle: Bundle,
    examples: Examples,
    *,
    target: str | None = None,
    batch_size: int = 64,
) -> dict[str, Array]:
    """Outputs of a bundle's model on ``examples``, without torch: the same names and shapes as the torch model's."""
    return run_application(application, config, open_session(bundle, target), examples, batch_size=batch_size)


def _load(model: Path, options: SessionOptions) -> Any:
    try:
        import onnxruntime as ort
    except ImportError:
        raise EnvironmentFault("onnxruntime is not installed", remedy="pip install 'fieldfleet[edge]'") from None
    if not model.is_file():
        raise IntegrityError(f"{model}: no such file")
    if model.stat().st_size > MAX_MODEL_BYTES:
        raise IntegrityError(f"{model}: larger than {MAX_MODEL_BYTES:,} bytes")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    settings.enable_cpu_mem_arena = options.arena
    settings.enable_mem_pattern = options.arena
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not options.optimize:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception classes are private
        raise IntegrityError(f"{model}: onnxruntime cannot load it: {_first_line(error)}") from None


def _spec(node: Any, model: Path) -> TensorSpec:
    if node.type not in DTYPES:
        raise IntegrityError(f"{model}: tensor {node.name!r} has the type {node.type}, which is not supported")
    return TensorSpec(
        name=node.name, dtype=DTYPES[node.type], shape=tuple(d if isinstance(d, int) else -1 for d in node.shape)
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
