"""seismic_facies: the format and its faults, streaming, tiles, generator, metrics, models."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import segyio
import torch
import zarr
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score

from applications.seismic_facies import (
    APPLICATION,
    augment,
    data,
    floor,
    generator,
    geology,
    metrics,
    segment,
    survey,
    tiles,
)
from applications.seismic_facies.config import FACIES, Config
from applications.seismic_facies.data import Volumes
from applications.seismic_facies.model import receptive_radius
from applications.seismic_facies.pipeline import UNLABELLED, probabilities
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import ConfigError, DataError, InputError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.learning import seeding
from fl_core.learning.examples import Examples
from fl_core.learning.local_update import augmented
from fl_core.learning.torch_arrays import get_arrays
from fl_core.learning.windows import Windows
from tests.helpers import same_examples

Array = npt.NDArray[Any]
SMALL = (
    *("data.clients=2", "data.volumes_per_client=2", "data.crop=16", "data.stride=16", "data.inlines=24"),
    *("data.crosslines=20", "data.samples=28", "data.reference=stored"),
)


def configured(*overrides: str) -> Config:
    found: Config = APPLICATION.configure([*SMALL, *overrides])
    return found


CONFIG = configured()


@pytest.fixture(scope="module")
def made() -> Volumes:
    found: Volumes = APPLICATION.generate(CONFIG, 3)
    return found


def table(folder: Path, *rows: dict[str, str]) -> Path:
    """A data set of the files that lie in ``folder``."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / "volumes.csv").write_text(out.getvalue(), encoding="utf-8")
    return folder


def one(folder: Path, amplitude: str, labels: str = "", **more: str) -> Path:
    return table(folder, {"volume": "v", "client": "c", "amplitude": amplitude, "labels": labels, **more})


def refused(folder: Path, *expected: str, config: Config = CONFIG) -> None:
    with pytest.raises(DataError) as error:
        data.read(folder).examples(config)
    for text in expected:
        assert text in str(error.value)


def write_segy(path: Path, cube: Array, *, first: tuple[int, int] = (100, 300), order: str = "inline") -> None:
    """Big-endian IEEE SEG-Y with 4 ms samples."""
    spec = segyio.spec()
    spec.format, spec.sorting = 5, 2 if order == "inline" else 1
    spec.samples = np.arange(cube.shape[2]) * 4.0
    spec.tracecount = cube.shape[0] * cube.shape[1]
    cells = list(np.ndindex(cube.shape[:2]))
    if order == "crossline":
        cells.sort(key=lambda c: (c[1], c[0]))
    with segyio.create(str(path), spec) as file:
        for number, (i, x) in enumerate(cells):
            file.header[number] = {
                segyio.TraceField.INLINE_3D: first[0] + 2 * i,
                segyio.TraceField.CROSSLINE_3D: first[1] + x,
                segyio.TraceField.TRACE_SAMPLE_COUNT: cube.shape[2],
                segyio.TraceField.TRACE_SAMPLE_INTERVAL: 4000,
            }
            file.trace[number] = cube[i, x].astype(np.float32)
        file.bin.update(hns=cube.shape[2], hdt=4000)


def edit_header(path: Path, trace: int, field: int, value: int) -> None:
    with segyio.open(str(path), "r+", ignore_geometry=True) as file:
        file.header[trace] = {field: value}


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npy", "npz", "zarr", "sgy", "crossline-sorted sgy"])
def test_every_kind_of_file_gives_the_same_examples(kind: str, made: Volumes, tmp_path: Path) -> None:
    block = made.blocks[0]
    cube, labels = np.asarray(block.amplitude.data), np.asarray(block.labels)
    suffix = kind.split()[-1]
    names = [f"a.{suffix}", f"l.{suffix}"]
    if suffix == "npy":
        np.save(tmp_path / names[0], cube)
        np.save(tmp_path / names[1], labels)
    elif suffix == "npz":
        np.savez_compressed(tmp_path / names[0], amplitude=cube, labels=labels)
        names[1] = names[0]
    elif suffix == "zarr":
        for name, array in zip(names, (cube, labels), strict=True):
            zarr.save_array(str(tmp_path / name), array)
    else:
        order = "crossline" if "crossline" in kind else "inline"
        write_segy(tmp_path / names[0], cube, order=order)
        write_segy(tmp_path / names[1], labels, order=order)
    found = data.read(one(tmp_path, *names)).examples(CONFIG)
    expected = made.examples(CONFIG)
    expected = expected.take(expected.columns["volume"] == block.name)
    np.testing.assert_allclose(found.inputs["amplitude"], expected.inputs["amplitude"], rtol=1e-6)
    np.testing.assert_array_equal(found.targets, expected.targets)


