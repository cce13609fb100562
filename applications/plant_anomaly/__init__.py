"""plant_anomaly: is this plant healthy? Learned from healthy plants alone; one field or collection site = one client."""

from applications.plant_anomaly import data, metrics, pipeline
from applications.plant_anomaly.config import Config
from applications.plant_anomaly.generator import generate
from fl_core.learning.application import Application

APPLICATION = Application(
    name="plant_anomaly",
    title="Plant anomaly detection",
    summary="Is this plant healthy, and where is it not? Learned from photographs of healthy plants alone; one field = one client.",
    config_type=Config,
    data_set="tomato_leaf",
    client_term="field",
    read=data.read,
    generate=generate,
    inputs=pipeline.inputs,
    outputs=pipeline.outputs,
    postprocess=pipeline.postprocess,
    metrics=metrics.metrics,
    groups=metrics.groups,
    labels=pipeline.labels,
    primary_metric="roc_auc",
    higher_is_better=True,
    model="applications.plant_anomaly.model:build_model",
    loss="applications.plant_anomaly.loss:loss",
    augment="applications.plant_anomaly.augment:AUGMENTATION",
    floor="applications.plant_anomaly.floor:colour_neighbours",
    verify=(
        *("model.width=4", "model.latent=4", "data.image_size=32"),
        *("data.clients=4", "data.images_per_client=24", "optimizer.lr=0.0001"),
    ),
)
