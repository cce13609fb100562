"""What a classifier gets right and wrong: a report with the confusion of classes and pictures of inputs, predictions and errors.

    python -m applications.plant_disease.review MODEL --data DIR --out DIR [--unseen]

MODEL: a checkpoint (torch) or a bundle (onnxruntime). The output folder holds report.json, report.html, errors.png and confusion.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_disease import APPLICATION
from applications.plant_disease.config import Config
from fl_core.contracts.cli import common_options, emit, output_folder, standalone
from fl_core.contracts.errors import InputError
from fl_core.learning.examples import Examples
from fl_core.learning.sources import data_option, open_data
from fl_core.learning.trained import load
from fl_core.storage import atomic

Array = npt.NDArray[Any]
ROWS, COLUMNS = 3, 6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m applications.plant_disease.review", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint or bundle folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--unseen", action="store_true", help="only clients that the model was not trained on")
    data_option(parser)
    common_options(parser)
    return standalone(parser, run, arguments)


def run(args: argparse.Namespace) -> int:
    model = load(APPLICATION, args.model, args.overrides)
    config: Config = model.config
    output_folder(args.out)
    found = open_data(APPLICATION, config, args.data, seed=args.seed)
    examples = found.raw.examples(config)
    if args.unseen:
        examples = examples.take(~np.isin(examples.columns["client"], list(model.seen)))
    if not len(examples):
        raise InputError("there is no image of a client that the model was not trained on", remedy="leave --unseen out")
    outputs = model.predict(examples)
    classes = config.data.classes
    score = np.stack([APPLICATION.postprocess(config, outputs)[f"score_{c}"] for c in classes], axis=1)
    table = confusion(examples.targets, score.argmax(axis=1), len(classes))
    document = {
        "model": str(args.model),
        "data": found.origin,
        "images": len(examples),
        "metrics": APPLICATION.metrics(config, outputs, examples),
        "groups": {n: APPLICATION.metrics(config, {k: v[m] for k, v in outputs.items()}, examples.take(m)) for n, m in APPLICATION.groups(config, examples).items()},
        "classes": list(classes),
        "confusion": table.tolist(),
    }  # fmt: skip
    with atomic.new_folder(args.out) as folder:
        atomic.write_json(folder / "report.json", document)
        write_report(folder, document, table, examples, score)
    scores = ", ".join(f"{k} {v:.4f}" for k, v in document["metrics"].items())
    emit(args, document, f"{args.out}: {len(examples)} images of {found.origin}: {scores}")
    return 0


def confusion(truth: Array, prediction: Array, classes: int) -> npt.NDArray[np.int64]:
    """(classes, classes): images of the class in the row that were taken for the one in the column."""
    made = np.zeros((classes, classes), np.int64)
    np.add.at(made, (truth, prediction), 1)
    return made


def write_report(folder: Path, document: dict[str, Any], table: Array, examples: Examples, score: Array) -> None:
    """report.html and its pictures, where matplotlib is installed."""
    try:
        from applications.plant_disease import pictures
        from fl_core.report.page import Page
    except ImportError:
        return
    classes, prediction = document["classes"], score.argmax(axis=1)
    page = Page(f"fieldfleet: {APPLICATION.title}", f"{APPLICATION.summary} Data: {document['data']}.")
    names = list(document["metrics"])
    parts = {"all": document["metrics"], **document["groups"]}
    page.section("Scores").table(["", *names], [[part, *(m.get(n) for n in names)] for part, m in parts.items()])
    matrix = pictures.confusion(table, classes)
    atomic.write_bytes(folder / "confusion.png", matrix)
    page.section("Confusion").picture(
        matrix, "Share of the images of each class (row) that were taken for another (column)."
    )
    sure = score.max(axis=1)
    wrong = np.flatnonzero(prediction != examples.targets)
    right = np.flatnonzero(prediction == examples.targets)
    for title, file, chosen in (
        ("The surest errors", "errors.png", wrong[np.argsort(-sure[wrong])]),
        ("The least sure that are right", "right.png", right[np.argsort(sure[right])]),
    ):
        chosen = chosen[: ROWS * COLUMNS]
        if len(chosen):
            notes = [
                f"{classes[examples.targets[i]]}\ntaken for {classes[prediction[i]]} ({sure[i]:.2f})" for i in chosen
            ]
            gallery = pictures.gallery(examples.inputs["image"][chosen], notes, COLUMNS)
            atomic.write_bytes(folder / file, gallery)
            page.section(title).picture(
                gallery, "Above each image its label and what it was taken for, with the probability."
            )
    page.write(folder / "report.html")


if __name__ == "__main__":
    sys.exit(main())
