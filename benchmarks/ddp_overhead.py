"""What the trainer costs beside the DDP loop that a good engineer would write, and beside Lightning: step time, loss deviation.

    python -m benchmarks ddp_overhead [--pairs 15] [--steps 5] [--app seismic_facies] [--quick]

All contestants train one model with the very same synchronised batch norm, optimiser, precision and global batch on the same
examples (no augmentation), in the same two processes, in turn: a pair is some steps of ours and as many of the other, after one uncounted step each; each
ratio's median has a 95 % interval (order statistics). The plain loop does what training needs and nothing else: indices, a batch, forward, loss, backward, clipping, step, the
loss as a number. The same contest in one process, at the same global batch, gives what each gains from the second one (strong scaling).

Then each trains 51 examples at a global batch of 16 in float64 at one and at two processes, as ``verify-loss`` does:
DistributedSampler and means of means for the others, which is what torch and Lightning do unless they are told otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from fl_core.learning.application import Application, application
from fl_core.learning.sources import GENERATED, open_data
from fl_core.learning.torch_arrays import tensors
from fl_core.optimizers import build_optimizer
from fl_core.storage import atomic
from hpc_trainer.batch_norm import synchronise_batch_norm
from hpc_trainer.processes import Processes, join

OURS, PLAIN, LIGHTNING = "fieldfleet", "plain DDP", "Lightning"
QUIET = {
    "seismic_facies": ("data.mirror=0", "data.turn=0", "data.gain=0", "data.reference=stored"),
    "plant_disease": ("data.zoom=0", "data.rotate=0", "data.colour=0", "data.background=0"),
    "toy_regression": (),
}
COMMON = ("model.norm=batch", "pretrain.schedule=constant", "pretrain.warmup_fraction=0", "pretrain.average_last=0")
STEEP = ("optimizer.name=sgd", "optimizer.lr=0.01", "optimizer.momentum=0.9", "optimizer.clip_norm=0")
SAMPLES, BATCH, EPOCHS = 51, 16, 10


class Task(Dataset[Any]):
    """The application's examples as a map-style data set."""

    def __init__(self, app: Application, config: Any, examples: Any, dtype: torch.dtype) -> None:
        self.app, self.config, self.examples, self.dtype = app, config, examples, dtype

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> int:
        return index  # collated as one batch: slicing arrays once is faster than stacking samples

    def batch(self, index: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        found = self.examples.take(np.asarray(index, np.int64))
        made = tensors(self.app, self.config, found, "cpu")
        return tuple(t.to(self.dtype) if t.is_floating_point() else t for t in made), torch.from_numpy(found.targets)


def prepared(spec: dict[str, Any]) -> tuple[Application, Any, Any]:
    from hpc_trainer.commands import training_data

    app = application(spec["application"])
    config = app.configure(spec["overrides"])
    data = training_data(app, config, open_data(app, config, GENERATED, seed=0), 0)
    count = spec["samples"] or len(data.train)
    return app, config, replace(data, train=data.train.take(slice(0, count)), validation=data.validation.take([]))


def loader(task: Task, config: Any, processes: Processes) -> DataLoader[Any]:
    sampler: DistributedSampler[Any] = DistributedSampler(task, processes.world, processes.rank, shuffle=True, seed=0)
    size = config.pretrain.batch_size // processes.world
    return DataLoader(task, size, sampler=sampler, collate_fn=task.batch)


def model_of(app: Application, config: Any, processes: Processes, dtype: torch.dtype) -> nn.Module:
    return synchronise_batch_norm(app.build_model(config).to(dtype), processes.group)


def mean_over_processes(value: Tensor, processes: Processes) -> float:
    return float(processes.sum(value.detach().double()) / processes.world)


def plain_steps(app: Application, config: Any, data: Any, processes: Processes, dtype: torch.dtype) -> Iterator[float]:
    """The loop itself; yields each step's loss."""
    model = model_of(app, config, processes, dtype)
    ddp = DistributedDataParallel(model, forward_sync_buffers=False) if processes.world > 1 else model
    optimizer = build_optimizer(model, config.optimizer)
    loss_function = app.loss_function()
    batches = loader(Task(app, config, data.train, dtype), config, processes)
    epoch = 0
    while True:
        batches.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for inputs, targets in batches:
            optimizer.zero_grad(set_to_none=True)
            numerator, denominator = loss_function(ddp(*inputs), targets, config)
            loss = numerator / denominator
            loss.backward()
            if config.optimizer.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
            optimizer.step()
            yield mean_over_processes(loss, processes)
        epoch += 1


def our_steps(
    app: Application, config: Any, data: Any, processes: Processes, dtype: torch.dtype, out: Path
) -> Iterator[float]:
    """The Trainer of ``fieldfleet pretrain``, one step at a time."""
    from hpc_trainer.trainer import Trainer

    trainer = Trainer(app, config, data, processes=processes, out=out, seed=0, dtype=dtype)
    epoch = 1
    while True:
        shares = trainer.recipe.shares(
            len(data.train), config.pretrain.batch_size, seed=0, epoch=epoch,
            rank=trainer.layout.share, world=trainer.layout.shares,
        )  # fmt: skip
        for number, index in enumerate(shares):
            trainer._step(epoch, number, index, partial(trainer.batches, epoch, index, processes.device, dtype))
            yield trainer.losses[-1]
        epoch += 1


class Contest:
    """Seconds of single steps, on this process."""

    def __init__(self, contestants: dict[str, Callable[[int], list[float]]]) -> None:
        self.contestants = contestants
        self.times: dict[str, list[float]] = {name: [] for name in contestants}

    def run(self, pairs: int, steps: int) -> None:
        for take in self.contestants.values():
            take(3)  # kernels are chosen, buffers made
        for number in range(pairs):
            names = list(self.contestants)
            for name in names if number % 2 == 0 else reversed(names):
                self.times[name].append(median(self.contestants[name](steps)))


def timed(steps: Iterator[float]) -> Callable[[int], list[float]]:
    """Seconds from the end of one step to the end of the next, as Lightning's are taken; the first step of a turn is not counted,
    since another contestant has just used the caches."""

    def take(count: int) -> list[float]:
        dist.barrier()
        ends = []
        for _ in range(count + 1):
            next(steps)
            ends.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(ends)]

    return take


