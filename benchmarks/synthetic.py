"""Learning under skew and stragglers: Synthetic(1, 1) and its IID variant (Li et al., MLSys 2020), over several draws.

    python -m benchmarks.synthetic [--draws 5] [--rounds 200] [--out DIR] [--quick]

30 clients, 10 a round, SGD with lr 0.01, batches of 10, 20 epochs. At 90 % stragglers nine of the ten clients have time for 1
to 19 epochs only: FedAvg drops them, the others keep what they have done. The project's round engine and algorithms run on
its virtual clock; only the local update is a numpy softmax regression, held to the sequential one by a test.

Prints the mean accuracy and training loss of the last 20 rounds with 95 % intervals over the draws, and asserts the
orders: drop < partial < proximal; the proximal term cuts the loss's spread from round to round at least 5 times, and is
slower on IID data. One file a cell under --out: a repeated call resumes. A plot of the losses lies beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _synthetic as synthetic
from fl_core.contracts.progress import Progress
from fl_core.contracts.sections import AlgorithmConfig, OptimizerConfig
from fl_core.learning.client_states import SlotStates
from fl_core.report import charts
from fl_core.storage import atomic
from fl_server.engine import RoundEngine
from simulations.grid import InProcessGrid
from simulations.virtual.grid import VirtualGrid, Work

RESULTS = Path("runs/benchmarks/synthetic")
LAST = 20
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # Student's t by degrees


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. stragglers: share of a round's clients; keep: their partial work counts."""

    title: str
    algorithm: str
    stragglers: float = 0.9
    keep: bool = True
    mu: float = 0.0
    iid: bool = False


ROWS = {
    "drop": Row("FedAvg, stragglers dropped", "fedavg", keep=False),
    "partial": Row("FedAvg, partial work kept", "fedavg"),
    "proximal": Row("FedProx, mu 1", "fedprox", mu=1.0),
    "fednova": Row("FedNova", "fednova"),
    "all": Row("FedAvg, no stragglers", "fedavg", stragglers=0.0),
    "scaffold": Row("SCAFFOLD, no stragglers", "scaffold", stragglers=0.0),
    "iid": Row("IID data: FedAvg, no stragglers", "fedavg", stragglers=0.0, iid=True),
    "iid-proximal": Row("IID data: FedProx, mu 1", "fedprox", stragglers=0.0, mu=1.0, iid=True),
}
Curves = dict[str, dict[str, list[float]]]  # row -> metric -> value of each round


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthetic")
    parser.add_argument("--quick", action="store_true", help="one draw, few rounds, no order asserted")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    draws, rounds = (1, 3) if args.quick else (max(1, args.draws), args.rounds)
    found: list[Curves] = []
    with Progress("synthetic", draws * len(ROWS)) as bar:
        for draw in range(1, draws + 1):
            found.append({})
            for number, name in enumerate(ROWS, start=1):
                found[-1][name] = cell(args.out, name, draw, rounds)
                bar.update((draw - 1) * len(ROWS) + number, f"draw {draw}: {name}")
    report(found)
    plot = args.out / "losses.png"
    atomic.write_bytes(plot, picture(found[0]))
    print(f"losses of draw 1: {plot}")
    if args.quick:
        return 0
    missed = [words for words, holds in orders(found) if not holds]
    for words in missed:
        print(f"MISSED: {words}")
    return 1 if missed else 0


