"""driver_attention: traffic conflict and driver state from clips of several cameras with the vehicle's motion."""

from applications.driver_attention import data, metrics, pipeline
from applications.driver_attention.config import Config
from applications.driver_attention.generator import generate
from applications.driver_attention.samples import FORMAT as SAMPLES
from fl_core.learning.application import Application

APPLICATION = Application(
    name="driver_attention",
    title="Driver attention and traffic conflict",
    summary="Is a traffic conflict under way, and is the driver attentive? Clips of several cameras, one vehicle = one client.",
    config_type=Config,
    data_set="driver_attention",
    client_term="vehicle",
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
    model="applications.driver_attention.model:build_model",
    loss="applications.driver_attention.loss:loss",
    augment="applications.driver_attention.augment:augment",
    floor="applications.driver_attention.floor:boosted_trees",
    pictures="applications.driver_attention.pictures:pictures",
    samples=SAMPLES,
    verify=("model.width=4", "model.features=8", "model.hidden=8", "data.clients=6", "data.clips_per_client=16"),
)
