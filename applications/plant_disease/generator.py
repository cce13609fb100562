"""Growing sites without data: each with its own backdrop, cultivar, camera, light and mix of diseases."""

from __future__ import annotations

import numpy as np

from applications.plant_disease import leaves
from applications.plant_disease.clients import Facts
from applications.plant_disease.config import Config
from applications.plant_disease.data import Leaf, Leaves
from fl_core.learning import seeding

SYMPTOM_OF = {
    "northern_leaf_blight": "cigar",
    "common_rust": "pustules",
    "gray_leaf_spot": "stripes",
    "healthy": "none",
}
SECOND_SHOT = 0.15  # share of plants that are photographed twice: near-duplicates, of one group
SKEW = 2.0  # Dirichlet parameter of a site's mix of classes


def looks(classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """(symptom, variant) of each class: of the known ones their own, of others the diseases' in turn, coarser each time."""
    diseases = leaves.SYMPTOMS[:-1]
    return [
        (SYMPTOM_OF[name], 0) if name in SYMPTOM_OF else (diseases[i % 3], 1 + i // 3) for i, name in enumerate(classes)
    ]


def generate(config: Config, seed: int) -> Leaves:
    """data.clients x data.images_per_client photographs; site k is the same however many sites there are."""
    d = config.data
    symptoms = looks(d.classes)
    found: list[Leaf] = []
    for k in range(d.clients):
        rng = seeding.generator(seed, "plant_disease site", k)
        site = leaves.Site.draw(rng)
        mix = rng.dirichlet(np.full(len(d.classes), SKEW))
        name, domain = f"site-{k:04d}", "lab" if site.backdrop in leaves.PLAIN else "field"
        plant, shots = 0, 0
        while shots < d.images_per_client:
            label = int(rng.choice(len(d.classes), p=mix))
            for _ in range(1 + int(rng.random() < SECOND_SHOT)):
                if shots == d.images_per_client:
                    break
                pixels = leaves.draw(
                    seeding.generator(seed, "plant_disease plant", k, plant),
                    seeding.generator(seed, "plant_disease shot", k, shots),
                    site,
                    *symptoms[label],
                    d.image_size,
                )
                facts = Facts(
                    file=f"images/{name}/{shots:05d}.png",
                    label=d.classes[label],
                    domain=domain,
                    site=name,
                    group=f"{name}/plant-{plant:05d}",
                    client=name,
                )
                found.append(Leaf(facts, pixels))
                shots += 1
            plant += 1
    return Leaves(tuple(found), False)