def cell(out: Path, name: str, draw: int, rounds: int) -> dict[str, list[float]]:
    """The curves of one row and draw, from its file where it has one."""
    path = out / f"{name}-draw{draw}-rounds{rounds}.json"
    if not path.is_file():
        atomic.write_json(path, federate(ROWS[name], draw, rounds))
    found: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def federate(row: Row, draw: int, rounds: int, *, epochs: int = 20) -> dict[str, list[float]]:
    clients = synthetic.generate(0 if row.iid else 1, 0 if row.iid else 1, draw, iid=row.iid)
    config = synthetic.Config(
        optimizer=OptimizerConfig(lr=0.01),
        algorithm=AlgorithmConfig(
            name=row.algorithm, clients_per_round=synthetic.PER_ROUND, local_epochs=epochs, batch_size=10,
            proximal_mu=row.mu, deadline_s=synthetic.DEADLINE_S, stragglers="partial" if row.keep else "drop",
        ),
    )  # fmt: skip
    work = {k: Work(train=c.train, validation=0, epochs=epochs, batch_size=10) for k, c in clients.items()}
    scorer = synthetic.Scorer(clients)
    with tempfile.TemporaryDirectory() as folder:
        states = SlotStates(Path(folder) / "states", sorted(clients).index)
        handlers = {k: synthetic.SoftmaxClient(k, c, config, states).handle for k, c in clients.items()}
        grid = VirtualGrid(
            InProcessGrid(handlers),
            synthetic.Stragglers(work, row.stragglers, draw),
            work=work.__getitem__,
            reply_bytes=0,
            deadline_s=synthetic.DEADLINE_S,
            partial=row.keep,
        )
        initial = {
            "weight": np.zeros((synthetic.CLASSES, synthetic.FEATURES), np.float32),
            "bias": np.zeros(synthetic.CLASSES, np.float32),
        }
        engine = RoundEngine(
            grid=grid, application=synthetic.APPLICATION, config=config, start=None, initial=initial,
            num_rounds=rounds, seed=draw, out=Path(folder) / "run", stage="simulation", evaluate_global=scorer,
        )  # fmt: skip
        engine.run()
        states.close()
    history = engine.history.records
    return {metric: [record.held_out[metric] for record in history] for metric in ("accuracy", "loss")}


def tail(values: Sequence[float]) -> float:
    return statistics.fmean(values[-LAST:])


def spread(values: Sequence[float]) -> float:
    """Mean absolute change from round to round, over the second half of the run."""
    half = np.asarray(values[len(values) // 2 :])
    return float(np.abs(np.diff(half)).mean())


def interval(values: Sequence[float]) -> str:
    """Mean and, from two draws on, half the width of the 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    factor = T_975.get(len(values) - 1, 1.96)
    return f"{mean:.3f} +- {factor * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def report(found: Sequence[Curves]) -> None:
    print(
        f"last {LAST} rounds, mean over {len(found)} draws of Synthetic(1, 1) and its IID variant; 90 % stragglers unless said"
    )
    print(f"{'':34} {'accuracy':>16} {'training loss':>16} {'change a round':>16}   accuracy by draw")
    for name, row in ROWS.items():
        accuracy = [tail(curves[name]["accuracy"]) for curves in found]
        loss = [tail(curves[name]["loss"]) for curves in found]
        change = [spread(curves[name]["loss"]) for curves in found]
        shown = " ".join(f"{a:.3f}" for a in accuracy)
        print(f"{row.title:34} {interval(accuracy):>16} {interval(loss):>16} {interval(change):>16}   {shown}")


def orders(found: Sequence[Curves]) -> list[tuple[str, bool]]:
    """What the paper says, of the means over the draws; levels differ too much between draws to be asserted."""

    def mean(name: str, metric: str) -> float:
        return statistics.fmean(tail(curves[name][metric]) for curves in found)

    def area(name: str) -> float:
        return statistics.fmean(statistics.fmean(curves[name]["loss"]) for curves in found)

    cut = statistics.fmean(spread(c["partial"]["loss"]) for c in found) / statistics.fmean(
        spread(c["proximal"]["loss"]) for c in found
    )
    drop, partial, proximal = (mean(name, "accuracy") for name in ("drop", "partial", "proximal"))
    print(f"spread of the loss from round to round: partial work / proximal = {cut:.1f}")
    return [
        (f"accuracy: drop {drop:.3f} < partial {partial:.3f} < proximal {proximal:.3f}", drop < partial < proximal),
        (f"the proximal term cuts the spread of the loss {cut:.1f} times, 5 are wanted", cut >= 5),
        ("proximal is slower on IID data: mean loss over the run", area("iid-proximal") > area("iid")),
    ]


def picture(curves: Curves) -> bytes:
    def series(names: Sequence[str]) -> dict[str, Any]:
        return {ROWS[n].title: (range(1, len(curves[n]["loss"]) + 1), curves[n]["loss"]) for n in names}

    return charts.two_panels(
        series([n for n, row in ROWS.items() if not row.iid]),
        series([n for n, row in ROWS.items() if row.iid]),
        x_label="round",
        y_labels=("training loss, Synthetic(1, 1)", "training loss, IID"),
    )


if __name__ == "__main__":
    raise SystemExit(main())
