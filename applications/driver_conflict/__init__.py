"""driver_conflict: crashes and near-crashes in windows of kinematic and radar time series (100-Car format)."""

from applications.driver_conflict import data, metrics, pipeline
from applications.driver_conflict.config import Config
from applications.driver_conflict.generator import generate
from applications.driver_conflict.samples import FORMAT as SAMPLES
from fl_core.learning.application import Application

APPLICATION = Application(
    name="driver_conflict",
    title="Traffic conflict detection",
    summary="Is a crash or near-crash under way? 3 s windows of vehicle kinematics and radar, one vehicle = one client.",
    config_type=Config,
    data_set="driving_100car",
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
    model="applications.driver_conflict.model:build_model",
    loss="applications.driver_conflict.loss:loss",
    sample="applications.driver_conflict.loss:sample",
    augment="applications.driver_conflict.augment:augment",
    floor="applications.driver_conflict.floor:boosted_trees",
    pictures="applications.driver_conflict.pictures:pictures",
    samples=SAMPLES,
    verify=("model.width=8", "model.positive_weight=4.0", "data.clients=6"),
)
