"""Strong and weak scaling: measured, split into stages, compared with one process's loss, and fitted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_core.contracts.errors import InputError
from fl_core.contracts.progress import Progress
from fl_core.learning.application import Application, application
from hpc_trainer import phases
from hpc_trainer.performance import fits, node
from hpc_trainer.performance.phase_clock import GRADIENTS_WAIT
from hpc_trainer.performance.worker import start

SKIP = 3  # first steps: allocations, thread pools
OWN = (phases.INPUT, phases.FORWARD, phases.LOSS)  # up to the first meeting of the ranks
PARTS = ("data", "forward", "backward", "communication", "straggling", "optimizer")
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    app: Application
    preset: str
    overrides: list[str]
    data: str | None
    procs: list[int]
    modes: tuple[str, ...]
    steps: int
    dtype: str
    seed: int
    batch: int

    @staticmethod
    def of(args: argparse.Namespace) -> Plan:
        try:
            procs = sorted({int(p) for p in args.procs.split(",")})
        except ValueError:
            procs = []
        if not procs or procs[0] < 1:
            raise InputError(f"--procs {args.procs}: write numbers of processes such as 1,2,4")
        if args.steps < 5:
            raise InputError(f"--steps {args.steps}: at least 5 are needed for a median")
        app = application(args.app)
        config = app.configure(args.overrides, preset=args.preset)
        return Plan(
            app=app,
            preset=args.preset,
            overrides=list(args.overrides),
            data=args.data,
            procs=procs if procs[0] == 1 else [1, *procs],  # every claim is against one process
            modes=("strong", "weak") if args.mode == "both" else (args.mode,),
            steps=args.steps,
            dtype=args.dtype,
            seed=args.seed,
            batch=config.pretrain.batch_size,
        )

    def spec(self, batch: int) -> dict[str, Any]:
        return {
            "work": "steps",
            "application": self.app.name,
            "preset": self.preset,
            "overrides": [*self.overrides, f"pretrain.batch_size={batch}"],
            "data": self.data,
            "seed": self.seed,
            "dtype": self.dtype,
            "steps": self.steps + SKIP,
            "skip": SKIP,
        }


def measure(plan: Plan, out: Path, probe: dict[str, Any] | None) -> dict[str, Any]:
    """Runs every count of processes; weak scaling has the batch of the preset on each process."""
    runs: dict[tuple[int, int], list[dict[str, Any]]] = {}
    wanted = [(p, plan.batch * (p if mode == "weak" else 1)) for mode in plan.modes for p in plan.procs]
    # a weak run is compared with one process that has the same global batch
    wanted = list(dict.fromkeys([*wanted, *((1, batch) for _, batch in wanted)]))
    with Progress(f"scaling {plan.app.name}", len(wanted)) as bar:
        for number, (procs, batch) in enumerate(wanted):
            runs[procs, batch] = start(plan.spec(batch), procs, out / f"procs-{procs}-batch-{batch}")
            bar.update(number + 1, f"{procs} processes, batch {batch}")
    cores = node.usable_cores()
    document: dict[str, Any] = {
        "format": FORMAT,
        "application": plan.app.name,
        "dtype": plan.dtype,
        "steps": plan.steps,
        "cores": cores,
        "modes": {mode: _mode(plan, mode, runs, cores, probe) for mode in plan.modes},
    }
    document["bottleneck"] = bottleneck(document)
    return document


def _mode(
    plan: Plan, mode: str, runs: dict[tuple[int, int], list[dict[str, Any]]], cores: int, probe: dict[str, Any] | None
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for procs in plan.procs:
        batch = plan.batch * (procs if mode == "weak" else 1)
        ranks, alone = runs[procs, batch], runs[1, batch][0]
        spread = fits.median_interval(step_seconds(ranks))
        rows.append(
            {
                "processes": procs,
                "batch": batch,
                "oversubscribed": procs > cores,
                "seconds": spread.document(),
                "parts": split(ranks),
                "slowest_over_fastest": straggling_ratio(ranks),
                "loss_deviation": deviation(ranks[0]["losses"], alone["losses"]),
            }
        )
    first = rows[0]["seconds"]["value"]
    for row in rows:
        p, t = row["processes"], row["seconds"]["value"]
        row["speedup"] = first / t * (p if mode == "weak" else 1)
        row["efficiency"] = row["speedup"] / p
        row["karp_flatt"] = fits.karp_flatt(row["speedup"], p) if mode == "strong" else None
    if probe:
        _expect(mode, rows, probe, plan)
    return {"rows": rows, "law": _law(mode, rows)}


def step_seconds(ranks: Sequence[dict[str, Any]]) -> list[float]:
    """Of each step: the slowest rank's."""
    return [max(values) for values in zip(*(r["steps"] for r in ranks), strict=True)]


def _own(rank: dict[str, Any], names: Sequence[str]) -> npt.NDArray[np.float64]:
    """(steps,) seconds in the named stages together."""
    total = np.zeros(len(rank["steps"]))
    for name in names:
        total += np.asarray(rank["stages"].get(name, total * 0))
    return total


