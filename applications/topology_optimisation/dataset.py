"""Make a data set of solved problems, one file each, so that a killed run goes on where it stopped.

    python -m applications.topology_optimisation.dataset DIR --size 32 --clients 16 --problems 8 [--seed 0] [--part 0/2]
    python -m applications.topology_optimisation.dataset FINE_DIR --size 64 --coarse DIR ...

With --coarse, designs of the same problems on the grid half as fine are taken from that folder, not solved again. Each file
carries the processor seconds that its design took; the sum is printed at the end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from applications.topology_optimisation import families
from applications.topology_optimisation.data import Example, read_one
from applications.topology_optimisation.generator import solved, spec_of
from fl_core.contracts.errors import DataError
from fl_core.storage import atomic


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m applications.topology_optimisation.dataset")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--size", type=int, default=16, help="elements along each side")
    parser.add_argument("--clients", type=int, default=8, help="companies")
    parser.add_argument("--first", type=int, default=0, help="number of the first company")
    parser.add_argument("--problems", type=int, default=6, help="of each company")
    parser.add_argument("--iterations", type=int, default=40, help="of SIMP")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="every N-th problem, from the I-th: N processes side by side"
    )
    parser.add_argument("--coarse", type=Path, metavar="DIR", help="where designs on the grid half as fine may lie")
    args = parser.parse_args(arguments)
    part, parts = (int(v) for v in args.part.split("/"))
    wanted = [(c, n) for n in range(args.problems) for c in range(args.first, args.first + args.clients)][part::parts]
    seconds = 0.0
    for done, (client, number) in enumerate(wanted, start=1):
        name = f"company-{client:04d}", f"{args.seed}-{number:05d}"
        file = args.folder / f"{name[0]}-{name[1]}-{args.size}.npz"
        if not file.is_file():
            spec = spec_of(args.seed, client, number)
            coarse = known(args.coarse, name, spec, args.size // 2)
            example = solved(spec, args.size, args.iterations, *name, coarse=coarse)
            atomic.write_bytes(file, example.to_bytes())
        example = read_one(file)
        seconds += example.seconds
        print(
            f"{done}/{len(wanted)} {file.name} compliance {example.compliance:.4g} {example.seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    print(f"{len(wanted)} designs of {args.size}^3 in {args.folder}: {seconds:.0f} s of solving")
    return 0


def known(folder: Path | None, name: tuple[str, str], spec: families.Spec, size: int) -> Example | None:
    """The design of the same problem in ``folder``. Raises DataError where a file of that name holds another one."""
    file = folder / f"{name[0]}-{name[1]}-{size}.npz" if folder else None
    if file is None or not file.is_file():
        return None
    found, wanted = read_one(file), spec.problem(size)
    same = all(np.array_equal(getattr(found.problem, k), getattr(wanted, k)) for k in ("force", "fixed"))
    if not same or found.problem.volume_fraction != wanted.volume_fraction:
        raise DataError(f"{file}: is the design of another problem", remedy="give --coarse a folder of the same --seed")
    return found


if __name__ == "__main__":
    sys.exit(main())
