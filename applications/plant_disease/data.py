"""Native format: a folder with ``labels.csv`` (file, label; optional domain, site, group, client) and its images."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Collection
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np

from applications.plant_disease import clients as ownership
from applications.plant_disease.clients import Facts
from applications.plant_disease.config import ALPHA, CLIENTS, Config
from fl_core.contracts.errors import DataError, InputError
from fl_core.contracts.names import checked_name
from fl_core.imagery import photographs
from fl_core.imagery.photographs import Pixels
from fl_core.learning.examples import Examples
from fl_core.storage import atomic, tables

TABLE_NAME = "labels.csv"
MAX_BYTES = 8 * 2**30  # of all decoded images together


@dataclass(frozen=True)
class Leaf:
    """One photograph: what labels.csv says of it, with its client filled in, and its file or its pixels."""

    facts: Facts
    source: Path | Pixels

    def pixels(self, side: int) -> Pixels:
        """(side, side, 3) RGB. Raises DataError naming the file."""
        if isinstance(self.source, Path):
            return photographs.read_square(self.source, self.facts.file, side)
        return photographs.from_pixels(self.source, side)


@dataclass(frozen=True)
class Leaves:
    """A data set. ``settled``: the clients are facts (a ``client`` column, or a selection was made), and no setting
    changes them; else ``data.client_column`` and its companions decide."""

    leaves: tuple[Leaf, ...]
    settled: bool

    def client_ids(self) -> tuple[str, ...]:
        return tuple(sorted({leaf.facts.client for leaf in self.leaves}))

    def select(self, clients: Collection[str]) -> Self:
        wanted = set(clients)
        return type(self)(tuple(leaf for leaf in self.leaves if leaf.facts.client in wanted), True)

    def write(self, folder: Path) -> None:
        """Images as they were encoded, never encoded again; the clients become a column."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([f.name for f in fields(Facts)])
        with atomic.new_folder(folder) as temporary:
            for leaf in self.leaves:
                target = temporary / leaf.facts.file
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(leaf.source, Path):
                    shutil.copyfile(leaf.source, target)
                else:
                    target.write_bytes(photographs.encode_png(leaf.source))
                writer.writerow(astuple(leaf.facts))
            (temporary / TABLE_NAME).write_text(out.getvalue(), encoding="utf-8")

    def examples(self, config: Any) -> Examples:
        """``image`` (N, side, side, 3) uint8; columns domain and site beside the usual ones.

        Raises DataError for a label outside ``data.classes`` and for an image that does not decode.
        """
        cfg: Config = config
        number = {name: i for i, name in enumerate(cfg.data.classes)}
        facts = [leaf.facts for leaf in self.leaves]
        self._check_labels(number)
        side = cfg.data.image_size
        if len(facts) * side * side * 3 > MAX_BYTES:
            raise DataError(
                f"{len(facts)} images of {side} x {side} pixels take over {MAX_BYTES:,} bytes",
                remedy="lower data.image_size, or split the data set",
            )
        images = np.empty((len(facts), side, side, 3), np.uint8)
        for i, leaf in enumerate(self.leaves):
            images[i] = leaf.pixels(side)
        owner = [f.client for f in facts]
        if not self.settled:
            d = cfg.data
            owner = ownership.assign(facts, d.client_column, d.dirichlet_clients, d.dirichlet_alpha)
        columns = {
            "example_id": [f.file for f in facts],
            "client": owner,
            "group": [f.group for f in facts],
            "domain": [f.domain for f in facts],
            "site": [f.site for f in facts],
        }
        copies = cfg.data.copies_of()
        return Examples(
            {"image": images},
            np.array([number[f.label] for f in facts], np.int64),
            {
                **{name: np.array(values, dtype=np.str_) for name, values in columns.items()},
                "copies": np.array([copies.get(f.domain, 1) for f in facts], np.int64),
            },
        )

    def _check_labels(self, known: Collection[str]) -> None:
        strange = next((leaf.facts for leaf in self.leaves if leaf.facts.label not in known), None)
        if strange is not None:
            found = ", ".join(f'"{name}"' for name in sorted({leaf.facts.label for leaf in self.leaves}))
            raise DataError(
                f"{TABLE_NAME}: {strange.file} has the label {strange.label!r}; the model's classes are: {', '.join(known)}",
                remedy=f"a new model for this data set: --set 'data.classes=[{found}]'",
            )


def read(path: Path) -> Leaves:
    """Raises DataError naming the file, the column or the line. Images are decoded later, by ``examples``."""
    table = path / TABLE_NAME
    rows = tables.read_csv(table, required=("file", "label"), limit_rows=1_000_000)
    root = path.resolve()
    found: list[tuple[Facts, Path]] = []
    seen: set[str] = set()
    for line, row in enumerate(rows, start=2):
        facts = _facts(table, line, row)
        if facts.file in seen:
            raise DataError(f"{table}: line {line}: {facts.file} is listed twice")
        seen.add(facts.file)
        found.append((facts, _inside(table, line, path, root, facts.file)))
    for facts, file in found:
        photographs.check_image(file, facts.file)
    settled = "client" in rows[0]
    facts_only = [facts for facts, _ in found]
    if settled:
        owner = ownership.one_client_a_group(facts_only, [f.client for f in facts_only], "client")
    else:
        owner = ownership.assign(facts_only, "auto", CLIENTS, ALPHA)
    leaves = (Leaf(replace(f, client=c), file) for (f, file), c in zip(found, owner, strict=True))
    return Leaves(tuple(leaves), settled)


def _facts(table: Path, line: int, row: dict[str, str]) -> Facts:
    """One line; an image without a group is a group of its own."""
    known = {f.name: row.get(f.name, "").strip() for f in fields(Facts)}
    for name in ("file", "label", *(("client",) if "client" in row else ())):
        if not known[name]:
            raise DataError(f"{table}: line {line}: {name} is empty")
    if known["client"]:
        try:
            checked_name(known["client"], "client")
        except InputError as error:
            raise DataError(f"{table}: line {line}: {error.message}", remedy=error.remedy) from None
    known["group"] = known["group"] or known["file"]
    return Facts(**known)


def _inside(table: Path, line: int, path: Path, root: Path, name: str) -> Path:
    """The image's path. Raises DataError when it lies outside the data set, by its name or by a link."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or pure.name in ("", TABLE_NAME):
        raise DataError(
            f"{table}: line {line}: {name!r} is not a file inside the data set's folder",
            remedy="write paths relative to labels.csv, without '..'",
        )
    file = path / name
    if not file.resolve().is_relative_to(root):
        raise DataError(f"{table}: line {line}: {name!r} links to a file outside the data set's folder")
    return file