def test_line_numbers_in_other_header_bytes(made: Volumes, tmp_path: Path) -> None:
    write_segy(tmp_path / "a.sgy", np.asarray(made.blocks[0].amplitude.data))
    with segyio.open(str(tmp_path / "a.sgy"), "r+", ignore_geometry=True) as file:
        for trace in range(file.tracecount):
            header = file.header[trace]
            file.header[trace] = {9: header[189], 21: header[193], 189: 0, 193: 0}
    refused(one(tmp_path, "a.sgy"), "a.sgy", "traces 0 and 1", "inline_byte")
    found = data.read(one(tmp_path, "a.sgy", inline_byte="9", crossline_byte="21"))
    assert found.blocks[0].amplitude.shape == made.blocks[0].amplitude.shape


def test_a_truncated_segy_names_the_trace_it_ends_in(made: Volumes, tmp_path: Path) -> None:
    write_segy(tmp_path / "a.sgy", np.asarray(made.blocks[0].amplitude.data))
    whole = (tmp_path / "a.sgy").read_bytes()
    trace = 240 + 28 * 4
    (tmp_path / "a.sgy").write_bytes(whole[: 3600 + 37 * trace + 90])
    refused(one(tmp_path, "a.sgy"), "a.sgy", "trace 37 has 90 of")
    (tmp_path / "a.sgy").write_bytes(whole[:1000])
    refused(one(tmp_path, "a.sgy"), "a.sgy", "1000 bytes")
    (tmp_path / "a.sgy").write_bytes(whole[: 3600 + 37 * trace])
    refused(one(tmp_path, "a.sgy"), "a.sgy", "37 traces do not fill", "inline 102, crossline 317 is missing")


def test_inconsistent_segy_geometry_is_refused(made: Volumes, tmp_path: Path) -> None:
    cube = np.asarray(made.blocks[0].amplitude.data)
    for field, value, expected in (
        (segyio.TraceField.CROSSLINE_3D, 301, "traces 1 and 5"),
        (segyio.TraceField.TRACE_SAMPLE_COUNT, 27, "trace 5 has 27 samples, the file 28"),
        (segyio.TraceField.TRACE_SAMPLE_INTERVAL, 2000, "trace 5 has 2000 µs, the file 4000"),
    ):
        write_segy(tmp_path / "a.sgy", cube)
        edit_header(tmp_path / "a.sgy", 5, field, value)
        refused(one(tmp_path, "a.sgy"), "a.sgy", expected)
    write_segy(tmp_path / "a.sgy", cube)
    for trace in range(20, 40):
        edit_header(tmp_path / "a.sgy", trace, segyio.TraceField.INLINE_3D, 103)
    refused(one(tmp_path, "a.sgy"), "inlines go on in steps of 3, but from 103 to 104")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_voxel_that_is_not_finite_is_named(bad: float, made: Volumes, tmp_path: Path) -> None:
    cube = np.array(made.blocks[0].amplitude.data)
    cube[3, 7, 11] = bad
    np.save(tmp_path / "a.npy", cube)
    refused(one(tmp_path, "a.npy"), "a.npy", "[3, 7, 11]", "not finite")
    write_segy(tmp_path / "a.sgy", cube)
    refused(one(tmp_path, "a.sgy"), "a.sgy", "[3, 7, 11]", "not finite")