def split(ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median seconds a step, mean over ranks: own work by stage; waiting for others, split in two.

    The ranks meet twice, for the sums of the loss and for the gradients. At a meeting the slowest rank keeps the others
    waiting (straggling: slowest minus mean of the work before it); what is waited beyond that is exposed communication.
    """
    own = [_own(r, OWN) for r in ranks]
    backward = [_own(r, [phases.BACKWARD]) for r in ranks]
    waits = [_own(r, [phases.COMMUNICATION, GRADIENTS_WAIT]) for r in ranks]
    straggling = sum(np.max(work, axis=0) - np.mean(work, axis=0) for work in (own, backward))
    straggling = np.minimum(straggling, np.mean(waits, axis=0))
    parts = {
        "data": np.mean([_own(r, [phases.INPUT]) for r in ranks], axis=0),
        "forward": np.mean([_own(r, [phases.FORWARD, phases.LOSS]) for r in ranks], axis=0),
        "backward": np.mean(backward, axis=0),
        "communication": np.mean(waits, axis=0) - straggling,
        "straggling": straggling,
        "optimizer": np.mean([_own(r, [phases.OPTIMIZER]) for r in ranks], axis=0),
    }
    return {name: float(np.median(value)) for name, value in parts.items()}


def straggling_ratio(ranks: Sequence[dict[str, Any]]) -> float:
    """Own work of the slowest rank over that of the fastest, medians."""
    work = [float(np.median(_own(r, [*OWN, phases.BACKWARD, phases.OPTIMIZER]))) for r in ranks]
    return max(work) / min(work)


def deviation(found: Sequence[float], alone: Sequence[float]) -> float:
    """Largest difference of the losses of all steps, relative to the largest loss."""
    a, b = np.asarray(found), np.asarray(alone)
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def _law(mode: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Amdahl's or Gustafson's serial fraction from the counts that the cores allow; refused under three of them."""
    fair = [r for r in rows if not r["oversubscribed"]]
    procs, seconds = [r["processes"] for r in fair], [r["seconds"]["value"] for r in fair]
    fitted = (fits.amdahl if mode == "strong" else fits.gustafson)(procs, seconds)
    name = "Amdahl" if mode == "strong" else "Gustafson"
    if fitted is None:
        return {
            "name": name,
            "refused": f"{len(fair)} counts of processes within the cores; {fits.LEAST_POINTS} are needed for a fit",
        }
    s, largest = fitted.value, max(procs)
    predicted = []
    for p in (2 * largest, 4 * largest):
        value = 1 / (s + (1 - s) / p) if mode == "strong" else p - s * (p - 1)
        predicted.append({"processes": p, "speedup": value, "extrapolated": True})
    return {"name": name, "serial_fraction": fitted.document(), "points": len(fair), "predicted": predicted}


def _expect(mode: str, rows: list[dict[str, Any]], probe: dict[str, Any], plan: Plan) -> None:
    """Expected step: one process's own work divided (strong) or as it is (weak), and the messages by the probe's model."""
    reduce = probe.get("all_reduce", {})
    if "alpha_seconds" not in reduce:
        return
    alpha, beta = reduce["alpha_seconds"]["value"], reduce["beta_seconds_per_byte"]["value"]
    model = plan.app.build_model(plan.app.configure(plan.overrides, preset=plan.preset))
    size = 8 if plan.dtype == "float64" else 4
    gradient = size * sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = rows[0]["parts"]
    work = sum(parts[n] for n in ("data", "forward", "backward"))
    for row in rows:
        p = row["processes"]
        ring = (p - 1) / p / ((reduce["processes"] - 1) / reduce["processes"]) if p > 1 else 0.0
        messages = 2 * alpha + beta * gradient * ring if p > 1 else 0.0
        row["expected_seconds"] = work / (p if mode == "strong" else 1) + parts["optimizer"] + messages
        row["message_bytes"] = gradient if p > 1 else 0


def bottleneck(document: dict[str, Any]) -> str:
    """The part of a step that most stands in the way of more speed, in words; at the largest count of processes."""
    mode = "strong" if "strong" in document["modes"] else "weak"
    rows = document["modes"][mode]["rows"]
    last = rows[-1]
    if last["oversubscribed"]:
        return f"cores: {last['processes']} processes share {document['cores']}"
    parts = last["parts"]
    total = sum(parts.values())
    largest = max(parts, key=lambda n: parts[n])
    if last["processes"] > 1:
        one = rows[0]["parts"]
        shrink = last["processes"] if mode == "strong" else 1
        lost = {n: parts[n] - one[n] / shrink for n in parts}
        largest = max(lost, key=lambda n: lost[n])
    remedy = {
        "data": "prefetch, pack the data into shards, or stage them to a local disk",
        "forward": "computation itself: more cores, bf16, torch.compile",
        "backward": "computation itself: more cores, bf16, torch.compile",
        "communication": "larger batches, fewer and larger messages, a faster network",
        "straggling": "unequal shares or unequal cores: bind processes, even out the batch",
        "optimizer": "the same on every process: shard its state, or spread its work",
    }[largest]
    return f"{largest}: {100 * parts[largest] / total:.0f} % of a step with {last['processes']} processes; {remedy}"
