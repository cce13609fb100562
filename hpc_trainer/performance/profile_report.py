"""What ``fieldfleet profile`` leaves behind: profile.json, report.html, a picture of each scan; and its tables on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fl_core.report import charts
from fl_core.report.page import Page
from fl_core.storage import atomic

UNITS = {"seconds": (1e3, "ms"), "memory_bytes": (1e-6, "MB")}
NAMES = {"seconds": "time of a step", "memory_bytes": "memory above that between steps"}


def write(document: dict[str, Any], out: Path) -> None:
    atomic.write_json(out / "profile.json", document)
    page = Page(
        f"Profile of {document['application']}",
        f"{document['steps']} steps at each size, {document['processes']} processes, float32. Power: of a straight line through the logarithms, "
        "with its 95 % interval; formula: of the leading term of the work; counted: of the work counted at the same sizes.",
    )
    for scan in document["scans"]:
        page.section(f"{scan['dimension']} ({' and '.join(scan['keys'])})")
        for kind, name in NAMES.items():
            page.text(name.capitalize()).table(headings(scan, kind), rows(scan, kind))
        picture = draw(scan)
        atomic.write_bytes(out / f"{scan['dimension']}.png", picture)
        page.picture(picture, f"Time and memory of each stage by {scan['dimension']}; powers are straight lines.")
    page.write(out / "report.html")


def headings(scan: dict[str, Any], kind: str) -> list[str]:
    return [f"stage, {UNITS[kind][1]}", *map(str, scan["sizes"]), "power", "formula", "counted"]


def rows(scan: dict[str, Any], kind: str) -> list[list[str | None]]:
    found: list[list[str | None]] = []
    for stage, facts in scan["stages"].items():
        one = facts[kind]
        power = one["exponent"]
        found.append(
            [
                stage,
                *(f"{UNITS[kind][0] * v:.3g}" for v in one["values"]),
                f"{power['value']:.2f} ({power['low']:.2f} to {power['high']:.2f})" if power else None,
                None if one["formula"] is None else str(one["formula"]),
                None if one["counted"] is None else f"{one['counted']:.2f}",
            ]
        )
    return found


def draw(scan: dict[str, Any]) -> bytes:
    def panel(kind: str) -> dict[str, tuple[list[float], list[float]]]:
        """Stages with a power; where none has one (all too small), whatever there is to show."""
        fitted = {n: f for n, f in scan["stages"].items() if f[kind]["exponent"]}
        drawn = {}
        for stage, facts in (fitted or scan["stages"]).items():
            points = [
                (float(size), UNITS[kind][0] * value)
                for size, value in zip(scan["sizes"], facts[kind]["values"], strict=True)
                if value > 0
            ]
            if points:
                drawn[stage] = ([x for x, _ in points], [y for _, y in points])
        return drawn

    labels = ("ms a step", "MB above that between steps")
    return charts.two_panels(
        panel("seconds"), panel("memory_bytes"), x_label=" = ".join(scan["keys"]), y_labels=labels, logarithmic=True
    )


def show(document: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for scan in document["scans"]:
        for kind, name in NAMES.items():
            table = Table(title=f"{document['application']}, {scan['dimension']}: {name}")
            for heading in headings(scan, kind):
                table.add_column(
                    heading, justify="right", overflow="fold", min_width=8 if heading.startswith("stage") else None
                )
            for row in rows(scan, kind):
                table.add_row(*["–" if c is None else c for c in row])
            console.print(table)
    console.print(f"{out / 'report.html'}")