def speed(spec: dict[str, Any], processes: Processes, folder: Path) -> dict[str, Any]:
    app, config, data = prepared(spec)
    common = (app, config, data, processes, torch.float32)
    contestants = {OURS: timed(our_steps(*common, folder / "run")), PLAIN: timed(plain_steps(*common))}
    if spec["lightning"]:
        from benchmarks._lightning import lightning_take

        contestants[LIGHTNING] = lightning_take(*common)
    contest = Contest(contestants)
    contest.run(spec["pairs"], spec["steps"])
    return contest.times


def losses(spec: dict[str, Any], processes: Processes, folder: Path) -> dict[str, Any]:
    app, config, data = prepared(spec)
    common = (app, config, data, processes, torch.float64)
    count = EPOCHS * -(-SAMPLES // BATCH)
    found = {}
    for name, steps in ((OURS, our_steps(*common, folder / "run")), (PLAIN, plain_steps(*common))):
        found[name] = [next(steps) for _ in range(count)]
    if spec["lightning"]:
        from benchmarks._lightning import lightning_losses

        found[LIGHTNING] = lightning_losses(*common, count)
    return found


def launch(spec: dict[str, Any], procs: int) -> list[dict[str, Any]]:
    from hpc_trainer.performance.worker import ENVIRONMENT

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec))
        launcher = [
            *("-m", "hpc_trainer.launch", "--nnodes", "1", "--nproc-per-node", str(procs)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        ]
        command = [sys.executable, *launcher, "-m", "benchmarks.ddp_overhead", "--child", str(path)]
        subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT})
        return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(procs)]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and its 95 % interval by order statistics (binomial)."""
    ordered, n = sorted(values), len(values)
    half = 0.98 * n**0.5
    low, high = max(0, int(n / 2 - half)), min(n - 1, int(n / 2 + half))
    return median(ordered), ordered[low], ordered[high]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ddp_overhead", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="of each contestant in a pair")
    parser.add_argument("--app", default="seismic_facies", choices=sorted(QUIET))
    parser.add_argument("--quick", action="store_true", help="toy_regression, 5 pairs of 3 steps")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.child)
        return 0
    name, pairs, steps = ("toy_regression", 5, 3) if args.quick else (args.app, args.pairs, args.steps)
    lightning = importlib.util.find_spec("pytorch_lightning") is not None
    spec = {"application": name, "lightning": lightning, "pairs": pairs, "steps": steps}
    plain = [*QUIET[name], *COMMON]
    ranks = launch({**spec, "work": "speed", "samples": 0, "overrides": plain}, 2)
    slowest = {who: [max(r[who][n] for r in ranks) for n in range(pairs)] for who in ranks[0]}
    document: dict[str, Any] = {
        "application": name,
        "pairs": pairs,
        "seconds": {w: median(t) for w, t in slowest.items()},
    }
    document["ratio"] = {
        who: interval([a / b for a, b in zip(slowest[OURS], times, strict=True)])
        for who, times in slowest.items()
        if who != OURS
    }
    (alone,) = launch({**spec, "work": "speed", "lightning": False, "samples": 0, "overrides": plain}, 1)
    document["speedup"] = {who: median(times) / document["seconds"][who] for who, times in alone.items()}
    small = [*application(name).verify, *plain, *STEEP, f"pretrain.batch_size={BATCH}"]
    found = [launch({**spec, "work": "losses", "samples": SAMPLES, "overrides": small}, procs)[0] for procs in (1, 2)]
    document["loss_deviation"] = {
        who: max(abs(a - b) for a, b in zip(*(f[who] for f in found), strict=True)) / max(found[0][who])
        for who in found[0]
    }
    if args.json:
        print(json.dumps(document))
        return 0
    show(document, lightning)
    return 0


def show(document: dict[str, Any], lightning: bool) -> None:
    print(f"{document['application']}, 2 processes, {document['pairs']} alternating pairs:")
    for who, seconds in document["seconds"].items():
        ratio = ""
        if who in document["ratio"]:
            value, low, high = document["ratio"][who]
            ratio = f"; ours takes {value:.3f} of its time ({low:.3f} to {high:.3f})"
        deviation = document["loss_deviation"][who]
        print(
            f"  {who:12} {1e3 * seconds:8.1f} ms a step{ratio}; loss at 2 processes off by {deviation:.1e}", flush=True
        )
    ours, plain = (document["speedup"][who] for who in (OURS, PLAIN))
    print(
        f"  strong scaling, 1 -> 2 processes: ours {ours:.2f}, plain DDP {plain:.2f}; ours reaches {ours / plain:.3f} of it"
    )
    if not lightning:
        print("  Lightning is not installed: pip install 'fieldfleet[bench]'")


def child(path: Path) -> None:
    spec = json.loads(path.read_text())
    torch.set_num_threads(1)
    processes = join()
    found = {"speed": speed, "losses": losses}[spec["work"]](spec, processes, path.parent)
    atomic.write_json(path.parent / f"rank-{processes.rank}.json", found)
    processes.close()


if __name__ == "__main__":
    sys.exit(main())
