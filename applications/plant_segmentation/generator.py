"""Fields without data: each with its own crop, stage, density, soil, weeds, light and camera; the plants of each pixel are known."""

from __future__ import annotations

import numpy as np

from applications.plant_segmentation.config import Config
from applications.plant_segmentation.data import Pictures
from applications.plant_segmentation.formats import Picture
from applications.plant_segmentation.pipeline import UNLABELLED
from fl_core.imagery import field_scene
from fl_core.learning import seeding


def generate(config: Config, seed: int) -> Pictures:
    """data.clients x data.images_per_client photographs of one tile each; field k is the same however many there are."""
    d = config.data
    found = []
    for k in range(d.clients):
        site = field_scene.Field.draw(seeding.generator(seed, "plant field", k), maize_share=d.maize_share, view=d.view)
        client = f"field-{k:04d}"
        for shot in range(d.images_per_client):
            scene = field_scene.draw(seeding.generator(seed, "plant photograph", k, shot), site, d.image_size)
            labels = scene.plants.copy()
            size = np.bincount(labels.ravel())
            scraps = np.flatnonzero(size < d.min_visible)
            labels[np.isin(labels, scraps[scraps > 0])] = UNLABELLED
            name = f"{client}/{shot:04d}.png"
            found.append(Picture(name, client, name, scene.image, labels, site.crop))
    return Pictures(tuple(found))
