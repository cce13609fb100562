"""The largest volume that trains within a given memory, by technique: recomputation, FSDP, spatial parallelism, alone and together.

    python -m benchmarks memory_limit [--limit-mb 1000] [--procs 2] [--step 8] [--quick]

A 3-D U-Net (seismic_facies) takes cubes of growing edge. Every process has one sample (with spatial parallelism all processes share one), so that what
differs is what a process holds. The edge that ``fieldfleet estimate`` predicts to fit is tried first, with the real Trainer in fresh processes (three steps, peak resident
growth of the process with most); then one step of the edge up while it fits, or down until it does. Printed: the largest edge that fits and its measured peak, the
peak of the next, both beside the estimates, and the seconds of a step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fl_core.learning.application import application
from hpc_trainer.performance.estimate import estimate, target_of
from hpc_trainer.performance.worker import start

APPLICATION = "seismic_facies"
MODEL = ("model.levels=4", "model.norm=group", "data.reference=stored", "optimizer.name=adamw")
CUBE = ("crop", "stride", "inlines", "crosslines", "samples")
RECOMPUTE, FSDP, SPATIAL = "recomputation", "fsdp", "spatial"
TECHNIQUES: tuple[tuple[str, ...], ...] = (
    (), (RECOMPUTE,), (FSDP,), (SPATIAL,), (RECOMPUTE, FSDP), (RECOMPUTE, SPATIAL), (FSDP, SPATIAL), (RECOMPUTE, FSDP, SPATIAL),
)  # fmt: skip


def settings(techniques: Sequence[str], edge: int, width: int, procs: int) -> list[str]:
    made = [*MODEL, f"model.width={width}", *(f"data.{k}={edge}" for k in CUBE)]
    made.append(f"pretrain.batch_size={1 if SPATIAL in techniques else procs}")
    made.append(f"pretrain.parallel={'fsdp' if FSDP in techniques else 'ddp'}")
    if SPATIAL in techniques:
        made.append(f"pretrain.mesh=spatial={procs}")
    if RECOMPUTE in techniques:
        made.append("pretrain.activation_checkpointing=true")
    return made


class Tries:
    """Of one technique: predicted and measured bytes of the process with most, by edge."""

    def __init__(self, techniques: Sequence[str], width: int, procs: int) -> None:
        self.techniques, self.width, self.procs = techniques, width, procs
        self.app = application(APPLICATION)
        self._measured: dict[int, dict[str, Any]] = {}

    def predicted(self, edge: int) -> int:
        overrides = settings(self.techniques, edge, self.width, self.procs)
        parallel = "fsdp" if FSDP in self.techniques else "ddp"
        found = estimate(self.app, "default", overrides, world=self.procs, parallel=parallel)
        return int(found["memory_bytes"]["total"])

    def measured(self, edge: int) -> dict[str, Any]:
        if edge not in self._measured:
            overrides = settings(self.techniques, edge, self.width, self.procs)
            like = target_of(self.app, "default", settings(self.techniques, 16, self.width, self.procs))
            spec = {
                "work": "peak",
                "application": APPLICATION,
                "preset": "default",
                "overrides": overrides,
                "target": [[edge] * (like.dim() - 1), str(like.dtype).removeprefix("torch.")],
                "seed": 0,
                "dtype": "float32",
                "steps": 3,
            }
            with tempfile.TemporaryDirectory() as folder:
                ranks = start(spec, self.procs, Path(folder))
            seconds = max(median(rank["seconds"][1:]) for rank in ranks)
            self._measured[edge] = {"peak": max(rank["peak"] for rank in ranks), "seconds": seconds}
        return self._measured[edge]

    def largest(self, limit: float, step: int) -> int:
        """The largest multiple of ``step`` that fits; 0 for none."""
        edge = step
        while self.predicted(edge + step) <= limit:
            edge += step
        if self.measured(edge)["peak"] <= limit:
            while self.measured(edge + step)["peak"] <= limit:
                edge += step
            return edge
        while edge and self.measured(edge)["peak"] > limit:
            edge -= step
        return edge


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory_limit", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="two techniques within 250 MB")
    parser.add_argument("--limit-mb", type=int, default=1000)
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument("--width", type=int, default=32, help="channels at full resolution (default: 32)")
    parser.add_argument(
        "--step", type=int, default=16, help="edges are multiples of this; a multiple of 8 (default: 16)"
    )
    args = parser.parse_args(arguments)
    limit = 1e6 * (250 if args.quick else args.limit_mb)
    width = 8 if args.quick else args.width
    for techniques in TECHNIQUES[:2] if args.quick else TECHNIQUES:
        tries = Tries(techniques, width, args.procs)
        edge = tries.largest(limit, args.step)
        words = []
        for size in (edge, edge + args.step):
            if size:
                found, predicted = tries.measured(size), tries.predicted(size)
                words.append(
                    f"{size}^3 {found['peak'] / 1e6:,.0f} MB (estimate {100 * (predicted / found['peak'] - 1):+.0f} %, {found['seconds']:.1f} s a step)"
                )
        print(
            f"{' + '.join(techniques) or 'none'}: largest {words[0] if edge else 'none'}; next {words[-1]}", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
