"""The model card: what a bundle is, where it comes from, and what was measured of it."""

from __future__ import annotations

from typing import Any

from fl_core.contracts.manifests import BundleManifest
from fl_core.learning.application import Application


def model_card(application: Application, manifest: BundleManifest) -> str:
    export = manifest.unknown.get("export", {})
    sections = (
        [f"# {application.title}", "", application.summary, ""],
        _lineage(manifest),
        _interface(manifest),
        _models(manifest, application.primary_metric),
        _metrics(manifest),
        [
            "## How it was measured",
            "",
            f"* Calibration, check and golden samples: {export.get('samples', 'unknown')}; "
            f"{export.get('check_examples', '?')} check samples.",
            f"* fp32 against torch: largest difference {export.get('parity', {}).get('max_abs', float('nan')):.3g} "
            f"({export.get('parity', {}).get('relative_max', float('nan')):.3g} of the output's scale).",
            f"* fp32: {export.get('fp32_bytes', 0):,} bytes, primary metric {_number(export.get('fp32_metric'))} "
            "on the check samples.",
            f"* Latency: one query at a time, one thread, on the exporting machine ({export.get('machine', 'unknown')}).",
            "* Energy: not measured.",
            "",
        ],
    )
    return "\n".join(line for section in sections for line in section)


def _lineage(manifest: BundleManifest) -> list[str]:
    lines = ["## Lineage", ""]
    for step in manifest.lineage:
        lines.append(
            f"* {step.get('stage', '?')}, step {step.get('step', '?')}, {step.get('created', '')}: "
            f"`{str(step.get('model_sha256', ''))[:16]}`"
        )
    clients = len(manifest.clients_seen)
    return [*lines, f"* exported {manifest.created}; trained on {clients} clients", ""]


def _interface(manifest: BundleManifest) -> list[str]:
    lines = ["## Interface", "", "| tensor | name | type | shape |", "|---|---|---|---|"]
    for kind, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            shape = " x ".join("batch" if d == -1 else str(d) for d in spec["shape"])
            lines.append(f"| {kind} | `{spec['name']}` | {spec['dtype']} | {shape} |")
    labels = [f"Classes: {', '.join(manifest.labels)}", ""] if manifest.labels else []
    return [*lines, "", *labels]


def _models(manifest: BundleManifest, metric: str) -> list[str]:
    lines = [
        "## Models",
        "",
        f"| edge target | file | precision | bytes | {metric} | score drift | p50 / p99 ms | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, facts in manifest.targets.items():
        timing = facts.get("latency_ms")
        latency = f"{timing['p50_ms']:.3f} / {timing['p99_ms']:.3f}" if timing else "not measured"
        lines.append(
            f"| {name} | `{facts['file']}` | {facts['precision']} | {facts['bytes']:,} | {_number(facts['metric'])} "
            f"| {facts['score_drift']:.2g} | {latency} | {facts['note'] or '-'} |"
        )
    return [*lines, ""]


def _metrics(manifest: BundleManifest) -> list[str]:
    if not manifest.metrics:
        return []
    lines = ["## Metrics of the checkpoint", "", "| metric | value |", "|---|---|"]
    return [*lines, *(f"| {name} | {_number(value)} |" for name, value in sorted(manifest.metrics.items())), ""]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
