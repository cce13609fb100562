"""Whole volumes: labels of every voxel from overlapping tiles, scores over whole volumes, and a report with pictures.

    python -m applications.seismic_facies.segment MODEL --data DIR --out DIR [--compare OTHER_MODEL]

MODEL: a checkpoint (torch) or a bundle (onnxruntime). The output folder holds NAME.labels.npy for each volume (uint8, written as
the tiles are joined), report.json and report.html. --compare: a second model, such as the 2-D twin, scored and drawn beside.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from applications.seismic_facies import APPLICATION, metrics, tiles
from applications.seismic_facies.config import Config
from applications.seismic_facies.data import Block, Volumes
from applications.seismic_facies.pipeline import UNLABELLED, probabilities
from fl_core.contracts.cli import common_options, emit, output_folder, standalone
from fl_core.contracts.errors import InputError
from fl_core.contracts.progress import Progress
from fl_core.learning.examples import Examples
from fl_core.learning.sources import data_option, open_data
from fl_core.learning.trained import Trained, load
from fl_core.storage import atomic

Array = npt.NDArray[Any]
AXES = ("inline", "crossline", "sample")
PICTURES = 3


@dataclass
class Tally:
    """Counts over whole volumes, added up while they are predicted."""

    classes: int
    counts: npt.NDArray[np.int64] = field(init=False)
    changes: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(4, np.int64))

    def __post_init__(self) -> None:
        self.counts = np.zeros((self.classes, self.classes), np.int64)

    def add(self, truth: Array, labels: Array, before: tuple[Array, Array] | None) -> None:
        """truth, labels: inlines that follow those of ``before`` (the last inline's truth and labels)."""
        self.counts += metrics.confusion(truth, labels, self.classes)
        if before is not None:
            truth, labels = (np.concatenate([b[None], a]) for b, a in zip(before, (truth, labels), strict=True))
        self.changes += metrics.slice_changes(truth, labels)

    def scores(self) -> dict[str, float]:
        return {**metrics.segmentation_scores(self.counts), **metrics.continuity_scores(self.changes)}


def tile_predictor(model: Trained) -> tiles.Predict:
    """What a model says of a batch of tiles, as probabilities of the facies."""

    def predict(batch: Array) -> Array:
        nothing = np.zeros(len(batch), np.uint8)  # of tiles there is no truth to compare with
        return probabilities(np.asarray(model.predict(Examples({"amplitude": batch}, nothing))["logits"]))

    return predict


def segment(model: Trained, block: Block, target: Path, tally: Tally, *, overlap: int) -> None:
    """Labels of one volume into ``target``, inline by inline; ``tally`` counts where the volume has labels."""
    truth = block.label_volume
    made = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=block.amplitude.shape)
    before: tuple[Array, Array] | None = None
    side, classes = model.config.data.crop, len(model.config.data.classes)
    rows = tiles.joined(
        tile_predictor(model),
        block.amplitude.data,
        side=side,
        classes=classes,
        overlap=overlap,
        scale=block.amplitude.scale,
    )
    for first, values in rows:
        labels = values.argmax(axis=0).astype(np.uint8)
        made[first : first + len(labels)] = labels
        if truth is not None:
            known = np.asarray(truth.data[first : first + len(labels)])
            tally.add(known, labels, before)
            before = known[-1], labels[-1]
    made.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m applications.seismic_facies.segment", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint or bundle folder")
    parser.add_argument("--compare", type=Path, metavar="MODEL", help="another model, scored and drawn beside")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--overlap", type=int, default=0, help="of neighbouring tiles, in samples (default: half a tile)"
    )
    parser.add_argument("--unseen", action="store_true", help="only surveys that no model was trained on")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="at most N volumes (default: all)")
    data_option(parser)
    common_options(parser)
    return standalone(parser, run, arguments)


