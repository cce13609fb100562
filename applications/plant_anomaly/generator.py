"""Fields of maize without data: rows in the field, every third photograph of plants with blight, rust or yellowing."""

from __future__ import annotations

from applications.plant_anomaly.config import Config
from applications.plant_anomaly.data import Photograph, Photographs
from fl_core.imagery import field_scene
from fl_core.learning import seeding


def generate(config: Config, seed: int) -> Photographs:
    """data.clients x data.images_per_client photographs; field k is the same however many fields there are."""
    d = config.data
    found = []
    for k in range(d.clients):
        site = field_scene.Field.draw(seeding.generator(seed, "anomaly field", k), maize_share=1.0, view=d.view)
        client = f"field-{k:04d}"
        for shot in range(d.images_per_client):
            sick = field_scene.SICK[shot // 3 % len(field_scene.SICK)] if shot % 3 == 2 else ""
            scene = field_scene.draw(
                seeding.generator(seed, "anomaly photograph", k, shot), site, d.image_size, sick=sick
            )
            label = sick if scene.lesions.any() else d.healthy[0]  # a sick plant may stand outside the picture
            file = f"images/{client}/{shot:04d}.png"
            found.append(Photograph(file, label, client, client, file, scene.image, scene.lesions))
    return Photographs(tuple(found))
