"""Who owns which image: clients by a column, or by label skew inside each domain."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fl_core.contracts.errors import DataError, InputError
from fl_core.contracts.names import checked_name
from fl_core.learning import seeding

SMALLEST = 10  # images: label skew is drawn again while a client has fewer (as in Li et al., ICDE 2022)
DRAWS = 100
DIVISIBLE = 40  # groups: a domain of at least that many has two clients or more, so that one can be held out


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One line of labels.csv. Absent columns are empty; ``group`` is never empty. Near-duplicates share a group."""

    file: str
    label: str
    domain: str = ""
    site: str = ""
    group: str
    client: str = ""


def assign(facts: Sequence[Facts], rule: str, clients: int, alpha: float) -> list[str]:
    """The client of each image; a group has one client, so that no split by client parts near-duplicates.

    rule: site | domain | dirichlet | auto (site where every image has one, else dirichlet).
    Raises DataError when the column is empty, a name is not usable, or a group lies in two sites.
    """
    if rule == "auto":
        rule = "site" if facts and all(f.site for f in facts) else "dirichlet"
    if rule == "dirichlet":
        return _label_skew(facts, clients, alpha)
    for fact in facts:
        name = fact.site if rule == "site" else fact.domain
        if not name:
            raise DataError(
                f"labels.csv: {fact.file} has no {rule}", remedy="--set data.client_column=dirichlet, or fill it in"
            )
        _usable(name, rule)
    if rule == "site":
        return one_client_a_group(facts, [f.site for f in facts], rule)
    domains = _domains(facts)
    return [domains[f.group] for f in facts]


def one_client_a_group(facts: Sequence[Facts], names: list[str], kind: str) -> list[str]:
    """``names``, checked. Raises DataError naming a group that two clients share: near-duplicates would leak."""
    owner: dict[str, str] = {}
    for fact, name in zip(facts, names, strict=True):
        if owner.setdefault(fact.group, name) != name:
            raise DataError(
                f"labels.csv: group {fact.group!r} lies in the {kind}s {owner[fact.group]!r} and {name!r}",
                remedy=f"near-duplicates share a group, and a group belongs to one {kind}: rename or remove one of them",
            )
    return names


def _usable(name: str, kind: str) -> None:
    try:
        checked_name(name, kind)
    except InputError as error:
        raise DataError(f"labels.csv: {error.message}", remedy=error.remedy) from None


def _domains(facts: Sequence[Facts]) -> dict[str, str]:
    """group -> domain: near-duplicates across domains stay together, with the larger part of their group."""
    found: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        found[fact.group].append(fact.domain)
    return {group: _most_common(values) for group, values in found.items()}


def _label_skew(facts: Sequence[Facts], clients: int, alpha: float) -> list[str]:
    """Inside each domain, the share of a class that a client gets is Dirichlet(alpha) (Hsu et al. 2019).

    Names carry a digest of the data set: the ``field`` of two data sets is not one client.
    """
    labels: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        labels[fact.group].append(fact.label)
    domains: dict[str, list[str]] = defaultdict(list)
    for group, domain in _domains(facts).items():
        domains[domain].append(group)
    table = "\n".join(sorted(f"{f.file}\t{f.label}" for f in facts))
    digest = hashlib.sha256(table.encode()).hexdigest()[:6]
    owner: dict[str, str] = {}
    for domain, names in sorted(domains.items()):
        title = domain or "images"
        _usable(title, "domain")
        size = sum(len(labels[g]) for g in names)
        count = max(2 if len(names) >= DIVISIBLE else 1, round(clients * size / len(facts)))
        count = min(count, clients, max(1, size // (2 * SMALLEST)))
        drawn = _dirichlet({g: labels[g] for g in names}, count, alpha, title)
        owner |= {group: f"{title[:48]}-{digest}-{number:02d}" for group, number in drawn.items()}
    return [owner[f.group] for f in facts]


def _dirichlet(labels: dict[str, list[str]], count: int, alpha: float, key: str) -> dict[str, int]:
    """group -> client number. Drawn until every client has SMALLEST images; else the draw whose smallest is largest.

    labels: group -> the labels of its images.
    """
    by_label: dict[str, list[str]] = defaultdict(list)
    for group in sorted(labels):
        by_label[_most_common(labels[group])].append(group)
    best, best_least = dict.fromkeys(labels, 0), -1.0
    for draw in range(DRAWS if count > 1 else 0):
        rng = seeding.generator("plant_disease label skew", key, count, draw)
        found: dict[str, int] = {}
        filled = np.zeros(count)
        for _, members in sorted(by_label.items()):
            order = [members[i] for i in rng.permutation(len(members))]
            sizes = np.array([len(labels[g]) for g in order])
            middle = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
            share = np.cumsum(rng.dirichlet(np.full(count, alpha)))
            numbers = np.minimum(np.searchsorted(share, middle), count - 1)
            found.update(zip(order, numbers.tolist(), strict=True))
            np.add.at(filled, numbers, sizes)
        if filled.min() > best_least:
            best, best_least = found, float(filled.min())
        if best_least >= SMALLEST:
            break
    return best


def _most_common(values: Iterable[str]) -> str:
    counts = Counter(values)
    return min(counts, key=lambda v: (-counts[v], v))
