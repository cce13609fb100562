"""topology_optimisation: the stiffest design of a given volume, predicted from its loads and supports."""

from applications.topology_optimisation import data, metrics, pipeline
from applications.topology_optimisation.config import Config
from applications.topology_optimisation.generator import generate
from fl_core.learning.application import Application

APPLICATION = Application(
    name="topology_optimisation",
    title="3-D topology optimisation",
    summary="Where must material go so that a part of given volume is stiffest? One company = one client.",
    config_type=Config,
    data_set="topology_optimisation",
    client_term="company",
    read=data.read,
    generate=generate,
    inputs=pipeline.inputs,
    outputs=pipeline.outputs,
    postprocess=pipeline.postprocess,
    metrics=metrics.metrics,
    groups=metrics.groups,
    labels=pipeline.labels,
    primary_metric="compliance_error",
    higher_is_better=False,
    model="applications.topology_optimisation.model:build_model",
    loss="applications.topology_optimisation.loss:loss",
    augment="applications.topology_optimisation.augment:AUGMENTATION",
    floor="applications.topology_optimisation.floor:nearest_design",
    verify=(
        "model.width=4",
        "model.depth=1",
        "data.size=8",
        "data.problems_per_client=12",
        "data.iterations=4",
        "data.judged=0",
    ),
)
