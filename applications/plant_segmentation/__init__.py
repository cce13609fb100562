"""plant_segmentation: which pixels belong to which plant? Instances of crop plants in field photographs, one field = one client."""

from applications.plant_segmentation import data, metrics, pipeline
from applications.plant_segmentation.config import Config
from applications.plant_segmentation.generator import generate
from fl_core.learning.application import Application

APPLICATION = Application(
    name="plant_segmentation",
    title="Plant instance segmentation",
    summary="Which pixels belong to which plant? Photographs of crops in the field, one field = one client.",
    config_type=Config,
    data_set="plant_segmentation",
    client_term="field",
    read=data.read,
    generate=generate,
    inputs=pipeline.inputs,
    outputs=pipeline.outputs,
    postprocess=pipeline.postprocess,
    metrics=metrics.metrics,
    groups=metrics.groups,
    labels=pipeline.labels,
    primary_metric="symmetric_best_dice",
    higher_is_better=True,
    model="applications.plant_segmentation.model:build_model",
    loss="applications.plant_segmentation.loss:loss",
    augment="applications.plant_segmentation.augment:AUGMENTATION",
    floor="applications.plant_segmentation.floor:floor",
    verify=(
        *("model.width=4", "model.levels=2", "data.image_size=32", "data.stride=32"),
        *("data.clients=4", "data.images_per_client=16", "optimizer.lr=0.0001"),
    ),
)