def test_faults_of_files_and_table_are_named(made: Volumes, tmp_path: Path) -> None:
    cube = np.asarray(made.blocks[0].amplitude.data)
    np.save(tmp_path / "a.npy", cube)
    np.save(tmp_path / "flat.npy", cube[0])
    np.save(tmp_path / "zero.npy", np.zeros((16, 16, 16), np.float32))
    np.save(tmp_path / "small.npy", cube[:12])
    np.save(tmp_path / "l.npy", np.full(cube.shape, 9, np.uint8))
    np.savez(tmp_path / "two.npz", x=cube, y=cube)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:500])
    (tmp_path / "text.sgy").write_bytes(b"no seismic" * 800)
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "a.txt").write_text("1 2 3")
    for name, expected in (
        ("none.npy", "no such file"),
        ("flat.npy", "float32[20, 28]"),
        ("zero.npy", "every amplitude is zero"),
        ("small.npy", "smaller than data.crop = 16"),
        ("two.npz", "'amplitude' is missing"),
        ("objects.npy", "not a readable npy"),
        ("cut.npy", "not a readable npy"),
        ("text.sgy", "samples a trace in format"),
        ("empty.zarr", "not a readable zarr"),
        ("a.txt", "not a known kind of volume"),
        ("../a.npy", "not a file inside"),
    ):
        refused(one(tmp_path, name), name.rpartition("/")[2], expected)
    refused(one(tmp_path, "a.npy", "l.npy"), "l.npy", "voxel [0, 0, 0] has the label 9")
    refused(one(tmp_path, "a.npy", "small.npy"), "labels are [12, 20, 28]")
    refused(one(tmp_path, "a.npy", inline_byte="x"), "line 2", "inline_byte 'x'")
    row = {"volume": "v", "client": "c", "amplitude": "a.npy"}
    refused(table(tmp_path, row, row), "line 3", "listed twice")
    refused(table(tmp_path, {**row, "client": "a/b"}), "line 2", "'a/b' is not usable")


def test_a_volume_without_labels_is_scored_but_never_learned_from(made: Volumes, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asarray(made.blocks[0].amplitude.data))
    found = data.read(one(tmp_path, "a.npy")).examples(CONFIG)
    assert (found.targets == UNLABELLED).all()
    assert not found.columns["trainable"].any()
    logits = np.zeros((len(found), 6, 16, 16, 16), np.float32)
    assert metrics.metrics(CONFIG, {"logits": logits}, found) == {}


# --- streaming ---------------------------------------------------------------------------------------------------


def test_streamed_examples_are_the_ones_in_memory(made: Volumes, tmp_path: Path) -> None:
    made.write(tmp_path / "d")
    small = data.read(tmp_path / "d")
    streamed = small.examples(configured("data.in_memory_mb=0"))
    whole = small.examples(CONFIG)
    assert isinstance(streamed.inputs["amplitude"], Windows)
    assert isinstance(streamed.targets, Windows)
    assert isinstance(whole.inputs["amplitude"], np.ndarray)
    same_examples(streamed, whole)
    part = streamed.take(np.array([5, 2])).take(streamed.take(np.array([5, 2])).columns["inline"] >= 0)
    assert isinstance(part.inputs["amplitude"], Windows)
    same_examples(part, whole.take(np.array([5, 2])))
    joined: Any = np.concatenate([streamed.inputs["amplitude"][:3], streamed.inputs["amplitude"][6:8]])
    assert isinstance(joined, Windows)
    np.testing.assert_array_equal(joined, whole.inputs["amplitude"][[0, 1, 2, 6, 7]])
    other = data.read(tmp_path / "d").select(["survey-001"]).examples(configured("data.in_memory_mb=0"))
    both: Any = np.concatenate([streamed.inputs["amplitude"], other.inputs["amplitude"]])
    assert isinstance(both, Windows)
    np.testing.assert_array_equal(
        both, np.concatenate([whole.inputs["amplitude"], np.asarray(other.inputs["amplitude"])])
    )


def test_streaming_reads_only_what_is_used() -> None:
    class Counting:
        shape = (64, 64, 64)
        read = 0

        def __getitem__(self, index: tuple[slice, ...]) -> Array:
            found = np.ones([s.stop - s.start for s in index], np.float32)
            Counting.read += found.size
            return found

    corners = np.array([[0, i, 0, 0] for i in range(50)], np.int64)
    windows = Windows([Counting()], corners, (8, 8, 8), np.float32, leading=1)
    chosen = windows[np.arange(0, 50, 7)][1:3]
    assert (len(windows), windows.shape, windows.nbytes, Counting.read) == (50, (50, 1, 8, 8, 8), 50 * 2048, 0)
    assert np.asarray(chosen).shape == (2, 1, 8, 8, 8)
    assert Counting.read == 2 * 512
    with pytest.raises(TypeError):
        windows[0, 1]


