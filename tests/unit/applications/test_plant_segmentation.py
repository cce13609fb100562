"""plant_segmentation: grouping, scores, formats and their faults, tiles, the floor, the generator, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from applications.plant_segmentation import (
    APPLICATION,
    augment,
    data,
    floor,
    formats,
    grouping,
    metrics,
    segment,
    tiles,
)
from applications.plant_segmentation.config import Config
from applications.plant_segmentation.data import Pictures
from applications.plant_segmentation.loss import centre_offsets
from applications.plant_segmentation.model import receptive_radius
from applications.plant_segmentation.pipeline import UNLABELLED
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import ConfigError, DataError, InputError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.imagery import photographs
from fl_core.learning import seeding
from fl_core.learning.torch_arrays import get_arrays
from hpc_trainer.performance.estimate import estimate

Array = npt.NDArray[Any]
SMALL = ("data.clients=4", "data.images_per_client=4", "data.image_size=48", "data.stride=48")
CONFIG: Config = APPLICATION.configure(SMALL)


@pytest.fixture(scope="module")
def made() -> Pictures:
    found: Pictures = APPLICATION.generate(CONFIG, 3)
    return found


def discs(*places: tuple[int, int, int], side: int = 48) -> npt.NDArray[np.int32]:
    """Numbered discs (row, column, radius), later ones on top."""
    rows, columns = np.indices((side, side))
    labels = np.zeros((side, side), np.int32)
    for number, (row, column, radius) in enumerate(places, start=1):
        labels[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = number
    return labels


class TestGrouping:
    def test_maps_of_touching_plants_give_them_back(self) -> None:
        truth = discs((12, 12, 8), (12, 26, 8), (34, 20, 10))
        found = grouping.instances(grouping.as_maps(truth), CONFIG.model)
        assert len(found.scores) == 3
        assert metrics.symmetric_best_dice(metrics.compare(truth, found.labels, found.scores)) == 1.0

    def test_generated_plants_come_back_from_their_maps(self, made: Pictures) -> None:
        pictures = []
        for picture in made.pictures:
            truth = picture.labels()
            found = grouping.instances(grouping.as_maps(np.where(truth == UNLABELLED, 0, truth)), CONFIG.model)
            pictures.append(metrics.compare(truth, found.labels, found.scores))
        assert metrics.scored(pictures)["symmetric_best_dice"] > 0.93

    def test_nothing_gives_nothing(self) -> None:
        assert len(grouping.instances(np.full((4, 48, 48), -10, np.float32), CONFIG.model).scores) == 0

    def test_offsets_of_the_loss_point_to_the_mean_of_each_plant(self) -> None:
        truth = discs((12, 12, 8), (12, 24, 8), (40, 40, 12))
        ways = centre_offsets(torch.from_numpy(truth)[None], torch.float64)[0].numpy()
        for number in (1, 2, 3):
            places = np.argwhere(truth == number)
            for (row, column), way in zip(places, ways[:, truth == number].T, strict=True):
                np.testing.assert_allclose(way, places.mean(0) - (row, column), atol=1e-9)

    def test_box_and_maximum_are_what_their_slow_twins_say(self) -> None:
        values = np.random.default_rng(0).random((9, 11))
        padded = np.pad(values, 2)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
        np.testing.assert_allclose(grouping.box(values, 2), windows.mean((2, 3)), atol=1e-12)
        np.testing.assert_array_equal(grouping.local_maximum(values, 2), windows.max((2, 3)))


class TestScores:
    def test_hand_computed_case(self) -> None:
        """Two plants of 4 pixels; one found whole, of the other half, and one instance on the ground."""
        truth, labels = np.zeros((2, 12), np.int32), np.zeros((2, 12), np.int32)
        truth[:, 0:2], truth[:, 4:6] = 1, 2
        labels[:, 0:2], labels[0, 4:6], labels[:, 9:11] = 1, 2, 3
        found = metrics.compare(truth, labels, np.array([0.9, 0.8, 0.7]))
        dice = [1.0, 2 * 2 / (4 + 2)]
        assert metrics.symmetric_best_dice(found) == pytest.approx(min(np.mean(dice), np.mean([*dice, 0.0])))
        scores = metrics.scored([found])
        assert scores["count_difference"] == 1.0
        assert scores["ap50"] == pytest.approx(1.0)  # the half has an IoU of 0.5; what is wrong comes last
        assert metrics.average_precision([found], 0.55) == pytest.approx(51 / 101)  # recall 0.5 at precision 1

    @given(st.integers(0, 2**32 - 1))
    def test_average_precision_is_what_its_slow_twin_says(self, seed: int) -> None:
        """Few plants and instances, all scores different; precision as the best at that recall or more, at 101 recalls."""
        rng = np.random.default_rng(seed)
        pictures = []
        for _ in range(3):
            truth, made = (rng.integers(0, 4, (5, 5)).astype(np.int32) for _ in range(2))
            made = data.renumbered(np.where(rng.random((5, 5)) < 0.6, truth, made))
            pictures.append(metrics.compare(truth, made, rng.random(made.max())))
        found = []  # (score, right)
        for picture in pictures:
            free = set(range(len(picture.true_size)))
            for p in sorted(range(len(picture.scores)), key=lambda p: -picture.scores[p]):
                best = max(free, key=lambda t: (picture.iou[t, p], -t), default=-1)
                right = best >= 0 and picture.iou[best, p] >= 0.5
                free -= {best} if right else set()
                found.append((picture.scores[p], right))
        found.sort(key=lambda pair: -pair[0])
        total = sum(len(p.true_size) for p in pictures)
        points = []
        for k in range(1, len(found) + 1):
            hits = sum(right for _, right in found[:k])
            points.append((hits / total, hits / k))
        expected = np.mean(
            [max((p for r, p in points if r >= recall), default=0.0) for recall in np.linspace(0, 1, 101)]
        )
        assert metrics.average_precision(pictures, 0.5) == pytest.approx(expected)

    def test_a_false_alarm_with_the_highest_score_costs_precision(self) -> None:
        truth, labels = np.zeros((2, 12), np.int32), np.zeros((2, 12), np.int32)
        truth[:, 0:2] = labels[:, 0:2] = 1
        labels[:, 9:11] = 2
        assert metrics.average_precision([metrics.compare(truth, labels, np.array([0.2, 0.9]))], 0.5) == pytest.approx(
            0.5
        )

    def test_unlabelled_pixels_count_nothing(self) -> None:
        truth = discs((12, 12, 8), (34, 34, 8))
        labels = discs((12, 12, 8), (34, 34, 8), (12, 38, 6))
        truth[labels == 3] = UNLABELLED
        found = metrics.compare(truth, labels, np.ones(3))
        assert metrics.symmetric_best_dice(found) == 1.0
        assert len(found.scores) == 2
        assert metrics.foreground(metrics.overlap_counts(truth, labels > 0))["foreground_dice"] == 1.0

    def test_plants_of_other_sizes_do_not_count(self) -> None:
        truth = discs((8, 8, 4), (30, 30, 15))  # 49 and about 700 pixels
        labels = discs((42, 4, 1), (30, 30, 15))
        found = metrics.compare(truth, labels, np.ones(2))
        scores = metrics.scored([found])
        assert scores["ap50_small"] == 0.0
        assert scores["ap50_large"] == 1.0
        assert "ap50_medium" not in scores

    @given(st.integers(0, 2**32 - 1))
    def test_dice_is_symmetric_and_bounded_and_one_for_the_truth_itself(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        a, b = (rng.integers(0, 4, (6, 6)).astype(np.int32) for _ in range(2))

        def against(truth: Array, other: Array) -> float:
            numbered = data.renumbered(other)
            return metrics.symmetric_best_dice(metrics.compare(truth, numbered, np.ones(numbered.max())))

        assert against(a, b) == pytest.approx(against(b, a))
        assert 0 <= against(a, b) <= 1
        assert against(a, a) == 1


def coco(folder: Path) -> dict[str, Any]:
    """A photograph with a polygon, run lengths as numbers and as text, and a crowd."""
    (folder / "images" / "north").mkdir(parents=True)
    Image.new("RGB", (20, 10), (90, 80, 70)).save(folder / "images" / "north" / "a.png")
    box = np.zeros((10, 20), bool)
    box[2:5, 12:17] = True
    crowd = np.zeros((10, 20), bool)
    crowd[8:, :4] = True
    flat = crowd.T.ravel()
    edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
    counts = np.diff([0, *edges, 200]).tolist()
    counts = [0, *counts] if flat[0] else counts
    shapes = [
        {"id": 1, "image_id": 7, "segmentation": [[1, 1, 6, 1, 6, 5, 1, 5]]},
        {"id": 2, "image_id": 7, "segmentation": {"size": [10, 20], "counts": formats.encode_runs(box)}},
        {"id": 3, "image_id": 7, "iscrowd": 1, "segmentation": {"size": [10, 20], "counts": counts}},
    ]
    return {"images": [{"id": 7, "file_name": "north/a.png", "height": 10, "width": 20}], "annotations": shapes}


class TestFormats:
    def test_coco(self, tmp_path: Path) -> None:
        (tmp_path / "instances.json").write_text(json.dumps(coco(tmp_path)))
        (picture,) = data.read(tmp_path).pictures
        labels = picture.labels()
        assert picture.client == "north"
        expected = np.zeros((10, 20), np.int32)
        expected[1:5, 1:6], expected[2:5, 12:17], expected[8:, :4] = 1, 2, UNLABELLED
        # pillow draws the boundary too: the polygon may be wider by its last row and column
        assert (labels[expected > 0] == expected[expected > 0]).all()
        assert (labels == 1).sum() <= 5 * 6
        assert ((labels == 2) == (expected == 2)).all()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d: d["annotations"][0].update(segmentation=[[1, 2, 3]]), "a polygon is not a list"),
            (lambda d: d["annotations"][0].update(segmentation=[["x"] * 6]), "a polygon is not a list"),
            (lambda d: d["annotations"][1]["segmentation"].update(counts="0000"), "do not fill"),
            (lambda d: d["annotations"][1]["segmentation"].update(counts="\x7f"), "no run length text"),
            (lambda d: d["annotations"][2]["segmentation"].update(counts=[-1, 201]), "do not fill"),
            (lambda d: d["annotations"][2]["segmentation"].update(size=[1, 200]), "run lengths of size"),
            (lambda d: d["annotations"][0].update(image_id=8), "not listed"),
            (lambda d: d["images"][0].update(file_name="../a.png"), "not a file inside"),
            (lambda d: d["images"][0].update(height=1 << 40), "no size of a photograph"),
            (lambda d: d.update(images=3), "'images' is not a list"),
        ],
    )
    def test_damaged_coco_is_refused_by_name(self, change: Any, message: str, tmp_path: Path) -> None:
        document = coco(tmp_path)
        change(document)
        (tmp_path / "instances.json").write_text(json.dumps(document))
        with pytest.raises(DataError, match=message) as refused:
            data.read(tmp_path).examples(APPLICATION.configure(["data.image_size=16", "data.stride=16"]))
        assert "instances.json" in str(refused.value)

    @given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
    def test_run_length_text_round_trip(self, seed: int, height: int, width: int) -> None:
        mask = np.random.default_rng(seed).random((height, width)) < 0.5
        back = formats.from_runs(formats.decode_runs(formats.encode_runs(mask), "x"), height, width, "x")
        np.testing.assert_array_equal(back, mask)

    @given(st.text(max_size=30))
    def test_hostile_run_length_text_is_refused_or_decoded(self, text: str) -> None:
        try:
            formats.from_runs(formats.decode_runs(text, "x"), 3, 3, "x")
        except DataError:
            return

    def test_leaf_segmentation_challenge(self, tmp_path: Path) -> None:
        truth = discs((10, 10, 6), (30, 30, 9))
        for folder in ("A1", "A2"):
            (tmp_path / folder).mkdir()
            Image.new("RGB", (48, 48)).save(tmp_path / folder / "plant001_rgb.png")
            palette = Image.fromarray(truth.astype(np.uint8), "P")
            palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
            palette.save(tmp_path / folder / "plant001_label.png")
        found = data.read(tmp_path)
        assert found.client_ids() == ("A1", "A2")
        np.testing.assert_array_equal(found.pictures[0].labels(), truth)

    def test_masks_of_foreground_make_clients_of_blocks(self, tmp_path: Path) -> None:
        rows = ["file,mask,shape_group"]
        for k in range(10):
            Image.new("RGB", (32, 20), (0, 90, 0)).save(tmp_path / f"{k}.jpg")
            mask = np.zeros((20, 32), np.uint8)
            mask[:4] = 255
            Image.fromarray(mask).convert("1").save(tmp_path / f"{k}.png")
            rows.append(f"{k}.jpg,{k}.png,{'32x20' if k < 6 else 'other'}")
        (tmp_path / "labels.csv").write_text("\n".join(rows))
        found = data.read(tmp_path)
        assert found.client_ids() == ("32x20-000", "32x20-001", "other-000")
        config = APPLICATION.configure(["data.image_size=16", "data.stride=16"], preset="lesions")
        examples = found.examples(config)
        assert len(examples) == 10 * 2 * 2  # tiles at rows 0 and 4, columns 0 and 16
        assert examples.targets.max() == 1

    def test_a_mask_of_another_size_is_refused(self, made: Pictures, tmp_path: Path) -> None:
        made.write(tmp_path / "d")
        first = sorted((tmp_path / "d" / "masks").rglob("*.png"))[0]
        first.write_bytes(photographs.encode_png(np.zeros((9, 9), np.uint16)))
        with pytest.raises(DataError, match="masks need the size"):
            data.read(tmp_path / "d").examples(CONFIG)

    def test_an_empty_folder_is_told_what_is_accepted(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"images\.csv.*COCO"):
            data.read(tmp_path)


def small_net(norm: str) -> tuple[Config, torch.nn.Module]:
    """Running statistics that are not those of a fresh model."""
    config = APPLICATION.configure(
        [f"model.norm={norm}", "model.width=4", "model.levels=2", "data.image_size=64", "data.stride=64"]
    )
    model = APPLICATION.build_model(config).train()
    torch.manual_seed(0)
    for _ in range(3):
        model(torch.randint(0, 255, (2, 32, 32, 3), dtype=torch.uint8))
    return config, model.eval()


def predictor(model: torch.nn.Module) -> tiles.Predict:
    def predict(batch: Array) -> Array:
        with torch.inference_mode():
            found: Array = model(torch.from_numpy(batch)).numpy()
        return found

    return predict


class TestTiles:
    image = np.random.default_rng(0).integers(0, 255, (120, 148, 3), np.uint8)

    @pytest.mark.parametrize("norm", ["batch", "none"])
    def test_tiles_cut_at_the_field_of_view_equal_the_whole_photograph(self, norm: str) -> None:
        _, model = small_net(norm)
        radius = receptive_radius(2)
        whole = predictor(model)(self.image[None])[0]
        tiled = tiles.joined(predictor(model), self.image, side=64, overlap=2 * radius, margin=radius, batch_size=3)
        np.testing.assert_allclose(tiled, whole, atol=1e-5 * np.abs(whole).max())

    def test_blended_tiles_of_group_norm_are_near_and_have_no_seams(self) -> None:
        _, model = small_net("group")
        blended = tiles.joined(predictor(model), self.image, side=64, overlap=32)
        steps = np.abs(np.diff(blended, axis=1)).mean((0, 2))
        starts = data.positions(120, 64, 32)[1:]
        assert steps[[s - 1 for s in starts]].max() < 1.5 * np.median(steps)

    def test_mirror_images_agree_once_they_are_turned_back(self) -> None:
        """A rule that is the same for all mirror images: their mean is the rule itself."""
        truth = discs((12, 14, 8), (30, 30, 10))
        image = np.repeat((50 * truth).astype(np.uint8)[..., None], 3, -1)

        def rule(batch: Array) -> Array:
            return np.stack([grouping.as_maps(one[..., 0] // 50) for one in batch])

        np.testing.assert_allclose(tiles.mirrored(rule)(image[None]), rule(image[None]), atol=1e-6)

    def test_gaps_are_refused_and_small_photographs_padded(self) -> None:
        _, model = small_net("batch")
        with pytest.raises(InputError, match="leave gaps"):
            tiles.joined(predictor(model), self.image, side=64, overlap=16, margin=12)
        assert tiles.joined(predictor(model), self.image[:30, :70], side=64, overlap=32).shape == (4, 30, 70)

    def test_field_of_view(self) -> None:
        """One changed pixel changes nothing farther away than the radius says."""
        _, model = small_net("batch")
        other = self.image.copy()
        other[60, 72] = 255 - other[60, 72]
        moved = np.abs(predictor(model)(self.image[None]) - predictor(model)(other[None])).max((0, 1)) > 0
        rows, columns = np.nonzero(moved)
        reach = max(abs(rows - 60).max(), abs(columns - 72).max())
        assert 4 < reach <= receptive_radius(2)


class TestAugmentation:
    def test_labels_move_with_the_photograph(self, made: Pictures) -> None:
        """A photograph painted by its labels stays painted by them."""
        config = APPLICATION.configure([*SMALL, "data.colour=0.0", "data.shift=0.5"])
        truth = made.examples(config).targets
        image = np.repeat((truth % 251).astype(np.uint8)[..., None], 3, -1)
        keys = seeding.example_keys(5, np.arange(len(truth)))
        moved = augment.AUGMENTATION({"image": image}, keys, config)["image"]
        labels = augment.AUGMENTATION.targets(truth, keys, config)
        np.testing.assert_array_equal(moved[..., 0], labels % 251)
        assert (labels != truth).any()


class TestGenerator:
    def test_fields_differ_and_hold_many_plants(self, made: Pictures) -> None:
        mean = {c: np.mean([p.pixels().mean((0, 1)) for p in made.select([c]).pictures], 0) for c in made.client_ids()}
        colours = np.stack(list(mean.values()))
        within = np.mean([np.std([p.pixels().mean((0, 1)) for p in made.select([c]).pictures], 0) for c in mean])
        assert colours.std(0).mean() > 2 * within
        counts = [len(np.unique(p.labels())) - 1 for p in made.pictures]
        assert 2 < np.mean(counts) < 30

    def test_plants_lie_where_it_is_green(self, made: Pictures) -> None:
        ratio = []
        for picture in made.pictures:
            green, inside = floor.excess_green(picture.pixels()), picture.labels() > 0
            if inside.any() and not inside.all():
                ratio.append(green[inside].mean() - green[~inside].mean())
        assert np.mean(ratio) > 0.15


class TestFloor:
    def test_distance_is_exact(self) -> None:
        inside = np.random.default_rng(1).random((13, 17)) < 0.8
        ground = np.argwhere(~inside)
        slow = np.sqrt(((np.indices(inside.shape).transpose(1, 2, 0)[:, :, None] - ground) ** 2).sum(-1).min(-1))
        np.testing.assert_allclose(floor.distance_to_ground(inside), slow, atol=1e-9)

    def test_watershed_parts_two_discs_that_touch(self) -> None:
        truth = discs((20, 14, 9), (20, 30, 9))
        image = np.where(truth[..., None] > 0, (40, 130, 30), (110, 90, 70)).astype(np.uint8)
        labels = floor.watershed(image, 5, 0)
        assert labels.max() == 2
        assert metrics.symmetric_best_dice(metrics.compare(truth, labels, np.ones(2))) > 0.95


class TestWholePhotographs:
    def test_report_pictures_and_labels(self, made: Pictures, tmp_path: Path) -> None:
        config, model = small_net("batch")
        manifest = CheckpointManifest(application="plant_segmentation", config=to_table(config), stage="pretrain")
        Checkpoint(manifest, get_arrays(model)).save(tmp_path / "model")
        made.select(made.client_ids()[:2]).write(tmp_path / "d")
        command = [
            str(tmp_path / "model"),
            "--data",
            str(tmp_path / "d"),
            "--out",
            str(tmp_path / "out"),
            "--limit",
            "3",
        ]
        assert segment.main(command) == 0
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["photographs"] == 3
        assert {"symmetric_best_dice", "count_difference"} <= set(report["scores"]["watershed on excess green"])
        masks = sorted((tmp_path / "out").rglob("*.labels.png"))
        assert len(masks) == 3
        assert photographs.read_labels(masks[0], "mask").shape == (48, 48)
        assert (tmp_path / "out" / "pictures.png").stat().st_size > 10_000
        assert "data:image/png" in (tmp_path / "out" / "report.html").read_text()
        assert segment.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "x")]) == 2


def test_the_large_preset_is_large_and_its_memory_is_known() -> None:
    found = estimate(APPLICATION, "large", ["pretrain.batch_size=2"], world=1, parallel="ddp")
    assert found["parameters"] > 100_000_000
    assert 3 * 4 * found["parameters"] < found["memory_bytes"]["total"] < 4 * 2**30  # weights and two moments at least


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 16"):
        APPLICATION.configure(["data.image_size=40", "data.stride=40"])
    with pytest.raises(ConfigError, match="leaves gaps"):
        APPLICATION.configure(["data.image_size=48", "data.stride=96"])
