"""Whole photographs: the plants in each from overlapping tiles, scores, the classical floor beside, and a report with pictures.

    python -m applications.plant_segmentation.segment MODEL --data DIR --out DIR

MODEL: a checkpoint (torch) or a bundle (onnxruntime). The output folder holds one label image a photograph (16-bit PNG, as in the native
format), report.json and report.html.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from applications.plant_segmentation import APPLICATION, data, floor, grouping, metrics, tiles
from applications.plant_segmentation.config import Config
from applications.plant_segmentation.data import Pictures
from applications.plant_segmentation.formats import Picture
from applications.plant_segmentation.grouping import Instances
from fl_core.contracts.cli import common_options, emit, output_folder, standalone
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import InputError
from fl_core.contracts.progress import Progress
from fl_core.imagery import photographs
from fl_core.learning.examples import Examples
from fl_core.learning.sources import data_option, open_data
from fl_core.learning.trained import Trained, load
from fl_core.storage import atomic

Array = npt.NDArray[Any]
SHOWN = 6  # photographs in the report
SPACING = 5  # of the watershed, in pixels


def tile_maps(model: Trained) -> tiles.Predict:
    """(N, side, side, 3) -> (N, 4, side, side)"""

    def predict(batch: Array) -> Array:
        return np.asarray(model.predict(Examples({"image": batch}, np.zeros(len(batch))))["maps"])

    return predict


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m applications.plant_segmentation.segment", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint or bundle folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--overlap", type=int, default=0, help="of neighbouring tiles, in pixels (default: half a tile)"
    )
    parser.add_argument(
        "--mirror", action="store_true", help="mean over each tile's four mirror images: slower, smoother"
    )
    parser.add_argument("--unseen", action="store_true", help="only clients that the model was not trained on")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="at most N photographs (default: all)")
    data_option(parser)
    common_options(parser)
    return standalone(parser, run, arguments)


def run(args: argparse.Namespace) -> int:
    model = load(APPLICATION, args.model, args.overrides)
    config: Config = model.config
    predict = tiles.mirrored(tile_maps(model)) if args.mirror else tile_maps(model)
    output_folder(args.out)
    found = open_data(APPLICATION, config, args.data, seed=args.seed)
    pictures = chosen(cast(Pictures, found.raw), model, unseen=args.unseen, limit=args.limit)
    overlap = args.overlap or config.data.image_size // 2
    tallies = {"model": Tally(), "watershed on excess green": Tally()}
    rows: list[tuple[str, Array, Array, Array]] = []
    if config.model.task == "semantic":
        del tallies["watershed on excess green"]
    with atomic.new_folder(args.out) as folder, Progress("segment", len(pictures)) as bar:
        for number, picture in enumerate(pictures, start=1):
            image, truth = data.loaded(picture, config.data.long_side)
            maps = tiles.joined(predict, image, side=config.data.image_size, overlap=overlap)
            made = grouping.instances(maps, config.model)
            target = folder / f"{picture.name}.labels.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(photographs.encode_png(made.labels.astype(np.uint16)))
            truth = metrics.targets(config, truth)
            tallies["model"].add(truth, made)
            if config.model.task == "instances":
                flooded = floor.watershed(image, SPACING, 1)
                tallies["watershed on excess green"].add(truth, Instances(flooded, np.ones(flooded.max())))
            if len(rows) < SHOWN and (number - 1) % max(1, len(pictures) // SHOWN) == 0:
                rows.append((picture.name, image, truth, made.labels))
            bar.update(number, picture.name)
        document = {
            "model": str(args.model),
            "data": found.origin,
            "photographs": len(pictures),
            "overlap": overlap,
            "scores": {name: tally.scores() for name, tally in tallies.items()},
            "config": to_table(config),
        }
        atomic.write_json(folder / "report.json", document)
        write_report(folder, document, rows)
    lines = [f"{n}: " + ", ".join(f"{k} {v:.4f}" for k, v in t.scores().items()) for n, t in tallies.items()]
    emit(args, document, "\n".join([f"{args.out}: {len(pictures)} photographs of {found.origin}", *lines]))
    return 0


class Tally:
    """Scores over whole photographs, added up while they are predicted."""

    def __init__(self) -> None:
        self._pictures: list[metrics.Found] = []
        self._counts = np.zeros(3, np.int64)

    def add(self, truth: Array, made: Instances) -> None:
        self._pictures.append(metrics.compare(truth, made.labels, made.scores))
        self._counts += metrics.overlap_counts(truth, made.labels > 0)

    def scores(self) -> dict[str, float]:
        return {**metrics.scored(self._pictures), **metrics.foreground(self._counts)}


def chosen(raw: Pictures, model: Trained, *, unseen: bool, limit: int) -> list[Picture]:
    seen = set(model.seen) if unseen else set()
    pictures = [p for p in raw.pictures if p.client not in seen]
    if not pictures:
        raise InputError(
            "there is no photograph of a client that the model was not trained on", remedy="leave --unseen out"
        )
    return pictures[:limit] if limit else pictures


def write_report(folder: Path, document: dict[str, Any], rows: list[tuple[str, Array, Array, Array]]) -> None:
    """report.html and pictures.png, where matplotlib is installed."""
    try:
        from applications.plant_segmentation.pictures import table
        from fl_core.report.page import Page
    except ImportError:
        return
    page = Page(f"fieldfleet: {APPLICATION.title}", f"{APPLICATION.summary} Data: {document['data']}.")
    keys = list(next(iter(document["scores"].values())))
    page.section("Scores over whole photographs")
    page.table(["", *keys], [[name, *(s.get(k) for k in keys)] for name, s in document["scores"].items()])
    task = document["config"]["model"]["task"]
    picture = table(rows, task)
    atomic.write_bytes(folder / "pictures.png", picture)
    colours = "Each plant has a colour of its own" if task == "instances" else "All foreground has one colour"
    page.section("Photographs").picture(picture, f"{colours}; white pixels are not labelled.")
    page.write(folder / "report.html")


if __name__ == "__main__":
    sys.exit(main())
