"""plant_disease: which disease does a leaf show? Classification of photographs, one growing site = one client."""

from applications.plant_disease import data, metrics, pipeline
from applications.plant_disease.config import Config
from applications.plant_disease.generator import generate
from applications.plant_disease.samples import FORMAT as SAMPLES
from fl_core.learning.application import Application

APPLICATION = Application(
    name="plant_disease",
    title="Plant disease classification",
    summary="Which disease does a leaf show? Photographs of leaves, one growing site = one client.",
    config_type=Config,
    data_set="maize_leaf",
    client_term="site",
    read=data.read,
    generate=generate,
    inputs=pipeline.inputs,
    outputs=pipeline.outputs,
    postprocess=pipeline.postprocess,
    metrics=metrics.metrics,
    groups=metrics.groups,
    labels=pipeline.labels,
    primary_metric="accuracy",
    higher_is_better=True,
    model="applications.plant_disease.model:build_model",
    loss="applications.plant_disease.loss:loss",
    augment="applications.plant_disease.augment:augment",
    floor="applications.plant_disease.floor:random_forest",
    samples=SAMPLES,
    verify=(
        *("model.width=8", "model.class_weights=[0.2, 1.0, 4.0, 1.5]"),
        *("data.image_size=32", "data.clients=4", "data.images_per_client=24", "optimizer.lr=0.0001"),
    ),
)
