"""Checkpoint -> compact ONNX -> verified bundle. All or nothing: a gate that is missed leaves no folder behind."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from edge_export import gates, onnx_file, samples
from edge_export.card import model_card
from edge_export.target import EdgeTarget, edge_target
from edge_export.variants import Reference, Variant, build_variant
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.bundle import CARD_NAME, GOLDEN_NAME, SUMS_NAME, open_bundle
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import ConfigError
from fl_core.contracts.manifests import MANIFEST_NAME, BundleManifest, to_json
from fl_core.learning.application import Application, application
from fl_core.learning.examples import Examples
from fl_core.learning.torch_arrays import predict, set_arrays
from fl_core.runtime.golden import FP32, Golden, golden_check, write_golden
from fl_core.runtime.machine import cpu_flags
from fl_core.runtime.parity import ParityReport, compare
from fl_core.runtime.session import Session
from fl_core.runtime.timing import measure
from fl_core.storage import atomic

Report = Callable[[str], None]


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    calibration: Path | None = None,
    overrides: Iterable[str] = (),
    *,
    report: Report = lambda line: None,
) -> BundleManifest:
    """Write the bundle ``out`` and return its manifest (version 0: ``publish`` numbers it).

    ``calibration`` is a folder in the application's format; without it the application's generator gives the samples.
    ``report`` is told of each step. Raises GoalMissed when fp32 does not match torch, InputError for the rest.
    """
    loaded = checkpoints.load(checkpoint)
    app = application(loaded.manifest.application)
    config = app.configure_from(loaded.manifest.config, overrides, origin=f"{checkpoint}/manifest.json")
    targets = [edge_target(name) for name in config.export.targets]
    if not targets or len({t.name for t in targets}) != len(targets):
        raise ConfigError("export.targets must name at least one edge target, each once")
    report("samples")
    drawn = samples.collect(app, config, calibration)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="fieldfleet-export-") as scratch:
            work = Path(scratch)
            reference, parity = build_reference(app, config, loaded, drawn, work, report)
            variants = [build_one(app, config, t, reference, drawn, work, report) for t in targets]
            report("bundle")
            return write_bundle(app, config, loaded, drawn, reference, parity, variants, out)
    finally:
        torch.set_num_threads(threads)


def build_reference(
    app: Application, config: Any, loaded: Checkpoint, drawn: samples.Samples, work: Path, report: Report
) -> tuple[Reference, ParityReport]:
    """The fp32 model, held to torch on the check samples."""
    model = app.build_model(config)
    set_arrays(model, loaded.arrays, origin="model.safetensors")
    report("onnx")
    path = work / "model.fp32.onnx"
    onnx_file.write_onnx(model, app, config, drawn.check, path, opset=config.export.opset)
    session = Session(path)
    outputs = session.run(drawn.check.inputs)
    report("parity")
    parity = against_torch(model, app, config, drawn.check, outputs)
    gates.check_fp32(parity, config.export.parity_tolerance)
    metric = gates.primary_metric(app, config, outputs, drawn.check)
    return Reference(path, session, outputs, metric, measure(session, drawn.golden.take(slice(0, 1)).inputs)), parity


def against_torch(
    model: torch.nn.Module, app: Application, config: Any, check: Examples, outputs: gates.Outputs
) -> ParityReport:
    """Of onnxruntime's outputs; ``model`` may be in float64 afterwards.

    Where float32 torch is further off than ``export.parity_tolerance``, float64 torch is asked, at up to twenty times the work: its float32
    convolutions may be the ones that round (oneDNN's: 1.2e-4 of plant_anomaly's reconstruction, where onnxruntime was 2.4e-6 off).
    """
    found = compare(predict(model, app, config, check), outputs)
    if found.relative_max <= config.export.parity_tolerance:
        return found
    return compare(predict(model.double(), app, config, check), outputs)


def build_one(
    app: Application,
    config: Any,
    target: EdgeTarget,
    reference: Reference,
    drawn: samples.Samples,
    work: Path,
    report: Report,
) -> Variant:
    report(f"int8 for {target.name}" if target.precisions[0] == "int8" else f"fp32 for {target.name}")
    variant = build_variant(app, config, target, reference, drawn, work)
    report(f"{target.name}: {variant.precision}, {variant.path.stat().st_size:,} bytes {variant.note}".rstrip())
    return variant


def write_bundle(
    app: Application,
    config: Any,
    loaded: Checkpoint,
    drawn: samples.Samples,
    reference: Reference,
    parity: ParityReport,
    variants: list[Variant],
    out: Path,
) -> BundleManifest:
    """The folder appears only when it is whole and every model has passed the self-test of a device."""
    parent, lineage = checkpoints.child_lineage(loaded)
    with atomic.new_folder(out) as folder:
        for variant in variants:
            shutil.copyfile(variant.path, folder / variant.path.name)
        golden = {FP32: reference.session.run(drawn.golden.inputs), **{v.target.name: v.golden for v in variants}}
        write_golden(folder / GOLDEN_NAME, Golden(drawn.golden.inputs, golden))
        manifest = BundleManifest(
            application=app.name,
            config=to_table(config),
            version=0,
            parent_sha256=parent,
            inputs=[asdict(spec) for spec in app.inputs(config)],
            outputs=[asdict(spec) for spec in app.outputs(config)],
            targets={
                v.target.name: {"file": v.path.name, **file_facts(folder / v.path.name), **v.facts()} for v in variants
            },
            files={},
            labels=list(app.labels(config)),
            lineage=lineage,
            metrics=dict(loaded.manifest.metrics),
            clients_seen=list(loaded.manifest.clients_seen),
            created=checkpoints.now(),
            versions={**checkpoints.versions(), "onnxruntime": onnxruntime.__version__, "torch": torch.__version__},
            unknown={"export": export_facts(app, config, drawn, reference, parity)},
        )
        (folder / CARD_NAME).write_text(model_card(app, manifest), encoding="utf-8")
        names = [GOLDEN_NAME, CARD_NAME, *(v.path.name for v in variants)]
        manifest = dataclasses.replace(manifest, files={name: file_facts(folder / name) for name in sorted(names)})
        atomic.write_json(folder / MANIFEST_NAME, to_json(manifest))
        write_sums(folder, manifest)
        for variant in variants:
            if variant.target.runs_here():
                golden_check(open_bundle(folder), variant.target.name)
    return open_bundle(out).manifest


def file_facts(path: Path) -> dict[str, Any]:
    return {"sha256": atomic.sha256_file(path), "bytes": path.stat().st_size}


def write_sums(folder: Path, manifest: BundleManifest) -> None:
    """SHA256SUMS over the manifest and the files it names, in the form of ``sha256sum -c``."""
    names = sorted([MANIFEST_NAME, *manifest.files])
    lines = [f"{atomic.sha256_file(folder / name)}  {name}\n" for name in names]
    (folder / SUMS_NAME).write_text("".join(lines), encoding="ascii")


def export_facts(
    app: Application, config: Any, drawn: samples.Samples, reference: Reference, parity: ParityReport
) -> dict[str, Any]:
    return {
        "opset": config.export.opset,
        "samples": drawn.origin,
        "calibration_examples": len(drawn.calibration),
        "check_examples": len(drawn.check),
        "primary_metric": app.primary_metric,
        "fp32_metric": reference.metric,
        "fp32_bytes": reference.path.stat().st_size,
        "fp32_latency_ms": reference.timing.to_json(),
        "parity": parity.to_json(),
        "machine": " ".join([platform.machine(), *cpu_flags()]),
    }
