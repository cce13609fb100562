"""plant_disease: the format and its faults, who owns which image, augmentation, the generator and the model."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from applications.plant_disease import APPLICATION, augment, clients, data, floor, leaves, review, transfer
from applications.plant_disease.clients import Facts
from applications.plant_disease.config import MAIZE, Config
from applications.plant_disease.data import Leaves
from applications.plant_disease.model import Histograms, symmetric
from edge_export.onnx_file import write_onnx
from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.checkpoint import Checkpoint
from fl_core.contracts.config import to_table
from fl_core.contracts.errors import ConfigError, DataError
from fl_core.contracts.manifests import CheckpointManifest
from fl_core.imagery import photographs
from fl_core.learning import seeding
from fl_core.learning.examples import Examples
from fl_core.learning.partition import split_clients, split_groups
from fl_core.learning.torch_arrays import get_arrays, predict
from fl_core.runtime.parity import compare
from fl_core.runtime.session import Session
from hpc_trainer.performance.estimate import estimate

CONFIG: Config = APPLICATION.configure(["data.clients=5", "data.images_per_client=8", "data.image_size=48"])


@pytest.fixture(scope="module")
def made() -> Leaves:
    return APPLICATION.generate(CONFIG, 3)


@pytest.fixture(scope="module")
def examples(made: Leaves) -> Examples:
    return made.examples(CONFIG)


@pytest.fixture
def folder(made: Leaves, tmp_path: Path) -> Path:
    """Two sites in the native format."""
    made.select(made.client_ids()[:2]).write(tmp_path / "d")
    return tmp_path / "d"


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rewrite(folder: Path, rows: list[dict[str, str]]) -> None:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / "labels.csv").write_text(out.getvalue(), encoding="utf-8")


def edit(folder: Path, line: int, **cells: str) -> None:
    rows = rows_of(folder)
    rows[line].update(cells)
    rewrite(folder, rows)


def without(folder: Path, *columns: str) -> None:
    rewrite(folder, [{k: v for k, v in row.items() if k not in columns} for row in rows_of(folder)])


def picture(folder: Path, line: int = 0) -> Path:
    return folder / rows_of(folder)[line]["file"]


# --- the native format


def test_images_survive_their_native_format(made: Leaves, folder: Path) -> None:
    back = APPLICATION.read(folder)
    part = made.select(made.client_ids()[:2])
    assert back.client_ids() == part.client_ids()
    want, got = part.examples(CONFIG), back.examples(CONFIG)
    np.testing.assert_array_equal(got.inputs["image"], want.inputs["image"])
    for name in want.columns:
        np.testing.assert_array_equal(got.columns[name], want.columns[name])


def test_encoded_images_are_copied_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    rows = rows_of(folder)
    photo = Image.new("RGB", (70, 50), (10, 120, 30))
    photo.save(folder / "images" / "photo.jpg", quality=40)
    edit(folder, 0, file="images/photo.jpg")
    again = data.read(folder)
    again.write(tmp_path / "copy")
    assert (tmp_path / "copy/images/photo.jpg").read_bytes() == (folder / "images/photo.jpg").read_bytes()
    assert len(rows_of(tmp_path / "copy")) == len(rows)


def test_photographs_become_upright_centred_squares(tmp_path: Path) -> None:
    wide = np.zeros((60, 120, 3), np.uint8)
    wide[:, 30:90] = (0, 200, 0)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (photographs.read_square(tmp_path / "wide.png", "wide.png", 32) == (0, 200, 0)).all()
    half = np.zeros((64, 64, 3), np.uint8)
    half[:32] = 255
    tag = Image.Exif()
    tag[0x0112] = 6  # turn by a quarter clockwise to show it upright
    Image.fromarray(half).save(tmp_path / "turned.jpg", exif=tag, quality=95)
    upright = photographs.read_square(tmp_path / "turned.jpg", "turned.jpg", 32)
    assert upright[:, 20:].min() > 200
    assert upright[:, :12].max() < 50
    for mode in ("L", "RGBA", "P", "CMYK"):
        Image.new(mode, (40, 40)).save(tmp_path / f"{mode}.tif")
        assert photographs.read_square(tmp_path / f"{mode}.tif", mode, 32).shape == (32, 32, 3)


def _cut(folder: Path) -> None:
    raw = picture(folder).read_bytes()
    picture(folder).write_bytes(raw[: len(raw) // 2])


def _bomb(folder: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(picture(folder), "PNG")


def _link_outside(folder: Path) -> None:
    outside = folder.parent / "secret.png"
    picture(folder).rename(outside)
    picture(folder).symlink_to(outside)


BROKEN = {
    "no table": (lambda f: (f / "labels.csv").unlink(), "labels.csv: no such file"),
    "no label column": (lambda f: without(f, "label"), "column 'label' is missing"),
    "no file column": (lambda f: without(f, "file"), "column 'file' is missing"),
    "empty label": (lambda f: edit(f, 1, label=" "), "line 3: label is empty"),
    "missing image": (lambda f: picture(f).unlink(), "site-0000/00000.png: no such image"),
    "folder as image": (lambda f: edit(f, 0, file="images/site-0000"), "no such image"),
    "too long a name": (lambda f: edit(f, 0, file="x" * 3000), "no such image"),
    "text": (lambda f: picture(f).write_text("not an image"), "00000.png: the image does not decode"),
    "cut short": (_cut, "00000.png: the image does not decode"),
    "bomb": (_bomb, "10000 x 10000 pixels, over the limit"),
    "parent": (lambda f: edit(f, 0, file="../secret.png"), "not a file inside"),
    "absolute": (lambda f: edit(f, 0, file="/etc/passwd"), "not a file inside"),
    "link": (_link_outside, "links to a file outside"),
    "the table itself": (lambda f: edit(f, 0, file="labels.csv"), "not a file inside"),
    "listed twice": (lambda f: edit(f, 1, file=rows_of(f)[0]["file"]), "listed twice"),
    "client": (lambda f: edit(f, 0, client="../x"), "line 2: client '../x' is not usable"),
    "shared group": (lambda f: edit(f, 8, group=rows_of(f)[0]["group"]), "lies in the clients"),
    "label": (lambda f: edit(f, 2, label="tar_spot"), "has the label 'tar_spot'"),
}


@pytest.mark.parametrize("fault", list(BROKEN))
def test_a_broken_data_set_is_refused_by_name(folder: Path, fault: str) -> None:
    action, message = BROKEN[fault]
    action(folder)
    with pytest.raises(DataError, match=message):
        APPLICATION.read(folder).examples(CONFIG)


def test_a_strange_label_comes_with_the_setting_that_takes_it(folder: Path) -> None:
    rewrite(folder, [{**row, "label": "tar_spot" if i % 2 else "scab"} for i, row in enumerate(rows_of(folder))])
    with pytest.raises(DataError, match="tar_spot") as caught:
        APPLICATION.read(folder).examples(CONFIG)
    assert """--set 'data.classes=["scab", "tar_spot"]'""" in caught.value.remedy
    config = APPLICATION.configure(['data.classes=["scab", "tar_spot"]', "data.image_size=48"])
    found = APPLICATION.read(folder).examples(config)
    assert set(found.targets.tolist()) == {0, 1}
    assert APPLICATION.generate(config, 0).select(["site-0001"]).examples(config).targets.max() == 1


@pytest.mark.parametrize(
    "override",
    ["data.classes=['one']", "data.classes=['a', 'a']", "model.class_weights=[1.0]", "model.class_weights=[0,0,0,0]"],
)
def test_settings_that_do_not_fit_are_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        APPLICATION.configure([override])


# --- who owns which image


def facts(count: int, *, domains: tuple[str, ...] = ("lab",), sites: int = 0, twins: int = 1) -> list[Facts]:
    return [
        Facts(
            file=f"{i}.jpg",
            label=MAIZE[i // twins % 4],
            domain=domains[i // twins % len(domains)],
            site=f"farm-{i // twins % sites}" if sites else "",
            group=f"g{i // twins}",
        )
        for i in range(count)
    ]


def test_sites_are_clients_where_they_are_named() -> None:
    table = facts(60, sites=3)
    assert set(clients.assign(table, "auto", 14, 0.5)) == {"farm-0", "farm-1", "farm-2"}
    assert set(clients.assign(table, "domain", 14, 0.5)) == {"lab"}
    with pytest.raises(DataError, match="has no site"):
        clients.assign(facts(60), "site", 14, 0.5)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 100.0])
def test_label_skew_keeps_groups_together_and_fills_every_client(alpha: float) -> None:
    table = [
        *facts(1200, twins=3),
        *(Facts(file=f"f{i}", label=MAIZE[i % 3], domain="field", group=f"f{i}") for i in range(150)),
    ]
    owner = clients.assign(table, "auto", 12, alpha)
    sizes = Counter(owner)
    assert 10 <= len(sizes) <= 13
    assert min(sizes.values()) >= clients.SMALLEST
    assert {name.split("-")[0] for name in sizes} == {"lab", "field"}
    assert sum(name.startswith("field") for name in sizes) == 2
    by_group: dict[str, set[str]] = {}
    for fact, name in zip(table, owner, strict=True):
        by_group.setdefault(fact.group, set()).add(name)
    assert all(len(names) == 1 for names in by_group.values())
    lab = [name for name in sizes if name.startswith("lab")]
    shares = [
        max(Counter(f.label for f, o in zip(table, owner, strict=True) if o == n).values()) / sizes[n] for n in lab
    ]
    assert (np.mean(shares) > 0.45) if alpha < 1 else (np.mean(shares) < 0.4)


def test_near_duplicates_across_domains_stay_with_the_larger_part() -> None:
    table = facts(80)
    table[0] = Facts(file="x.jpg", label="healthy", domain="field", group=table[1].group)
    table.append(Facts(file="y.jpg", label="healthy", domain="lab", group=table[1].group))
    for rule in ("auto", "domain"):
        owner = clients.assign(table, rule, 4, 0.5)
        assert owner[0] == owner[1] == owner[-1]
        assert owner[0].startswith("lab")


def test_two_data_sets_have_no_client_in_common() -> None:
    one, other = (
        facts(100),
        [Facts(file=f"new/{f.file}", label=f.label, domain=f.domain, group=f.group) for f in facts(100)],
    )
    assert not set(clients.assign(one, "auto", 4, 0.5)) & set(clients.assign(other, "auto", 4, 0.5))


def test_the_partition_of_a_folder_is_the_presets_until_a_selection_settles_it(folder: Path) -> None:
    without(folder, "client", "site")
    raw = APPLICATION.read(folder)
    config = APPLICATION.configure(["data.image_size=48"])
    assert raw.examples(config).clients() == raw.client_ids()
    by_domain = APPLICATION.configure(["data.image_size=48", "data.client_column=domain"])
    assert set(raw.examples(by_domain).clients()) == {row["domain"] for row in rows_of(folder)}
    chosen = raw.select(raw.client_ids()[:1])
    assert chosen.examples(by_domain).clients() == raw.client_ids()[:1]
    chosen.write(folder.parent / "one")
    assert APPLICATION.read(folder.parent / "one").examples(by_domain).clients() == raw.client_ids()[:1]


def test_no_split_parts_near_duplicates(examples: Examples) -> None:
    train, held = split_clients(examples.clients(), CONFIG.data.holdout_fraction, 0)
    parts = [*split_groups(examples.of_clients(train), 0.3, 0), examples.of_clients(held)]
    groups = [set(p.columns["group"].tolist()) for p in parts]
    assert all(groups)
    assert len(set.union(*groups)) == sum(len(g) for g in groups)


# --- augmentation


def test_augmentation_depends_on_the_example_alone(examples: Examples) -> None:
    keys = seeding.example_keys(5, np.arange(len(examples)))
    before = examples.inputs["image"].copy()
    out = augment.augment(dict(examples.inputs), keys, CONFIG)["image"]
    part = augment.augment({"image": before[7:9]}, keys[7:9], CONFIG)["image"]
    np.testing.assert_array_equal(out[7:9], part)
    np.testing.assert_array_equal(examples.inputs["image"], before)
    assert out.dtype == np.uint8
    assert out.shape == before.shape
    assert (out != before).any(axis=(1, 2, 3)).mean() > 0.9
    empty = augment.augment({"image": before[:0]}, keys[:0], CONFIG)["image"]
    assert empty.shape == before[:0].shape


def test_without_strength_only_turns_and_mirrors_are_left(examples: Examples) -> None:
    keys = np.array([9, 10, 11, 12], np.uint64)
    before = examples.inputs["image"][:4]
    none = APPLICATION.configure(["data.zoom=0.0", "data.rotate=0.0", "data.colour=0.0", "data.background=0.0"])
    out = augment.augment({"image": before}, keys, none)["image"].astype(int)
    for image, source in zip(out, before.astype(int), strict=True):
        turned = [np.rot90(m, k) for m in (source, source[:, ::-1]) for k in range(4)]
        assert min(np.abs(image - t).max() for t in turned) <= 1


def test_plain_backdrops_are_replaced_and_leaves_are_not() -> None:
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[0, :, :16] = (60, 130, 50)  # leaf
    image[0, 20:24, 4:8] = (170, 150, 110)  # lesion
    image[0, :16, 16:] = (5, 6, 4)
    image[0, 16:, 16:] = (140, 134, 146)
    out = augment.other_background(image, np.array([3], np.uint64))
    np.testing.assert_array_equal(out[0, :, :16], image[0, :, :16])
    assert (out[0, :, 16:] != image[0, :, 16:]).any(axis=-1).mean() > 0.9


# --- the generator


def test_a_site_is_the_same_however_many_there_are(made: Leaves) -> None:
    fewer = APPLICATION.generate(
        APPLICATION.configure(["data.clients=2", "data.images_per_client=8", "data.image_size=48"]), 3
    )
    for a, b in zip(fewer.leaves, made.leaves, strict=False):
        assert a.facts == b.facts
        np.testing.assert_array_equal(a.source, b.source)


@pytest.mark.parametrize("backdrop", leaves.BACKDROPS)
def test_symptoms_change_the_leaf_and_nothing_else(backdrop: str) -> None:
    site = leaves.Site.draw(np.random.default_rng(1))
    site = type(site)(**{**site.__dict__, "backdrop": backdrop, "noise": 0.0})

    def drawn(symptom: str) -> npt.NDArray[np.int64]:
        streams = np.random.default_rng(4), np.random.default_rng(5)
        return leaves.draw(*streams, site, symptom, 0, 64).astype(np.int64)

    healthy = drawn("none")
    for symptom in leaves.SYMPTOMS[:-1]:
        changed = np.abs(drawn(symptom) - healthy).max(axis=-1) > 25
        assert 0.001 < changed.mean() < 0.7
        assert not changed.all(axis=1).any()


def test_domains_follow_the_backdrop_and_classes_vary_by_site(made: Leaves) -> None:
    table = [
        leaf.facts
        for leaf in APPLICATION.generate(
            APPLICATION.configure(["data.clients=24", "data.images_per_client=4", "data.image_size=32"]), 0
        ).leaves
    ]
    assert {f.domain for f in table} == {"lab", "field"}
    assert {f.label for f in table} == set(MAIZE)
    assert len({f.group for f in table}) < len(table)


# --- model, loss, metrics


@pytest.mark.parametrize("kind", ["batch", "group", "none"])
def test_extreme_pixels_give_finite_scores(kind: str) -> None:
    torch.set_num_threads(1)
    config = APPLICATION.configure([f"model.norm={kind}", "data.image_size=48"])
    model = APPLICATION.build_model(config).eval()
    image = torch.zeros((2, 48, 48, 3), dtype=torch.uint8)
    image[1] = 255
    with torch.no_grad():
        logits = model(image)
        torch.testing.assert_close(model(image[:1]), logits[:1])
    assert logits.shape == (2, 4)
    assert torch.isfinite(logits).all()


def test_the_loss_adds_up_over_any_split_and_weighs_classes() -> None:
    config = APPLICATION.configure(["model.class_weights=[1.0, 2.0, 0.5, 0.0]"])
    loss = APPLICATION.loss_function()
    logits, truth = torch.randn(10, 4, dtype=torch.float64), torch.arange(10) % 4
    whole = loss(logits, truth, config)
    parts = [loss(logits[i : i + 3], truth[i : i + 3], config) for i in range(0, 10, 3)]
    for k in range(2):
        torch.testing.assert_close(whole[k], sum(p[k] for p in parts))
    assert float(whole[1]) == 3 * 1 + 3 * 2 + 2 * 0.5


def test_metrics_and_predictions_by_name(examples: Examples) -> None:
    logits = np.zeros((len(examples), 4), np.float32)
    logits[np.arange(len(examples)), examples.targets] = 3
    found = APPLICATION.metrics(CONFIG, {"logits": logits}, examples)
    assert found == {"accuracy": 1.0, "f1_macro": 1.0, "balanced_accuracy": 1.0}
    json.dumps(found, allow_nan=False)
    masks = APPLICATION.groups(CONFIG, examples)
    assert {"lab", "field"} & set(masks)
    assert sum(int(m.sum()) for name, m in masks.items() if name.startswith("site/")) == len(examples)
    columns = APPLICATION.postprocess(CONFIG, {"logits": logits})
    assert columns["prediction"].tolist() == [MAIZE[t] for t in examples.targets]
    np.testing.assert_allclose(sum(columns[f"score_{name}"] for name in MAIZE), 1.0)
    nothing = examples.take(np.zeros(0, int))
    assert APPLICATION.metrics(CONFIG, {"logits": logits[:0]}, nothing) == {}
    assert len(APPLICATION.postprocess(CONFIG, {"logits": logits[:0]})["prediction"]) == 0


def test_balanced_sampling_repeats_a_domain_in_training_alone(made: Leaves) -> None:
    config = APPLICATION.configure(["data.image_size=48", 'data.copies=["field:3"]'])
    examples = made.examples(config)
    train, validation = split_groups(examples, 0.3, 0)
    ids = Counter(train.columns["example_id"].tolist())
    domain = dict(zip(examples.columns["example_id"].tolist(), examples.columns["domain"].tolist(), strict=True))
    assert {(domain[k], n) for k, n in ids.items()} == {("field", 3), ("lab", 1)}
    assert max(Counter(validation.columns["example_id"].tolist()).values()) == 1
    with pytest.raises(ConfigError, match="DOMAIN:N"):
        APPLICATION.configure(['data.copies=["field"]'])


def test_a_model_of_one_crop_starts_another(tmp_path: Path) -> None:
    model = APPLICATION.build_model(CONFIG)
    parent = Checkpoint(
        CheckpointManifest(application="plant_disease", config=to_table(CONFIG), stage="pretrain"), get_arrays(model)
    )
    first = parent.save(tmp_path / "maize")
    classes = 'data.classes=["early_blight", "healthy"]'
    assert transfer.main([str(tmp_path / "maize"), "--out", str(tmp_path / "tomato"), "--set", classes]) == 0
    found = checkpoints.load(tmp_path / "tomato")
    assert found.manifest.parent_sha256 == first.model_sha256
    assert found.arrays["head.weight"].shape[0] == 2
    assert not found.arrays["head.weight"].any()
    assert all((found.arrays[k] == v).all() for k, v in parent.arrays.items() if not k.startswith("head."))
    assert transfer.main([str(tmp_path / "maize"), "--out", str(tmp_path / "x"), "--set", "model.width=8"]) == 2


def test_the_floor_is_above_chance_on_sites_never_seen() -> None:
    config = APPLICATION.configure(["data.clients=12", "data.images_per_client=20", "data.image_size=48"])
    examples = APPLICATION.generate(config, 1).examples(config)
    names = examples.clients()
    train, test = examples.of_clients(names[:8]), examples.of_clients(names[8:])
    (outputs,) = floor.random_forest(config, train, test, seed=0).values()
    found = APPLICATION.metrics(config, outputs, test)
    assert found["balanced_accuracy"] > 0.3


def test_a_review_shows_errors_and_the_confusion_of_classes(made: Leaves, folder: Path, tmp_path: Path) -> None:
    manifest = CheckpointManifest(application="plant_disease", config=to_table(CONFIG), stage="pretrain")
    Checkpoint(manifest, get_arrays(APPLICATION.build_model(CONFIG))).save(tmp_path / "model")
    assert review.main([str(tmp_path / "model"), "--data", str(folder), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert np.sum(report["confusion"]) == report["images"] == 16
    assert all((tmp_path / "out" / n).stat().st_size > 5_000 for n in ("confusion.png", "errors.png", "report.html"))


def test_the_large_preset_is_large_and_its_memory_is_known() -> None:
    found = estimate(APPLICATION, "large", ["pretrain.batch_size=2"], world=1, parallel="ddp")
    assert found["parameters"] > 100_000_000
    assert 3 * 4 * found["parameters"] < found["memory_bytes"]["total"] < 6 * 2**30


def test_soft_histograms_count_every_pixel_once_in_its_two_nearest_bins() -> None:
    rng = np.random.default_rng(0)
    colour = rng.random((2, 3, 8, 8)).astype(np.float32)
    found = Histograms(5)(torch.from_numpy(colour)).numpy() ** 2 - 1e-4
    np.testing.assert_allclose(found.reshape(2, 7, 5).sum(-1), 1.0, atol=1e-5)
    half = colour.reshape(2, 3, 4, 2, 4, 2).mean((3, 5))
    for image, channel in ((0, 0), (1, 2)):
        slow = np.zeros(5)
        for value in half[image, channel].ravel():
            low = min(int(value * 4), 3)
            slow[low] += (low + 1 - value * 4) / 16
            slow[low + 1] += (value * 4 - low) / 16
        np.testing.assert_allclose(found[image, 5 * channel : 5 * channel + 5], slow, atol=1e-5)


SIZE = ["data.image_size=48", "model.width=8"]


def test_histograms_and_symmetries_run_on_the_device_as_in_torch(made: Leaves, tmp_path: Path) -> None:
    config = APPLICATION.configure([*SIZE, "model.colour_bins=8", "model.symmetries=8"])
    examples = made.examples(config).take(slice(0, 6))
    model = APPLICATION.build_model(config)
    write_onnx(model, APPLICATION, config, examples, tmp_path / "m.onnx", opset=config.export.opset)
    report = compare(predict(model, APPLICATION, config, examples), Session(tmp_path / "m.onnx").run(examples.inputs))
    assert report.relative_max <= config.export.parity_tolerance


def test_with_symmetries_a_turned_leaf_is_the_same_leaf() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), np.uint8))
    plain, all_eight = (APPLICATION.build_model(APPLICATION.configure(SIZE + s)) for s in ([], ["model.symmetries=8"]))
    turned = [torch.rot90(image, k, (1, 2)) for k in range(4)]
    turned += [x.flip(2) for x in turned]
    with torch.no_grad():
        np.testing.assert_array_equal(all_eight.train()(image), plain.train()(image))
        wanted = torch.stack([plain.eval()(x) for x in turned])
        assert float((wanted - wanted.mean(0)).abs().max()) > 1e-3  # else there would be nothing to even out
        for x in turned:
            np.testing.assert_allclose(all_eight.eval()(x), wanted.mean(0), atol=1e-5)
    flat = image.permute(0, 3, 1, 2)
    assert torch.equal(symmetric(flat, 2), torch.cat([flat, flat.flip(3)]))
    assert len({x.numpy().tobytes() for x in symmetric(flat[:1], 8)}) == 8
    with pytest.raises(ConfigError, match="1, 2, 4 or 8"):
        APPLICATION.configure(["model.symmetries=3"])
