"""seismic_facies: generator, augmentation, loss, metrics, models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score

from applications.seismic_facies import (
    APPLICATION,
    augment,
    generator,
    geology,
    metrics,
    survey,
)
from applications.seismic_facies.config import FACIES
from applications.seismic_facies.data import Volumes
from applications.seismic_facies.pipeline import UNLABELLED
from edge_export.onnx_file import write_onnx
from fl_core.contracts.errors import ConfigError
from fl_core.learning import seeding
from fl_core.learning.local_update import augmented
from fl_core.learning.torch_arrays import predict
from fl_core.runtime.parity import compare
from fl_core.runtime.session import Session
from tests.seismic import CONFIG, configured

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def made() -> Volumes:
    found: Volumes = APPLICATION.generate(CONFIG, 3)
    return found


def test_generated_traces_have_the_reference_spectrum_and_noise() -> None:
    rng = np.random.default_rng(0)
    traces = rng.standard_normal((40, 40, 128))
    made = survey.filtered(traces, survey.STORED, stretch=1.0, phase=0.5)
    measured = survey.measure(made.reshape(-1, 128), made, origin="made")
    found, want = np.array(measured.spectrum_db), np.array(survey.STORED.spectrum_db)
    band = want > -15
    assert np.abs(found - want)[band].mean() < 1.5  # dB; 128 samples resolve 2 Hz, and a Hann window smears
    layered = np.broadcast_to(rng.standard_normal(128), (60, 60, 128))
    noisy = layered + np.sqrt(0.5) * survey.noise(rng, layered.shape, 0.6)
    measured = survey.measure(noisy[0], noisy, origin="made")
    assert measured.noise_power[1] == pytest.approx(0.5, rel=0.1)
    assert measured.footprint == pytest.approx(0.6, abs=0.05)


@pytest.mark.real_data
def test_the_stored_reference_is_what_the_real_survey_says() -> None:
    import os

    if "FIELDFLEET_DATA" not in os.environ or not (Path(os.environ["FIELDFLEET_DATA"]) / "seismic_f3").is_dir():
        pytest.skip("FIELDFLEET_DATA holds no seismic_f3")
    measured = survey.reference("measured")
    np.testing.assert_allclose(measured.spectrum_db, survey.STORED.spectrum_db, atol=0.05)
    assert (measured.noise_power, measured.footprint) == (survey.STORED.noise_power, survey.STORED.footprint)


def test_surveys_are_alike_inside_and_differ_from_each_other() -> None:
    few, many = configured("data.clients=1"), configured("data.clients=3")
    a, b = APPLICATION.generate(few, 5), APPLICATION.generate(many, 5)
    np.testing.assert_array_equal(a.blocks[0].amplitude.data, b.blocks[0].amplitude.data)
    styles = [generator.style_of(5, k) for k in range(3)]
    assert len({s.facies for s in styles}) == 3


def test_every_facies_occurs_and_none_belongs_to_a_depth() -> None:
    config = configured("data.clients=8", "data.inlines=16", "data.crosslines=16", "data.samples=64")
    labels = np.stack([b.labels for b in APPLICATION.generate(config, 1).blocks])
    share = np.bincount(labels.ravel(), minlength=6) / labels.size
    assert (share > 0.01).all()
    assert share.max() < 0.5


def test_classes_of_another_data_set_have_no_generator() -> None:
    with pytest.raises(ConfigError, match="2 names"):
        APPLICATION.generate(configured("data.classes=['salt', 'rest']", "model.class_weights=[]"), 0)


def test_labels_move_with_the_amplitudes(made: Volumes) -> None:
    """An amplitude that shows its own label must still do so after augmentation, but for the gain."""
    examples = made.examples(CONFIG)
    marked = examples.take(slice(0, 8))
    marked = type(marked)({"amplitude": marked.targets[:, None].astype(np.float32) + 1}, marked.targets, marked.columns)
    turned = augmented(marked, np.arange(8), 4, CONFIG, APPLICATION.augment_function())
    assert not np.array_equal(turned.targets, marked.targets)
    for amplitude, target in zip(turned.inputs["amplitude"][:, 0], turned.targets, strict=True):
        ratio = amplitude / (target + 1.0)
        assert np.ptp(ratio) < 1e-5
        np.testing.assert_array_equal(np.sort(target.sum((0, 1))), np.sort(target.sum((0, 1))))
    keys = seeding.example_keys(4, np.arange(8))
    np.testing.assert_array_equal(augment.moved(marked.targets, keys, CONFIG), turned.targets)


def test_unlabelled_voxels_and_weights_in_the_loss() -> None:
    config = configured("model.class_weights=[1.0, 2.0, 1.0, 1.0, 1.0, 3.0]")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 4, 4, 4, generator=generator, dtype=torch.float64)
    truth = torch.randint(0, 6, (2, 4, 4, 4), generator=generator).to(torch.uint8)
    truth[0, 0] = UNLABELLED
    numerator, denominator = APPLICATION.loss_function()(logits, truth, config)
    kept = truth.ravel() != UNLABELLED
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(
        logits.movedim(1, -1).reshape(-1, 6)[kept], truth.ravel()[kept].long(), weight=weight
    )
    assert float(numerator / denominator) == pytest.approx(float(expected), rel=1e-12)
    assert float(denominator) == float(weight[truth.ravel()[kept].long()].sum())


def test_scores_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 4000).astype(np.uint8)  # class 5 is neither there nor predicted
    prediction = np.where(rng.random(4000) < 0.7, truth, rng.integers(0, 5, 4000))
    truth[:100] = UNLABELLED
    found = metrics.segmentation_scores(metrics.confusion(truth, prediction, 6))
    y, p = truth[100:], prediction[100:]
    assert found["mean_iou"] == pytest.approx(jaccard_score(y, p, average="macro"))
    assert found["frequency_weighted_iou"] == pytest.approx(jaccard_score(y, p, average="weighted"))
    assert found["mean_class_accuracy"] == pytest.approx(recall_score(y, p, average="macro"))
    np.testing.assert_array_equal(metrics.confusion(y, p, 5), confusion_matrix(y, p))
    each = metrics.class_iou(metrics.confusion(truth, prediction, 6))
    np.testing.assert_allclose(each[:5], jaccard_score(y, p, average=None))
    assert np.isnan(each[5])


def test_slice_changes_against_plain_loops() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, (4, 3, 5)).astype(np.uint8)
    truth[0, 0, 0] = UNLABELLED
    prediction = rng.integers(0, 3, (4, 3, 5))
    expected = np.zeros(4, int)
    for i, j, k in np.ndindex(3, 3, 5):
        if UNLABELLED in (truth[i, j, k], truth[i + 1, j, k]):
            continue
        true, found = truth[i, j, k] != truth[i + 1, j, k], prediction[i, j, k] != prediction[i + 1, j, k]
        expected += [1, true, found, found and not true]
    np.testing.assert_array_equal(metrics.slice_changes(truth, prediction), expected)
    assert metrics.continuity_scores(metrics.slice_changes(truth, truth)) == {
        "excess_slice_changes": 0.0,
        "false_slice_changes": 0.0,
    }


def parameters(*overrides: str, preset: str = "default") -> int:
    with torch.device("meta"):
        model = APPLICATION.build_model(APPLICATION.configure(overrides, preset=preset))
    return sum(p.numel() for p in model.parameters())


def test_presets_have_the_size_they_promise() -> None:
    assert parameters() * 4 < 2_000_000  # bytes: what a small device holds
    assert parameters(preset="twin") == pytest.approx(parameters(), rel=0.1)
    assert parameters(preset="attributes") * 4 < 2_000_000
    assert parameters(preset="attributes_twin") == pytest.approx(parameters(preset="attributes"), rel=0.1)
    assert parameters(preset="large") >= 100_000_000


def test_large_preset_fits_a_device_of_its_kind() -> None:
    """Weights, gradients and AdamW's two moments, and what the backward pass keeps, of one sub-volume."""
    config = APPLICATION.configure(preset="large")
    kept = 0

    def count(module: Any, arguments: Any, output: Any) -> None:
        nonlocal kept
        kept += output.numel() * 4

    with torch.device("meta"):
        model = APPLICATION.build_model(config)
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_hook(count)
        side = config.data.crop
        assert model(torch.empty(1, 1, side, side, side)).shape == (1, len(FACIES), side, side, side)
    states = 4 * 4 * sum(p.numel() for p in model.parameters())
    assert states < 2.5 * 2**30
    assert kept < 1.5 * 2**30


