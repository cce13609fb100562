"""``fieldfleet evaluate``: a checkpoint (torch) or a bundle (onnxruntime) on data in the training format."""

from __future__ import annotations

import argparse
import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts import bundle as bundles
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.cli import Subparsers, command, emit
from fl_core.contracts.errors import InputError
from fl_core.learning.application import Application, application
from fl_core.learning.examples import Examples
from fl_core.learning.sources import data_option, open_data
from fl_core.storage import atomic

UNSEEN, SEEN = "unseen_clients", "seen_clients"


def add_commands(subparsers: Subparsers) -> None:
    parser = command(subparsers, "evaluate", run_evaluate, help="print a model's metrics on data")
    parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint or bundle folder")
    data_option(parser)
    parser.add_argument("--app", metavar="APP", help="the application (default: the one in the manifest)")
    parser.add_argument("--target", metavar="TARGET", help="of a bundle: the edge target (default: the first)")
    parser.add_argument("--predictions", type=Path, metavar="FILE.csv", help="write one row an example")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write the scores and pictures as a page")


def run_evaluate(args: argparse.Namespace) -> int:
    is_bundle = bundles.is_bundle(args.model)
    manifest: Any
    loaded: Any
    if is_bundle:
        loaded = bundles.open_bundle(args.model)
    else:
        loaded = checkpoints.load(args.model)
    manifest = loaded.manifest
    app = application(args.app or manifest.application)
    if app.name != manifest.application:
        raise InputError(f"{args.model}: is a model of {manifest.application}, not of {app.name}")
    config = app.configure_from(manifest.config, args.overrides, origin=f"{args.model}/manifest.json")
    found = open_data(app, config, args.data, seed=args.seed)
    examples = found.raw.examples(config)
    if len(examples) == 0:
        raise InputError(f"{found.origin}: holds no example that {app.name} can use")
    if is_bundle:
        from fl_core.runtime.session import predict as predict_bundle

        target = args.target or next(iter(manifest.targets))
        outputs = predict_bundle(app, config, loaded, examples, target=target)
    else:
        outputs = predict_checkpoint(app, config, loaded, examples)
    document = {
        "application": app.name,
        "model": str(args.model),
        "kind": "bundle" if is_bundle else "checkpoint",
        "data": found.origin,
        "num_examples": len(examples),
        "num_clients": len(examples.clients()),
        "metrics": finite(app.metrics(config, outputs, examples)),
        "groups": grouped(app, config, outputs, examples, manifest.clients_seen),
    }
    if args.predictions:
        write_predictions(args.predictions, app, config, outputs, examples)
    if args.report:
        write_report(args.report, document, app, config, outputs, examples)
    emit(args, document, lambda: print_table(document, app))
    return 0


def predict_checkpoint(
    app: Application, config: Any, found: checkpoints.Checkpoint, examples: Examples
) -> dict[str, npt.NDArray[Any]]:
    from fl_core.learning.torch_arrays import predict, set_arrays

    model = app.build_model(config)
    set_arrays(model, found.arrays, origin="the checkpoint")
    return predict(model, app, config, examples)


def grouped(
    app: Application, config: Any, outputs: dict[str, npt.NDArray[Any]], examples: Examples, seen: list[str]
) -> dict[str, dict[str, Any]]:
    """The application's own groups, and clients that training saw or did not see where both are present."""
    masks = dict(app.groups(config, examples))
    known = np.isin(examples.columns["client"], sorted(seen)) if seen else np.zeros(len(examples), bool)
    if known.any() and not known.all():
        masks |= {SEEN: known, UNSEEN: ~known}
        masks |= {f"{name}/{UNSEEN}": m & ~known for name, m in app.groups(config, examples).items()}
    result = {}
    for name, mask in masks.items():
        if mask.any():
            part = {k: v[mask] for k, v in outputs.items()}
            result[name] = {
                "num_examples": int(mask.sum()),
                "metrics": finite(app.metrics(config, part, examples.take(mask))),
            }
    return result


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """A metric that is undefined or overflows on these examples is left out."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def write_predictions(
    path: Path, app: Application, config: Any, outputs: dict[str, npt.NDArray[Any]], examples: Examples
) -> None:
    """example_id, client, label, then the predictions, then the application's own columns.

    label is a name where a ``prediction`` names a class, the number itself beside a ``score``, and left out where an
    example has more than one.
    """
    labels, predicted = app.labels(config), app.postprocess(config, outputs)
    named = labels and "prediction" in predicted and examples.targets.dtype.kind in "iu"
    truth = [labels[int(t)] if named else t for t in examples.targets] if examples.targets.ndim == 1 else []
    columns: dict[str, Any] = {
        "example_id": examples.columns["example_id"],
        "client": examples.columns["client"],
        **({"label": truth} if examples.targets.ndim == 1 else {}),
        **predicted,
        **{k: v for k, v in examples.columns.items() if k not in ("example_id", "client", "group")},
    }
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    atomic.write_bytes(path, out.getvalue().encode())


def write_report(
    path: Path,
    document: dict[str, Any],
    app: Application,
    config: Any,
    outputs: dict[str, npt.NDArray[Any]],
    examples: Examples,
) -> None:
    """Scores of all examples and of each group, then the application's own pictures of inputs, predictions and errors."""
    from fl_core.report.page import Page

    page = Page(f"fieldfleet: {app.title}", f"{app.summary} Model: {document['model']}; data: {document['data']}.")
    names = list(document["metrics"])
    page.section("Scores").table(
        ["group", "examples", *names],
        [[name, row["num_examples"], *map(row["metrics"].get, names)] for name, row in score_rows(document).items()],
    )
    draw = app.pictures_function()
    if draw is not None:
        page.section("Inputs, predictions and errors")
        for picture, caption in draw(config, outputs, examples):
            page.picture(picture, caption)
    page.write(path)


def score_rows(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Row -> its number of examples and metrics: all of them, then each group."""
    return {"all": {"num_examples": document["num_examples"], "metrics": document["metrics"]}, **document["groups"]}


def print_table(document: dict[str, Any], app: Application) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(document["metrics"])
    table = Table(title=f"{document['application']}: {document['model']} on {document['data']}")
    for heading in ("group", "examples", *names):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    for name, row in score_rows(document).items():
        table.add_row(
            name, str(row["num_examples"]), *(f"{row['metrics'][m]:.4f}" if m in row["metrics"] else "-" for m in names)
        )
    Console().print(table)
