"""seismic_facies: whole volumes from tiles, and the floors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from applications.seismic_facies import (
    APPLICATION,
    floor,
    metrics,
    segment,
    tiles,
)
from applications.seismic_facies.config import Config
from applications.seismic_facies.data import Volumes
from applications.seismic_facies.model import dips, energies, receptive_radius
from applications.seismic_facies.pipeline import UNLABELLED, probabilities
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import InputError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.learning.examples import Examples
from fl_core.learning.torch_arrays import get_arrays
from tests.seismic import CONFIG, SMALL, configured

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def made() -> Volumes:
    found: Volumes = APPLICATION.generate(CONFIG, 3)
    return found


def small_net(norm: str, stem: int = 1) -> tuple[Config, torch.nn.Module]:
    """Two levels see 8 samples to each side; running statistics that are not those of a fresh model."""
    config = configured(f"model.norm={norm}", "model.width=4", "model.levels=2", f"model.stem={stem}")
    model = APPLICATION.build_model(config).train()
    torch.manual_seed(0)
    for _ in range(3):
        model(torch.randn(2, 1, 16, 16, 16))
    return config, model.eval()


def predictor(model: torch.nn.Module) -> tiles.Predict:
    def predict(batch: Array) -> Array:
        with torch.inference_mode():
            return probabilities(model(torch.from_numpy(batch)).numpy())

    return predict


def whole_and_tiled(norm: str, *, side: int, overlap: int, margin: int, stem: int = 1) -> tuple[Array, Array]:
    _, model = small_net(norm, stem)
    cube = np.random.default_rng(0).standard_normal((60, 40, 44)).astype(np.float32)
    whole = predictor(model)(cube[None, None])[0]
    parts = list(
        tiles.joined(predictor(model), cube, side=side, classes=6, overlap=overlap, margin=margin, batch_size=5)
    )
    starts = np.cumsum([0, *(p.shape[1] for _, p in parts)])
    assert [first for first, _ in parts] == starts[:-1].tolist()
    return whole, np.concatenate([p for _, p in parts], axis=1)


@pytest.mark.parametrize(("norm", "stem"), [("batch", 1), ("batch", 2), ("none", 1)])
def test_tiles_cut_at_the_field_of_view_equal_the_whole_volume(norm: str, stem: int) -> None:
    radius = receptive_radius(small_net(norm, stem)[0].model)
    whole, tiled = whole_and_tiled(norm, side=32, overlap=2 * radius, margin=radius, stem=stem)
    np.testing.assert_allclose(tiled, whole, atol=2e-6)


@pytest.mark.parametrize("attributes", ["false", "true"])
def test_the_field_of_view_is_as_wide_as_it_says(attributes: str) -> None:
    for levels, stem, side in ((2, 1, 48), (3, 1, 96), (2, 2, 48), (3, 2, 96)):
        torch.manual_seed(0)
        overrides = ("model.width=4", f"model.levels={levels}", f"model.stem={stem}", "model.norm=none")
        config = configured(*overrides, f"model.attributes={attributes}")
        model, radius = APPLICATION.build_model(config).eval(), receptive_radius(config.model)
        x = torch.randn(1, 1, side, 8, 8)
        x.requires_grad_()
        middle = side // 2
        model(x)[0, :, middle : middle + 2 ** (levels - 1)].abs().sum().backward()
        seen = np.flatnonzero(x.grad.abs().amax((0, 1, 3, 4)).numpy())
        reach = max(middle - seen.min(), seen.max() - (middle + 2 ** (levels - 1) - 1))
        assert reach <= radius <= reach + 2**levels


def test_dips_are_those_of_a_tilted_layer() -> None:
    """Of a plane wave the structure tensor is the outer product of its direction with itself."""
    direction = np.array([0.2, -0.3, 0.5])
    x, y, z = np.meshgrid(*[np.arange(24.0)] * 3, indexing="ij")
    wave = np.sin(direction[0] * x + direction[1] * y + direction[2] * z)
    means = torch.nn.functional.avg_pool3d(energies(torch.from_numpy(wave)[None, None]), 8)
    found = dips(means)[0, :, 1, 1, 1].numpy()
    slopes = np.sin(direction)  # of central differences
    wanted = [slopes[a] * slopes[b] / (slopes**2).sum() for a in range(3) for b in range(a, 3)][:-1]
    np.testing.assert_allclose(found[:-2], wanted, atol=0.02)
    assert found[-2] - found[-1] == pytest.approx(np.log((slopes**2).sum()) / 4, abs=0.02)
    assert dips(energies(torch.from_numpy(wave[0])[None, None])).shape == (1, 4, 24, 24)


@pytest.mark.parametrize(("norm", "limit"), [("batch", 0.02), ("group", 0.05)])
def test_blended_tiles_have_no_seams(norm: str, limit: float) -> None:
    """Jumps of the probability across tile faces are those found elsewhere; the whole is met within ``limit`` on average."""
    whole, tiled = whole_and_tiled(norm, side=16, overlap=8, margin=0)
    assert np.abs(tiled - whole).mean() < limit
    np.testing.assert_allclose(tiled.sum(axis=0), 1, atol=1e-5)
    jumps = np.abs(np.diff(tiled, axis=1)).mean(axis=(0, 2, 3))
    faces = [first - 1 for first in range(8, 60 - 16 + 8, 8)]
    elsewhere = np.delete(jumps, faces)
    assert jumps[faces].mean() < 1.1 * elsewhere.mean()


def test_tiles_that_leave_gaps_are_refused() -> None:
    def run(shape: tuple[int, ...], overlap: int, margin: int) -> None:
        list(tiles.joined(lambda x: x, np.zeros(shape), side=16, classes=1, overlap=overlap, margin=margin))

    for shape, overlap, margin in (
        ((8, 20, 20), 8, 0),
        ((20, 20, 20), 16, 0),
        ((20, 20, 20), 8, 5),
        ((20, 20, 20), 0, 0),
    ):
        with pytest.raises(InputError):
            run(shape, overlap, margin)


def saved(folder: Path, preset: str = "default", *overrides: str) -> Path:
    """An untrained small model as a checkpoint."""
    config = APPLICATION.configure([*SMALL, "model.width=4", "model.levels=3", *overrides], preset=preset)
    arrays = get_arrays(APPLICATION.build_model(config))
    manifest = CheckpointManifest(
        application="seismic_facies", config=to_table(config), stage="pretrain", clients_seen=["survey-000"]
    )
    Checkpoint(manifest, arrays).save(folder)
    return folder


def test_segment_labels_whole_volumes_scores_and_draws_them(
    made: Volumes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.write(tmp_path / "d")
    models = saved(tmp_path / "ours"), saved(tmp_path / "twin", "twin")
    command = [
        str(models[0]),
        "--compare",
        str(models[1]),
        "--data",
        str(tmp_path / "d"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert segment.main([*command, "--unseen", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["volumes"] == ["survey-001-block-0", "survey-001-block-1"]
    counts, changes = np.zeros((6, 6), np.int64), np.zeros(4, np.int64)
    for block in made.blocks[2:]:
        labels = np.load(tmp_path / "out" / f"{block.name}.labels.npy")
        assert labels.shape == block.amplitude.shape
        counts += metrics.confusion(np.asarray(block.labels), labels, 6)
        changes += metrics.slice_changes(np.asarray(block.labels), labels)
    assert document["confusion"][0] == counts.tolist()
    assert document["scores"][0] == {**metrics.segmentation_scores(counts), **metrics.continuity_scores(changes)}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == 2
    assert "<td>chaotic</td>" in page
    assert "<td>ours</td>" in page
    assert "<td>twin</td>" in page
    assert segment.main(command) == 2  # the folder is not empty


def test_floors_answer_as_a_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strong and weak reflections, anywhere in depth: attributes tell them apart, depth does not."""
    monkeypatch.setattr(floor, "TREES", 5)
    rng = np.random.default_rng(0)
    strong = rng.random(12) < 0.5
    amplitude = rng.standard_normal((12, 1, 16, 16, 16)) * np.where(strong, 3, 0.3)[:, None, None, None, None]
    labels = np.broadcast_to(strong[:, None, None, None], (12, 16, 16, 16)).astype(np.uint8).copy()
    labels[0, :4] = UNLABELLED
    columns = {"sample": rng.integers(0, 40, 12)}
    examples = Examples({"amplitude": amplitude.astype(np.float32)}, labels, columns)
    train, test = examples.take(slice(0, 8)), examples.take(slice(8, 12))
    found = floor.boosted_trees(CONFIG, train, test, seed=0)
    scores = {name: metrics.metrics(CONFIG, outputs, test)["pixel_accuracy"] for name, outputs in found.items()}
    assert list(scores) == ["attributes with boosted trees", "depth alone"]
    assert all(o["logits"].shape == (4, 6, 16, 16, 16) for o in found.values())
    assert scores["attributes with boosted trees"] > 0.95
    assert scores["depth alone"] < 0.9


def test_box_mean_against_plain_loops() -> None:
    cube = np.random.default_rng(0).standard_normal((5, 6, 7))
    padded = np.pad(cube, 2, mode="symmetric")
    expected = np.array([padded[i : i + 5, j : j + 5, k : k + 5].mean() for i, j, k in np.ndindex(5, 6, 7)])
    np.testing.assert_allclose(floor.box_mean(cube, 2).ravel(), expected, atol=1e-6)
