"""toy_regression: the application to copy. Linear regression on clients whose inputs differ in mean and scale."""

from applications.toy_regression import data, metrics, pipeline
from applications.toy_regression.config import Config
from applications.toy_regression.generator import generate
from applications.toy_regression.samples import FORMAT as SAMPLES
from fl_core.learning.application import Application

APPLICATION = Application(
    name="toy_regression",
    title="Toy regression",
    summary="One target from a few numeric columns; every client draws its inputs from its own distribution.",
    config_type=Config,
    data_set="toy_regression",
    client_term="client",
    read=data.read,
    generate=generate,
    inputs=pipeline.inputs,
    outputs=pipeline.outputs,
    postprocess=pipeline.postprocess,
    metrics=metrics.metrics,
    groups=metrics.groups,
    labels=pipeline.labels,
    primary_metric="r2",
    higher_is_better=True,
    model="applications.toy_regression.model:build_model",
    loss="applications.toy_regression.loss:loss",
    sample="applications.toy_regression.loss:sample",
    samples=SAMPLES,
    verify=("model.hidden=12",),
)
