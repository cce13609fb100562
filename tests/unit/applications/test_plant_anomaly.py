"""plant_anomaly: made-up lesions, the whitened latent, the threshold, the format, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from applications.plant_anomaly import APPLICATION, augment, data, detect, metrics, pipeline
from applications.plant_anomaly.config import Config
from applications.plant_anomaly.data import Photographs
from applications.plant_anomaly.pipeline import UNKNOWN
from fl_core.algorithms import statistics_head
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.errors import ConfigError, DataError, InputError
from fl_core.learning import seeding
from fl_core.learning.examples import Examples
from fl_core.learning.partition import client_data
from fl_core.learning.torch_arrays import get_arrays, predict, set_arrays, tensors
from hpc_trainer.performance.estimate import estimate
from simulations.simulate import simulate

Array = npt.NDArray[Any]
SMALL = (
    *("data.clients=4", "data.images_per_client=12", "data.image_size=48", "data.holdout_fraction=0.25"),
    *("model.width=4", "model.latent=4", "data.validation_fraction=0.4"),
)
CONFIG: Config = APPLICATION.configure(SMALL)


@pytest.fixture(scope="module")
def made() -> Photographs:
    found: Photographs = APPLICATION.generate(CONFIG, 3)
    return found


@pytest.fixture(scope="module")
def examples(made: Photographs) -> Examples:
    return made.examples(CONFIG)


class TestMadeUpLesions:
    def test_targets_keep_the_plant_as_it_was_and_mark_what_changed(self, examples: Examples) -> None:
        healthy = examples.take(~examples.columns["sick"])
        config = APPLICATION.configure([*SMALL, "data.paint=1.0"])
        keys = seeding.example_keys(5, np.arange(len(healthy)))
        seen = augment.AUGMENTATION(dict(healthy.inputs), keys, config)["image"]
        targets = augment.AUGMENTATION.targets(healthy.targets, keys, config)
        changed = np.abs(seen.astype(int) - targets[..., :3]).sum(-1) > 0
        marked = targets[..., 3] == 1
        assert (marked & ~changed).mean() < 0.002  # a lesion may have the tissue's own colour somewhere
        assert marked.any((1, 2)).mean() > 0.5
        assert 0 < marked.mean() < 0.2

    def test_ground_is_never_painted(self, examples: Examples) -> None:
        examples = examples.take(~examples.columns["sick"])
        config = APPLICATION.configure([*SMALL, "data.paint=1.0", "data.colour=0.0", "data.rotate=0.0"])
        keys = seeding.example_keys(6, np.arange(len(examples)))
        marked = augment.AUGMENTATION.targets(examples.targets, keys, config)[..., 3] == 1
        image = examples.inputs["image"].astype(float) + 1
        excess = (2 * image[..., 1] - image[..., 0] - image[..., 2]) / image.sum(-1)
        assert excess[marked].min() > augment.GREEN - 0.02

    def test_without_paint_the_targets_are_the_inputs(self, examples: Examples) -> None:
        config = APPLICATION.configure([*SMALL, "data.paint=0.0"])
        keys = seeding.example_keys(7, np.arange(len(examples)))
        seen = augment.AUGMENTATION(dict(examples.inputs), keys, config)["image"]
        targets = augment.AUGMENTATION.targets(examples.targets, keys, config)
        np.testing.assert_array_equal(seen, targets[..., :3])
        assert set(np.unique(targets[..., 3])) <= {0, 1}


class TestGenerator:
    def test_sick_photographs_show_lesions_and_healthy_ones_do_not(self, examples: Examples) -> None:
        lesions, sick = examples.targets[..., 3].any((1, 2)), examples.columns["sick"]
        np.testing.assert_array_equal(lesions, sick)
        assert 0.15 < sick.mean() < 0.4
        assert {"blight", "rust"} <= set(examples.columns["label"])
        assert not (sick & examples.columns["trainable"]).any()


class TestFormat:
    def test_masks_sites_and_unknown_lesions(self, tmp_path: Path) -> None:
        Image.new("RGB", (60, 40), (30, 140, 40)).save(tmp_path / "a.jpg")
        Image.new("RGB", (40, 40), (30, 140, 40)).save(tmp_path / "b.jpg")
        mask = np.zeros((40, 60), np.uint8)
        mask[:, 30:] = 255
        Image.fromarray(mask).convert("1").save(tmp_path / "a.png")
        (tmp_path / "labels.csv").write_text("file,label,site,mask\na.jpg,blight,north,a.png\nb.jpg,healthy,south,\n")
        found = data.read(tmp_path)
        assert found.client_ids() == ("north", "south")
        targets = found.examples(APPLICATION.configure(["data.image_size=40"])).targets
        assert (targets[0, :, :20, 3] == 0).all()
        assert (targets[0, :, 20:, 3] == 1).all()
        assert (targets[1, ..., 3] == UNKNOWN).all()

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("a.jpg,healthy\na.jpg,healthy", "listed twice"),
            ("../a.jpg,healthy", "not a file inside"),
            ("a.jpg,", "label is empty"),
            ("none.jpg,healthy", "no such image"),
        ],
    )
    def test_damaged_tables_are_refused_by_name(self, rows: str, message: str, tmp_path: Path) -> None:
        Image.new("RGB", (20, 20)).save(tmp_path / "a.jpg")
        (tmp_path / "labels.csv").write_text(f"file,label\n{rows}\n")
        with pytest.raises(DataError, match=message):
            data.read(tmp_path)


class TestScores:
    def test_rate_at_a_false_alarm_rate(self) -> None:
        score = np.concatenate([np.arange(100.0), [94.5, 98.5, 200.0]])
        sick = np.arange(103) >= 100
        assert metrics.rate_at(score, sick, 0.05) == pytest.approx(2 / 3)
        assert metrics.rate_at(score, np.zeros(103, bool), 0.05) is None

    def test_conformal_threshold(self) -> None:
        """Of many draws, new healthy plants exceed it as often as stated, and no more."""
        rng = np.random.default_rng(0)
        alarms = [
            (rng.normal(size=50) > detect.conformal_threshold(rng.normal(size=39), 0.05)).mean() for _ in range(400)
        ]
        assert 0.035 < np.mean(alarms) <= 0.055
        with pytest.raises(InputError, match="19 or more"):
            detect.conformal_threshold(np.zeros(18), 0.05)


def test_the_whitening_of_one_round_is_that_of_all_healthy_plants_together(
    made: Photographs, examples: Examples, tmp_path: Path
) -> None:
    """And the report of the model that comes out."""
    torch.set_num_threads(1)
    config = APPLICATION.configure(
        [*SMALL, "algorithm.name=statistics_head", "algorithm.head_shrinkage=0.0", "algorithm.evaluate_every=0"]
    )
    found = simulate(APPLICATION, config, made, start=None, num_rounds=1, seed=0, out=tmp_path / "run")
    arrays = checkpoints.load(found.final).arrays
    model = APPLICATION.build_model(config)
    reference = get_arrays(model)
    clients = [c for c in examples.clients() if c not in found.held_out]
    parts = [client_data(examples.of_clients([c]), c, config.data.validation_fraction, 0).train for c in clients]
    size = pipeline.latent_size(config)
    sums = statistics_head.zeros((size, size), "whitening")
    vectors: list[torch.Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, given: vectors.append(given[0]))  # type: ignore[operator]
    model.eval()
    with torch.inference_mode():
        for part in parts:
            assert not part.columns["sick"].any()
            model(*tensors(APPLICATION, config, part))
            statistics_head.add_examples(sums, vectors[-1].double().numpy(), part.targets)
    hook.remove()
    weight, bias = statistics_head.solve(sums, config.algorithm)
    np.testing.assert_allclose(arrays["head.weight"], weight, rtol=1e-3, atol=1e-3 * np.abs(weight).max())
    np.testing.assert_allclose(arrays["head.bias"], bias, rtol=1e-3, atol=1e-3 * np.abs(bias).max())
    assert all((arrays[n] == reference[n]).all() for n in reference if not n.startswith("head."))
    set_arrays(model, arrays, origin="the round")
    healthy = np.concatenate([predict(model, APPLICATION, config, p)["latent"] for p in parts])
    white = torch.cat(vectors).double().numpy() @ weight.T + bias
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(size), atol=1e-3)
    assert np.mean(white**2) == pytest.approx(1.0, rel=0.02)
    weights = np.array([config.model.heat_weight, config.model.error_weight])
    margin = config.model.evidence_margin
    assert margin > 0
    squares = white**2
    squares[:, :2] = (
        weights * np.maximum(white[:, :2] + margin, 0) ** 2
    )  # much less heat and error than healthy plants have is no evidence
    z = np.linspace(-8, 8, 100_001)
    share = np.trapezoid(np.maximum(z + margin, 0) ** 2 * np.exp(-0.5 * z**2), z) / np.sqrt(2 * np.pi)
    knee = config.model.latent_knee * (size - 2)
    rest = squares[:, 2:].sum(1)
    rest = np.where(rest > knee, knee * (1 + np.log(np.maximum(rest, knee) / knee)), rest)  # unusual is not yet sick
    assert (rest < squares[:, 2:].sum(1)).any()
    expected = (squares[:, :2].sum(1) + rest) / (size - 2 + weights.sum() * share)
    np.testing.assert_allclose(pipeline.distance(healthy) ** 2, expected, rtol=2e-3, atol=2e-3)

    made.write(tmp_path / "d")
    command = [str(found.final), "--data", str(tmp_path / "d"), "--out", str(tmp_path / "out"), "--false-alarms", "0.2"]
    assert detect.main(command) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["above"]["sick"]["plants"] > 0
    assert set(report["above"]) >= {"healthy", "sick", "sick: blight"}
    assert all((tmp_path / "out" / n).stat().st_size > 10_000 for n in ("latent.png", "heat.png", "report.html"))
    assert detect.main([*command[:-1], "1.5"]) == 2


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0, 100.0])
def test_the_smooth_maximum_of_the_heat_by_its_plain_formula(sharpness: float) -> None:
    config = APPLICATION.configure((*SMALL, f"model.heat_sharpness={sharpness}"))
    model = APPLICATION.build_model(config).double().eval()
    vectors: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _, given: vectors.append(given[0]))
    side = config.data.image_size
    pictures = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    with torch.inference_mode():
        heat = 10 * model(torch.from_numpy(pictures))[1].flatten(1)
        model.fine.weight *= 10
        model.fine.bias *= 10
        model.coarse.weight *= 10
        model.coarse.bias *= 10
        model(torch.from_numpy(pictures))
    wide = heat.numpy().astype(np.longdouble)  # whose exponentials do not overflow
    plain = [float(np.log(np.mean(np.exp(sharpness * row)))) / sharpness for row in wide]
    np.testing.assert_allclose(vectors[-1][:, 0].numpy(), plain, rtol=1e-9)
    assert (np.ptp(heat.numpy(), axis=1) > 0.5).all(), "flat heat has one maximum at any sharpness"


def test_the_large_preset_is_large_and_its_memory_is_known() -> None:
    found = estimate(APPLICATION, "large", ["pretrain.batch_size=2"], world=1, parallel="ddp")
    assert found["parameters"] > 100_000_000
    assert 3 * 4 * found["parameters"] < found["memory_bytes"]["total"] < 6 * 2**30


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        APPLICATION.configure(["data.image_size=50"])
