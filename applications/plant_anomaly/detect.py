"""A threshold for a stated false-alarm rate, who exceeds it, heat maps, and a map of the latent space.

    python -m applications.plant_anomaly.detect MODEL --data DIR --out DIR [--healthy DIR] [--false-alarms 0.05]

The threshold is the score that at most the stated share of new healthy plants exceeds, on average (split conformal prediction: of n
healthy scores the ceil((n + 1)(1 - rate))-th). It comes from --healthy, else from the validation groups of the clients that the model was trained
on, which no training has seen; it is then applied to everything else. MODEL: a checkpoint (torch) or a bundle (onnxruntime).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from applications.plant_anomaly import APPLICATION, data, pipeline
from applications.plant_anomaly.config import Config
from fl_core.contracts.cli import common_options, emit, output_folder, standalone
from fl_core.contracts.errors import InputError
from fl_core.learning.application import Outputs
from fl_core.learning.examples import Examples
from fl_core.learning.partition import client_data
from fl_core.learning.sources import data_option, open_data
from fl_core.learning.trained import load
from fl_core.storage import atomic

Array = npt.NDArray[Any]
SHOWN = 8


def conformal_threshold(healthy: Array, rate: float) -> float:
    """Raises InputError where there are too few healthy scores for that rate."""
    place = math.ceil((len(healthy) + 1) * (1 - rate))
    if not 0 < place <= len(healthy):
        raise InputError(
            f"{len(healthy)} healthy plants are too few for a false-alarm rate of {rate:g}",
            remedy=f"give {math.ceil(1 / rate) - 1} or more, or a higher rate",
        )
    return float(np.sort(healthy)[place - 1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m applications.plant_anomaly.detect", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint or bundle folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--healthy", type=Path, metavar="DIR", help="healthy plants that no training has seen")
    parser.add_argument("--false-alarms", type=float, default=0.05, metavar="RATE")
    data_option(parser)
    common_options(parser)
    return standalone(parser, run, arguments)


def run(args: argparse.Namespace) -> int:
    if not 0 < args.false_alarms < 1:
        raise InputError(f"--false-alarms {args.false_alarms:g} is no rate between 0 and 1")
    model = load(APPLICATION, args.model, args.overrides)
    config: Config = model.config
    output_folder(args.out)
    found = open_data(APPLICATION, config, args.data, seed=args.seed)
    examples = found.raw.examples(config)
    if args.healthy:
        healthy, rest = data.read(args.healthy).examples(config), examples
        healthy = healthy.take(~healthy.columns["sick"].astype(bool))
        origin = str(args.healthy)
    else:
        healthy, rest = kept_apart(config, examples, set(model.seen), args.seed)
        origin = "validation groups of the clients that the model was trained on"
    threshold = conformal_threshold(pipeline.distance(model.predict(healthy)["latent"]), args.false_alarms)
    outputs = model.predict(rest)
    rates = rates_above(pipeline.distance(outputs["latent"]), rest, threshold)
    document = {
        "model": str(args.model),
        "data": found.origin,
        "false_alarms": args.false_alarms,
        "threshold": threshold,
        "threshold_from": f"{len(healthy)} healthy plants: {origin}",
        "above": rates,
        "metrics": APPLICATION.metrics(config, outputs, rest),
    }
    with atomic.new_folder(args.out) as folder:
        atomic.write_json(folder / "report.json", document)
        write_report(folder, document, outputs, rest)
    lines = [f"  {name}: {share['above']:.3f} of {share['plants']} above" for name, share in rates.items()]
    emit(
        args, document, "\n".join([f"{args.out}: threshold {threshold:.4f} from {document['threshold_from']}", *lines])
    )
    return 0


def kept_apart(config: Config, examples: Examples, seen: set[str], seed: int) -> tuple[Examples, Examples]:
    """(healthy validation examples of the clients seen, everything that is neither those nor learned from)."""
    ids, learned = [], []
    for client, mine in examples.by_client().items():
        if client in seen:
            parts = client_data(mine, client, config.data.validation_fraction, seed)
            healthy = parts.validation.columns["sick"].astype(bool)
            ids += parts.validation.columns["example_id"][~healthy].tolist()
            learned += parts.train.columns["example_id"].tolist()
    names = examples.columns["example_id"]
    chosen = np.isin(names, ids)
    return examples.take(chosen), examples.take(~chosen & ~np.isin(names, learned))


def rates_above(score: Array, examples: Examples, threshold: float) -> dict[str, dict[str, Any]]:
    """Share above the threshold: of the healthy (false alarms), of all sick (found), and of each label."""
    sick = examples.columns["sick"].astype(bool)
    parts = {"healthy": ~sick, "sick": sick}
    parts |= {
        f"sick: {name}": sick & (examples.columns["label"] == name)
        for name in np.unique(examples.columns["label"][sick])
    }
    return {
        name: {"plants": int(mask.sum()), "above": float((score[mask] > threshold).mean())}
        for name, mask in parts.items()
        if mask.any()
    }


def write_report(folder: Path, document: dict[str, Any], outputs: Outputs, examples: Examples) -> None:
    """report.html, latent.png and heat.png, where matplotlib is installed."""
    try:
        from applications.plant_anomaly import pictures
        from fl_core.report.page import Page
    except ImportError:
        return
    page = Page(f"fieldfleet: {APPLICATION.title}", f"{APPLICATION.summary} Data: {document['data']}.")
    page.cards([("threshold", document["threshold"]), ("stated false-alarm rate", document["false_alarms"])])
    page.section("Above the threshold")
    page.table(["", "plants", "share above"], [[n, s["plants"], s["above"]] for n, s in document["above"].items()])
    page.text(f"Threshold from {document['threshold_from']}.")
    page.section("Scores").table(list(document["metrics"]), [list(document["metrics"].values())])
    latent, label = np.asarray(outputs["latent"], np.float64), examples.columns["label"]
    spread = pictures.latent_map(latent, label, {"threshold": document["threshold"]})
    atomic.write_bytes(folder / "latent.png", spread)
    page.section("Latent space").picture(
        spread, "Each point is a photograph; healthy ones lie near the origin, at a distance of about 1."
    )
    score = pipeline.distance(latent)
    rows = []
    for k in chosen_rows(label, examples.columns["sick"].astype(bool), score):
        name = f"{label[k]}\nscore {score[k]:.2f}"
        rows.append((name, examples.inputs["image"][k], np.asarray(outputs["reconstruction"][k]), np.asarray(outputs["heat"][k, 0]), examples.targets[k, ..., 3]))  # fmt: skip
    heat = pictures.table(rows)
    atomic.write_bytes(folder / "heat.png", heat)
    page.section("Heat maps").picture(
        heat,
        "Of each label the photograph in the middle of its scores, then the hardest: the sick with the lowest and the healthy with the highest.",
    )
    page.write(folder / "report.html")


def chosen_rows(label: Array, sick: Array, score: Array) -> list[int]:
    rows = []
    for name in np.unique(label)[: SHOWN - 2]:
        mine = np.flatnonzero(label == name)
        rows.append(int(mine[np.argsort(score[mine])[len(mine) // 2]]))
    for mask, sign in ((sick, 1), (~sick, -1)):
        if mask.any():
            rows.append(int(np.flatnonzero(mask)[np.argmin(sign * score[mask])]))
    return rows


if __name__ == "__main__":
    sys.exit(main())