def test_the_twin_knows_one_inline_at_a_time() -> None:
    config = APPLICATION.configure(["data.crop=16", "data.stride=16", "model.width=4"], preset="twin")
    model = APPLICATION.build_model(config).eval()
    torch.manual_seed(0)
    x = torch.randn(1, 1, 16, 16, 16)
    changed = x.clone()
    changed[0, 0, 5] += 1
    with torch.inference_mode():
        difference = (model(changed) - model(x)).abs().amax((0, 1, 3, 4))
    assert difference[5] > 0
    assert difference[[i for i in range(16) if i != 5]].max() == 0


def test_waves_stand_out_from_the_wavelet_and_bend_more_than_folds() -> None:
    for seed in range(5):
        height = geology.waves(np.random.default_rng(seed), (64, 64))
        assert 3 < np.ptp(height) < 8
        steepest = np.hypot(*np.gradient(height)).max()
        assert 0.7 < steepest < 2.0


@pytest.mark.slow
def test_stepping_nets_with_dips_become_onnx(tmp_path: Path) -> None:
    config = configured("model.width=4", "model.levels=2", "model.stem=2", "model.attributes=true")
    examples = APPLICATION.generate(config, 0).examples(config).take([0, 1])
    model = APPLICATION.build_model(config).eval()
    write_onnx(model, APPLICATION, config, examples, tmp_path / "m.onnx", opset=config.export.opset)
    found = Session(tmp_path / "m.onnx").run(examples.inputs)
    assert compare(predict(model, APPLICATION, config, examples), found).relative_max <= config.export.parity_tolerance


def test_settings_that_do_not_fit_are_refused() -> None:
    for overrides, text in (
        (["data.crop=36"], "not a multiple of 8"),
        (["data.crop=16", "data.stride=32"], "leaves gaps"),
        (["model.class_weights=[1.0]"], "has 1 entries"),
        (["data.classes=['a', 'a']"], "different names"),
    ):
        with pytest.raises(ConfigError, match=text):
            APPLICATION.configure(overrides)


def test_folds_faults_and_pads_leave_the_whole_volume_filled() -> None:
    style = geology.Style(facies=(0.2,) * 5, dip=0.2, faults=3.0, channels=2.0, thickness=12.0)
    for seed in range(10):
        labels, reflectivity = geology.block(np.random.default_rng(seed), (20, 24, 32), style)
        assert labels.shape == reflectivity.shape == (20, 24, 32 + 2 * geology.PAD)
        assert np.isfinite(reflectivity).all()
        assert labels.max() < len(FACIES)
