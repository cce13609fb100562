"""seismic_facies: which depositional unit is each voxel of a seismic volume? One survey = one client."""

from applications.seismic_facies import data, metrics, pipeline
from applications.seismic_facies.config import Config
from applications.seismic_facies.generator import generate
from fl_core.learning.application import Application

APPLICATION = Application(
    name="seismic_facies",
    title="3-D seismic facies",
    summary="Which seismic facies does each voxel of a 3-D amplitude volume show? One survey = one client.",
    config_type=Config,
    data_set="seismic_facies",
    client_term="survey",
    read=data.read,
    generate=generate,
    inputs=pipeline.inputs,
    outputs=pipeline.outputs,
    postprocess=pipeline.postprocess,
    metrics=metrics.metrics,
    groups=metrics.groups,
    labels=pipeline.labels,
    primary_metric="mean_iou",
    higher_is_better=True,
    model="applications.seismic_facies.model:build_model",
    loss="applications.seismic_facies.loss:loss",
    augment="applications.seismic_facies.augment:AUGMENTATION",
    floor="applications.seismic_facies.floor:boosted_trees",
    verify=(
        *("model.width=4", "model.levels=2", "model.class_weights=[0.2, 1.0, 4.0, 1.5, 0.7, 2.0]"),
        *("data.crop=8", "data.stride=8", "data.inlines=16", "data.crosslines=16", "data.samples=16"),
        *("data.clients=5", "data.volumes_per_client=3", "data.reference=stored", "optimizer.lr=0.001"),
    ),
)