def test_streamed_and_in_memory_training_give_the_same_model(made: Volumes, tmp_path: Path) -> None:
    from hpc_trainer.commands import concatenate
    from hpc_trainer.processes import join
    from hpc_trainer.trainer import Trainer, TrainingData

    made.write(tmp_path / "d")
    losses = []
    for memory in (0, 100):
        config = configured(f"data.in_memory_mb={memory}", "model.width=4", "pretrain.epochs=1")
        examples = data.read(tmp_path / "d").examples(config)
        train = concatenate([examples.take(slice(0, 6)), examples.take(slice(6, 9))])
        sets = TrainingData(train=train, validation=examples.take(slice(9, 12)), clients=("survey-000",))
        trainer = Trainer(APPLICATION, config, sets, processes=join(), out=tmp_path / str(memory), seed=0)
        trainer.run()
        losses.append(trainer.losses)
    assert losses[0] == losses[1]


# --- generator ---------------------------------------------------------------------------------------------------


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


# --- augmentation, loss, metrics ---------------------------------------------------------------------------------


def test_labels_move_with_the_amplitudes(made: Volumes) -> None:
    """An amplitude that shows its own label must still do so after augmentation, but for gain and polarity."""
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


# --- models ------------------------------------------------------------------------------------------------------


def parameters(*overrides: str, preset: str = "default") -> int:
    with torch.device("meta"):
        model = APPLICATION.build_model(APPLICATION.configure(overrides, preset=preset))
    return sum(p.numel() for p in model.parameters())


def test_presets_have_the_size_they_promise() -> None:
    assert parameters() * 4 < 2_000_000  # bytes: what a small device holds
    assert parameters(preset="twin") == pytest.approx(parameters(), rel=0.1)
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
    labels, reflectivity = geology.block(np.random.default_rng(0), (20, 24, 32), style)
    assert labels.shape == reflectivity.shape == (20, 24, 32 + 2 * geology.PAD)
    assert np.isfinite(reflectivity).all()
    assert labels.max() < len(FACIES)


# --- tiles -------------------------------------------------------------------------------------------------------


def small_net(norm: str) -> tuple[Config, torch.nn.Module]:
    """Two levels see 8 samples to each side; running statistics that are not those of a fresh model."""
    config = configured(f"model.norm={norm}", "model.width=4", "model.levels=2")
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


def whole_and_tiled(norm: str, *, side: int, overlap: int, margin: int) -> tuple[Array, Array]:
    _, model = small_net(norm)
    cube = np.random.default_rng(0).standard_normal((60, 40, 44)).astype(np.float32)
    whole = predictor(model)(cube[None, None])[0]
    parts = list(
        tiles.joined(predictor(model), cube, side=side, classes=6, overlap=overlap, margin=margin, batch_size=5)
    )
    starts = np.cumsum([0, *(p.shape[1] for _, p in parts)])
    assert [first for first, _ in parts] == starts[:-1].tolist()
    return whole, np.concatenate([p for _, p in parts], axis=1)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_tiles_cut_at_the_field_of_view_equal_the_whole_volume(norm: str) -> None:
    radius = receptive_radius(2)
    whole, tiled = whole_and_tiled(norm, side=32, overlap=2 * radius, margin=radius)
    np.testing.assert_allclose(tiled, whole, atol=2e-6)


def test_the_field_of_view_is_as_wide_as_it_says() -> None:
    for levels, side in ((2, 48), (3, 96)):
        torch.manual_seed(0)
        model = APPLICATION.build_model(configured("model.width=4", f"model.levels={levels}", "model.norm=none")).eval()
        x = torch.randn(1, 1, side, 8, 8)
        x.requires_grad_()
        middle = side // 2
        model(x)[0, :, middle : middle + 2 ** (levels - 1)].abs().sum().backward()
        seen = np.flatnonzero(x.grad.abs().amax((0, 1, 3, 4)).numpy())
        reach = max(middle - seen.min(), seen.max() - (middle + 2 ** (levels - 1) - 1))
        assert reach <= receptive_radius(levels) <= reach + 2**levels


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


# --- whole volumes, floors ---------------------------------------------------------------------------------------


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
    assert document["scores"][0] == {**metrics.segmentation_scores(counts), **metrics.continuity_scores(changes)}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == 2
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
