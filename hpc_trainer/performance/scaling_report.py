"""What ``fieldfleet scaling`` leaves behind: scaling.json, report.html, pictures; and its table on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fl_core.report import charts
from fl_core.report.page import Page
from fl_core.storage import atomic
from hpc_trainer.performance.scaling import PARTS, TOLERANCE

HEADINGS = (
    "processes", "batch", "ms a step", "95 %", "expected ms", "speed-up", "efficiency", "Karp-Flatt", "slowest/fastest",
    "loss deviation",
)  # fmt: skip


def write(document: dict[str, Any], out: Path) -> None:
    atomic.write_json(out / "scaling.json", document)
    page = Page(
        f"Scaling of {document['application']}",
        f"{document['steps']} steps each, {document['dtype']}, {document['cores']} cores. Against one process.",
    )
    page.cards([("bottleneck", document["bottleneck"].partition(":")[0]), *_cards(document)])
    page.text(document["bottleneck"])
    for mode, found in document["modes"].items():
        rows = found["rows"]
        page.section(f"{mode.capitalize()} scaling").table(HEADINGS, [cells(r) for r in rows]).text(law(found["law"]))
        for name, picture, caption in (
            ("speedup", speedup(mode, rows), "Speed-up and the ideal."),
            ("parts", parts(rows), "A step by what it is spent on; mean over ranks, median over steps."),
        ):
            atomic.write_bytes(out / f"{mode}-{name}.png", picture)
            page.picture(picture, f"{mode.capitalize()} scaling. {caption}")
    page.section("Traces").text("procs-*/trace-rank-*.json open in chrome://tracing or ui.perfetto.dev.")
    page.write(out / "report.html")


def _cards(document: dict[str, Any]) -> list[tuple[str, Any]]:
    facts = []
    for mode, found in document["modes"].items():
        last = found["rows"][-1]
        facts.append((f"{mode} efficiency at {last['processes']} processes", last["efficiency"]))
    worst = max(r["loss_deviation"] for f in document["modes"].values() for r in f["rows"])
    return [*facts, ("largest loss deviation", f"{worst:.1e}")]


def cells(row: dict[str, Any]) -> list[Any]:
    seconds = row["seconds"]
    mark = " (oversubscribed)" if row["oversubscribed"] else ""
    return [
        f"{row['processes']}{mark}",
        row["batch"],
        f"{1e3 * seconds['value']:.2f}",
        f"{1e3 * seconds['low']:.2f} to {1e3 * seconds['high']:.2f}",
        f"{1e3 * row['expected_seconds']:.2f}" if "expected_seconds" in row else None,
        f"{row['speedup']:.2f}",
        f"{100 * row['efficiency']:.0f} %",
        f"{row['karp_flatt']:.3f}" if row["karp_flatt"] is not None else None,
        f"{row['slowest_over_fastest']:.2f}",
        f"{row['loss_deviation']:.1e}",
    ]


def law(found: dict[str, Any]) -> str:
    if "refused" in found:
        return f"{found['name']}: no fit, {found['refused']}."
    s = found["serial_fraction"]
    beyond = ", ".join(f"{p['speedup']:.2f} at {p['processes']} processes" for p in found["predicted"])
    return (
        f"{found['name']}: serial fraction {s['value']:.3f}, 95 % from {s['low']:.3f} to {s['high']:.3f} ({found['points']} counts). "
        f"Extrapolated speed-up: {beyond}."
    )


def speedup(mode: str, rows: list[dict[str, Any]]) -> bytes:
    p = [float(r["processes"]) for r in rows]
    series = {"measured": (p, [r["speedup"] for r in rows]), "ideal": (p, p)}
    if all("expected_seconds" in r for r in rows):
        first = rows[0]["expected_seconds"]
        factor = [r["processes"] if mode == "weak" else 1 for r in rows]
        series["expected from the probe"] = (
            p,
            [first / r["expected_seconds"] * f for r, f in zip(rows, factor, strict=True)],
        )
    return charts.lines(series, x_label="processes", y_label="speed-up", title=f"{mode} scaling")


def parts(rows: list[dict[str, Any]]) -> bytes:
    table = {name: {f"{r['processes']} processes": 1e3 * r["parts"][name] for r in rows} for name in PARTS}
    return charts.bars(table, y_label="ms a step")


def show(document: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for mode, found in document["modes"].items():
        table = Table(title=f"{document['application']}, {mode} scaling, {document['dtype']}")
        for heading in HEADINGS:
            table.add_column(heading, justify="right", overflow="fold")
        for row in found["rows"]:
            table.add_row(*["–" if c is None else str(c) for c in cells(row)])
        console.print(table)
        console.print(law(found["law"]))
    limit = TOLERANCE[document["dtype"]]
    worst = max(r["loss_deviation"] for f in document["modes"].values() for r in f["rows"])
    console.print(f"largest loss deviation {worst:.1e} ({document['dtype']}: at most {limit:.0e} is rounding)")
    console.print(f"bottleneck: {document['bottleneck']}")
    console.print(f"{out / 'report.html'}")
