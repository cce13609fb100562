"""report.html of the demo: curves, per-client results, model size and latency, lineage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fieldfleet.demo import model_lineage
from fl_core.learning.application import Application
from fl_core.report import charts
from fl_core.report.page import Page


def write_html_report(out: Path, app: Application, results: dict[str, Any]) -> None:
    metric = app.primary_metric
    evaluation = results["evaluation"]
    page = Page(
        f"fieldfleet: {app.title}, from pretraining to the devices",
        f"{app.summary} Data: {results['data']['origin']}. The figures below are on {app.client_term}s that no training saw.",
    )
    page.cards(headline(app, results))
    page.section("Learning curves")
    page.picture(
        curves(app, results),
        f"Pretraining at the centre, then the federation over {len(results['memory_mb'])} agents; {metric} on each client's own validation data.",
    )
    page.section(f"The three models on unseen {app.client_term}s")
    names = list(evaluation["global"]["metrics"])
    rows = []
    for name, found in evaluation.items():
        rows.append([name, found["num_examples"], *(found["metrics"].get(n) for n in names)])
        rows += [
            [f"{name}: {group}", g["num_examples"], *(g["metrics"].get(n) for n in names)]
            for group, g in found["groups"].items()
        ]
    page.table(["model", "examples", *names], rows)
    page.section("Per client")
    scored = [r for r in results["federation"] if r["client_evaluation"]]
    if scored:
        shown = {f"after round {r['round']}": client_values(r, metric) for r in (scored[0], scored[-1])}
        page.picture(charts.bars(shown, y_label=metric), "Each agent's own validation data.")
    page.table(
        ["device", app.client_term + "s", "training examples", "inferences", "model version", "resident MB"],
        [device_row(name, results) for name in results["memory_mb"]],
    )
    page.section("The model on the device")
    page.table(
        ["target", "precision", "kB", "p50 ms", "p90 ms", "largest deviation from torch"],
        [target_row(t, f) for t, f in results["bundle"]["targets"].items()],
    )
    service = results["service"]
    page.text(
        f"Other programs on the device reach the model over gRPC (Open Inference Protocol): {service['examples']} golden samples "
        f"in {service['ms']:.1f} ms, largest deviation {service['max_abs']:.2g}."
    )
    page.section("Lineage")
    page.picture(
        charts.lineage(model_lineage(out, results["publish"]["version"])),
        "Each model names its parent by sha256; the chain is checked when this page is made.",
    )
    page.text(f"The whole job took {results['seconds']:.0f} s.")
    page.write(out / "report.html")


def client_values(record: dict[str, Any], metric: str) -> dict[str, float]:
    return {name: values[metric] for name, values in record["client_evaluation"].items() if metric in values}


def headline(app: Application, results: dict[str, Any]) -> list[tuple[str, Any]]:
    metric, evaluation = app.primary_metric, results["evaluation"]
    facts = next(iter(results["bundle"]["targets"].values()))
    return [
        (f"{metric}, pretrained", evaluation["pretrained"]["metrics"].get(metric)),
        (f"{metric}, federated", evaluation["global"]["metrics"].get(metric)),
        (f"{metric}, on the device", evaluation["bundle"]["metrics"].get(metric)),
        ("kB of model on the device", kilobytes(facts)),
        ("ms for one inference (median)", latency(facts, "p50_ms")),
        ("rounds", len(results["federation"])),
    ]


def curves(app: Application, results: dict[str, Any]) -> bytes:
    metric = app.primary_metric
    epochs, rounds = results["pretrain"]["history"], results["federation"]
    loss = {
        "pretraining (epochs)": ([e["epoch"] for e in epochs], [e["loss"] for e in epochs]),
        "federation (rounds)": (
            [r["round"] for r in rounds if r["loss"] is not None],
            [r["loss"] for r in rounds if r["loss"] is not None],
        ),
    }
    scored = [r for r in rounds if metric in r["evaluation"]]
    quality = {
        "pretraining (epochs)": (
            [e["epoch"] for e in epochs if metric in e["validation"]],
            [e["validation"][metric] for e in epochs if metric in e["validation"]],
        ),
        "federation (rounds)": ([r["round"] for r in scored], [r["evaluation"][metric] for r in scored]),
    }
    return charts.two_panels(loss, quality, x_label="epoch or round", y_labels=("training loss", metric))


def device_row(name: str, results: dict[str, Any]) -> list[Any]:
    examples = next(
        (r["num_examples"][name] for r in reversed(results["federation"]) if name in r["num_examples"]), None
    )
    reply = results["replies"][name]["infer"]
    return [
        name,
        results["data"]["shares"][name],
        examples,
        find(reply, "count", "num_examples", "examples"),
        find(reply, "version", "model_version"),
        f"{results['memory_mb'][name]:.0f}",
    ]


def find(value: Any, *names: str) -> Any:
    """The first of these keys anywhere in a reply."""
    if isinstance(value, dict):
        for name in names:
            if name in value:
                return value[name]
        for inner in value.values():
            if (found := find(inner, *names)) is not None:
                return found
    return None


def kilobytes(facts: dict[str, Any]) -> str:
    return f"{facts['bytes'] / 1000:.1f}"


def latency(facts: dict[str, Any], name: str) -> Any:
    return find(facts.get("latency_ms", {}), name, name.removesuffix("_ms"))


def target_row(target: str, facts: dict[str, Any]) -> list[Any]:
    return [
        target,
        facts.get("precision"),
        kilobytes(facts),
        latency(facts, "p50_ms"),
        latency(facts, "p90_ms"),
        find(facts.get("parity", {}), "max_abs"),
    ]