def run(args: argparse.Namespace) -> int:
    models = [load(APPLICATION, path) for path in (args.model, args.compare) if path is not None]
    config: Config = load(APPLICATION, args.model, args.overrides).config  # of the data; the models keep theirs
    output_folder(args.out)
    found = open_data(APPLICATION, config, args.data, seed=args.seed)
    blocks = chosen(cast(Volumes, found.raw), models, unseen=args.unseen, limit=args.limit)
    overlap = args.overlap or config.data.crop // 2
    tallies = [Tally(len(config.data.classes)) for _ in models]
    with atomic.new_folder(args.out) as folder, Progress("segment", len(blocks) * len(models)) as bar:
        for number, block in enumerate(blocks):
            for k, model in enumerate(models):
                target = folder / f"{block.name}.{'labels' if k == 0 else 'compared'}.npy"
                segment(model, block, target, tallies[k], overlap=overlap)
                bar.update(number * len(models) + k + 1, block.name)
        document = {
            "model": str(args.model),
            "compared": str(args.compare) if args.compare else None,
            "data": found.origin,
            "volumes": [b.name for b in blocks],
            "overlap": overlap,
            "scores": [t.scores() for t in tallies],
            "confusion": [t.counts.tolist() for t in tallies],
        }
        atomic.write_json(folder / "report.json", document)
        write_report(folder, config, blocks, document)
    lines = [line for name, t in zip(names(document), tallies, strict=True) for line in described(config, name, t)]
    emit(args, document, "\n".join([f"{args.out}: {len(blocks)} volumes of {found.origin}", *lines]))
    return 0


def described(config: Config, name: str, tally: Tally) -> list[str]:
    """Scores, and IoU of each class, where there are labels."""
    rows = confusion_rows(config, tally.counts)
    text = [f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in tally.scores().items())]
    return [*text, f"{name}: IoU of " + ", ".join(f"{row[0]} {row[-1]:.3f}" for row in rows)] if rows else text


def names(document: dict[str, Any]) -> list[str]:
    """Of the models, by their folders; with the parent's name where two are called alike (``final``)."""
    paths = [Path(document[k]) for k in ("model", "compared") if document[k]]
    if len({p.name for p in paths}) == len(paths):
        return [p.name for p in paths]
    return [f"{p.resolve().parent.name}/{p.name}" for p in paths]


def chosen(raw: Volumes, models: list[Trained], *, unseen: bool, limit: int) -> list[Block]:
    seen = {client for model in models for client in model.seen} if unseen else set()
    blocks = [b for b in raw.blocks if b.client not in seen]
    if not blocks:
        raise InputError("there is no volume of a survey that no model was trained on", remedy="leave --unseen out")
    return blocks[:limit] if limit else blocks


def write_report(folder: Path, config: Config, blocks: list[Block], document: dict[str, Any]) -> None:
    """report.html, where matplotlib is installed."""
    try:
        from fl_core.report.page import Page
        from fl_core.report.slices import Panel, orthogonal_slices
    except ImportError:
        return
    page = Page(f"fieldfleet: {APPLICATION.title}, whole volumes", f"{APPLICATION.summary} Data: {document['data']}.")
    shown = dict(zip(names(document), document["scores"], strict=True))
    if any(shown.values()):
        keys = list(next(iter(shown.values())))
        page.section("Scores over whole volumes")
        page.table(["model", *keys], [[name, *(scores.get(k) for k in keys)] for name, scores in shown.items()])
        page.section("Where true facies (rows) end up, in shares")
        for name, counts in zip(names(document), document["confusion"], strict=True):
            page.table([name, *config.data.classes, "IoU"], confusion_rows(config, np.array(counts)))
    page.section("Orthogonal slices")
    for block in blocks[:PICTURES]:
        panels = {"amplitude": Panel(volume=np.asarray(block.amplitude.data[:]), kind="signed")}
        truth = np.asarray(block.label_volume.data[:]) if block.label_volume is not None else None
        if truth is not None:
            panels["truth"] = Panel(volume=truth, kind="labels")
        for name, suffix in zip(names(document), ("labels", "compared"), strict=False):
            labels = np.load(folder / f"{block.name}.{suffix}.npy", mmap_mode="r")
            panels[name] = Panel(volume=labels, kind="labels")
            if truth is not None:
                panels[f"{name}: error"] = Panel(volume=(labels != truth) & (truth != UNLABELLED), kind="mask")
        middle = cast("tuple[int, int, int]", tuple(n // 2 for n in block.amplitude.shape))
        picture = orthogonal_slices(panels, at=middle, axes=AXES, classes=config.data.classes)
        page.picture(
            picture,
            f"{block.name}. The middle row cuts across the inlines: a net that sees one inline at a time breaks there.",
        )
    page.write(folder / "report.html")


def confusion_rows(config: Config, counts: npt.NDArray[np.int64]) -> list[list[Any]]:
    """A row for each true class that occurs: its name, the shares of the predicted classes, its IoU."""
    iou = metrics.class_iou(counts)
    return [
        [name, *(counts[k] / counts[k].sum()).tolist(), float(iou[k])]
        for k, name in enumerate(config.data.classes)
        if counts[k].any()
    ]


if __name__ == "__main__":
    sys.exit(main())
