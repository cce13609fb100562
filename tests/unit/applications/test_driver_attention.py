"""driver_attention: what causes a label, what each camera sees, the model's masks, and what must not leak."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from applications.driver_attention import (
    APPLICATION,
    augment,
    cameras,
    data,
    driver,
    generator,
    pipeline,
    scenery,
    traffic,
)
from applications.driver_attention.config import VIEWS, Config
from applications.driver_attention.data import Drives
from fl_core.contracts.errors import ConfigError, DataError
from fl_core.learning import seeding
from fl_core.learning.examples import Examples
from fl_core.learning.samples import Sample
from fl_core.learning.torch_arrays import predict
from fl_core.runtime import scores
from tests.helpers import refusal

CONFIG: Config = APPLICATION.configure(["data.clients=4", "data.clips_per_client=24"])
STEPS = 90
AT = 40


@pytest.fixture(scope="module")
def drives() -> Drives:
    return APPLICATION.generate(CONFIG, 3)


@pytest.fixture(scope="module")
def examples(drives: Drives) -> Examples:
    return drives.examples(CONFIG)


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.set_num_threads(1)
    return APPLICATION.build_model(CONFIG).eval()


def script(event: str, **changes: float) -> traffic.Script:
    """One moment, nobody beside, an ordinary driver on a straight road."""
    one = {
        "event": list(traffic.EVENTS).index(event), "at": AT, "speed": 18.0, "headway": 1.3, "reaction": 7, "curvature": 0.0,
        "lead": True, "lead_braking": 5.0, "lead_slows_to": 0.1, "push": 0.0, "beside": False, "beside_x": 0.0,
        "beside_speed": 0.0, "cuts_to": 0.0, "cut_speed": 1.5, "signals": True, "checks": True, "slows": 0.0, "slows_at": 0, "place": 0.0, **changes,
    }  # fmt: skip
    return traffic.Script(**{k: np.array([v]) for k, v in one.items()})


def eyes(kind: str) -> driver.Eyes:
    open_eyes = driver.Eyes(*(np.full((1, STEPS), v) for v in (0.0, 0.0, 1.0, 0.0)))
    if kind == "distracted":
        open_eyes.down[:, AT - 5 : AT + 40] = 0.95
    if kind == "checks the mirror":
        driver.glance_left(open_eyes, 0, AT - 12, 6)
    return open_eyes


def run(moment: traffic.Script, look: driver.Eyes) -> traffic.Scene:
    kind = np.array([driver.ATTENTIVE])
    return traffic.simulate(moment, look, kind, STEPS, np.random.default_rng(0))


# --- the label is caused by the scene


def test_the_same_braking_ends_well_for_who_looks_and_badly_for_who_does_not() -> None:
    seen, missed = (run(script("lead brakes", lead_braking=4.5), eyes(kind)) for kind in ("attentive", "distracted"))
    assert seen.severity.max() < 1 <= missed.severity.max()
    first = int((missed.severity[0] >= 1).argmax())
    assert missed.acceleration[0, first] > -0.6, "who looks away does not brake"
    assert seen.acceleration[0, : first + 1].min() < -2.0


def test_a_push_aside_leaves_the_lane_only_where_nobody_steers_against_it() -> None:
    seen, missed = (run(script("drift", push=0.9, lead=False), eyes(kind)) for kind in ("attentive", "distracted"))
    assert seen.severity.max() < 1 <= missed.severity.max()
    assert np.abs(seen.y).max() < 0.7 < np.abs(missed.y).max()


def test_a_lane_change_is_a_conflict_only_beside_somebody_whom_the_mirror_did_not_show() -> None:
    change = {"lead": False, "beside_x": 0.5}
    assert run(script("lane change", beside=True, **change), eyes("attentive")).severity.max() >= 1
    assert run(script("lane change", beside=True, **change), eyes("checks the mirror")).severity.max() < 1
    alone = run(script("lane change", beside=False, **change), eyes("attentive"))
    assert alone.severity.max() == 0
    assert alone.y[0, -1] > 3.0


def test_a_tight_cut_in_is_a_conflict_for_everybody() -> None:
    cut = {"lead": False, "beside": True, "beside_x": 6.0, "cuts_to": -7.0, "cut_speed": 2.0}
    assert run(script("cut-in", **cut), eyes("attentive")).severity.max() >= 1
    assert run(script("cut-in", **{**cut, "beside_x": 28.0, "cuts_to": 2.0}), eyes("attentive")).severity.max() == 0
    assert run(script("none", **cut), eyes("attentive")).severity.max() == 0


def test_states_are_told_by_the_fields_own_measures() -> None:
    first, last = np.array([0]), np.array([29])
    look = eyes("attentive")
    assert driver.state(look, first, last)[0] == driver.ATTENTIVE
    look.down[:, 5:20] = 0.9  # 1.5 s: between the two
    assert np.isnan(driver.state(look, first, last)[0])
    look.down[:, 5:22] = 0.9
    assert driver.state(look, first, last)[0] == driver.DISTRACTED
    look.lids[:, :13] = 0.05
    assert driver.state(look, first, last)[0] == driver.DROWSY


# --- what the cameras see


def seen(scene: traffic.Scene, look: driver.Eyes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    car = dataclasses.replace(cameras.Vehicle.draw(rng), noise=0.0)
    return cameras.pictures(
        scene, look, np.array([0]), np.arange(0, STEPS, 10)[None], car, np.random.default_rng(1), 32, 48
    )


def changed(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> set[str]:
    return {view for view in VIEWS if not np.array_equal(a[view], b[view])}


def test_each_camera_sees_its_own_part_of_the_scene_and_no_other() -> None:
    look = eyes("attentive")
    scene = run(script("none", beside=True), look)
    scene = dataclasses.replace(scene, beside_x=np.full_like(scene.beside_x, 1.0))
    before = seen(scene, look)
    shut = dataclasses.replace(look, lids=np.full_like(look.lids, 0.05))
    assert changed(before, seen(scene, shut)) == {"cabin"}
    assert changed(before, seen(dataclasses.replace(scene, lead_gap=scene.lead_gap - 8), look)) == {"front"}
    lit = dataclasses.replace(scene, lead_brakes=~scene.lead_brakes)
    assert changed(before, seen(lit, look)) == {"front"}
    gone = dataclasses.replace(scene, beside_x=np.full_like(scene.beside_x, traffic.FAR))
    assert changed(before, seen(gone, look)) == {"side"}
    aside = dataclasses.replace(scene, y=scene.y + 0.5)
    assert changed(before, seen(aside, look)) == {"front", "side"}
    worse = dataclasses.replace(scene, severity=scene.severity + 1)
    assert changed(before, seen(worse, look)) == set(), "what is to be told is not drawn"


@pytest.mark.parametrize("gap", [8.0, 12.0, 20.0])
def test_the_lead_vehicle_has_the_size_that_its_distance_gives(gap: float) -> None:
    look = eyes("attentive")
    scene = run(script("none"), look)
    near = dataclasses.replace(scene, lead_gap=np.full_like(scene.lead_gap, gap + traffic.LENGTH / 2 + 1.5))
    far = dataclasses.replace(scene, lead_gap=np.full_like(scene.lead_gap, traffic.FAR))
    other = (seen(near, look)["front"][0, 0].astype(float) - seen(far, look)["front"][0, 0]) != 0
    wide = int(other.any(axis=0).sum())
    assert abs(wide - 40.0 * traffic.WIDTH / gap) <= 2


def test_a_lorry_is_taller_than_a_car_and_stands_on_the_same_place() -> None:
    look = eyes("attentive")
    scene = run(script("none"), look)
    near = dataclasses.replace(scene, lead_gap=np.full_like(scene.lead_gap, 15.0))
    far = dataclasses.replace(scene, lead_gap=np.full_like(scene.lead_gap, traffic.FAR))
    tops, bottoms = [], []
    for tall in (1.4, 3.5):
        with mock.patch.object(scenery, "heights", lambda rng, count, tall=tall: np.full(count, tall)):
            shown = np.nonzero(seen(near, look)["front"][0, 0] != seen(far, look)["front"][0, 0])[0]
        tops.append(shown.min())
        bottoms.append(shown.max())
    assert tops[0] - tops[1] >= 5
    assert bottoms[0] == bottoms[1], "how far it is shows where its wheels are"


def test_what_stands_by_the_road_moves_as_the_vehicle_does_and_nobody_comes_towards_us_in_our_lanes() -> None:
    night = np.zeros(400, bool)
    around = scenery.Scenery.draw(np.random.default_rng(0), night, 15, 5.0)
    assert (around.aside[:, scenery.RIGHT] < -traffic.LANE).all()
    assert (around.aside[:, scenery.LEFT] > cameras.EDGE_LEFT).all()
    assert cameras.EDGE_LEFT + traffic.WIDTH / 2 < scenery.ACROSS
    place, spacing = np.array([-70.0, 6.0, 7.0, 250.0]), np.array([20.0, 14.0, 30.0, 45.0])
    nearest = scenery.after(place, spacing)
    assert ((nearest >= scenery.NEAREST_M) & (nearest < scenery.NEAREST_M + spacing)).all()
    np.testing.assert_allclose((nearest - place) / spacing, np.round((nearest - place) / spacing), atol=1e-9)
    look = eyes("attentive")
    scene = run(script("none", lead=False), look)
    still = dataclasses.replace(
        scene, **{name: np.repeat(getattr(scene, name)[:, :1], STEPS, axis=1) for name in vars(scene)}
    )
    draw = scenery.Scenery.draw

    def drawn(*given: Any) -> scenery.Scenery:
        return dataclasses.replace(draw(*given), gaps=np.zeros(len(range(0, STEPS, 10))))

    with (
        mock.patch.object(scenery.Scenery, "draw", drawn),
        mock.patch.object(cameras.Look, "draw", _steady(cameras.Look.draw)),
    ):
        for view in ("front", "side"):
            assert (seen(still, look)[view][0] == seen(still, look)[view][0, :1]).all(), view
            assert (seen(scene, look)[view][0] != seen(scene, look)[view][0, :1]).any(), view


def _steady(draw: Any) -> Any:
    """The same light in all frames, and a smooth road."""

    def drawn(rng: np.random.Generator, clips: int, frames: int) -> cameras.Look:
        look = draw(rng, clips, frames)
        return dataclasses.replace(look, gain=np.ones_like(look.gain), shake=np.zeros_like(look.shake))

    return drawn


def test_motion_agrees_with_the_instruments() -> None:
    look = eyes("attentive")
    scene = run(script("lead brakes"), look)
    np.testing.assert_allclose(np.diff(scene.speed), scene.acceleration[:, 1:] * 0.1, atol=0.2)
    np.testing.assert_allclose(np.diff(scene.travelled), (scene.speed[:, 1:] + scene.speed[:, :-1]) / 20, atol=1e-9)
    steps = np.arange(2, STEPS)[None]
    told = generator.instruments(scene, np.array([0]), steps, np.random.default_rng(0))
    at = pipeline.NAMES.index
    assert np.corrcoef(told[:, at("long_acc_mps2")], scene.acceleration[0, 2:])[0, 1] > 0.95
    np.testing.assert_allclose(told[:, at("speed_mps")], scene.speed[0, 2:], rtol=0.05, atol=0.6)


# --- what must not leak


def test_place_in_the_recording_and_names_tell_nothing() -> None:
    """Only what identifies a clip, no picture: the labels of many clips, by their number and by their vehicle's."""
    rng = seeding.generator(0, "test")
    conflict = np.concatenate([generator.moments(rng, 60, 28)[3] for _ in range(12)])
    place = np.tile(np.arange(60), 12)
    found = scores.roc_auc(conflict, place)
    assert found is not None
    assert abs(found - 0.5) < 0.05
    assert 0.25 < conflict.mean() < 0.5


def test_scores_follow_the_clip_and_not_its_place_or_name(examples: Examples, net: torch.nn.Module) -> None:
    few = examples.take(slice(0, 12))
    order = np.random.default_rng(0).permutation(12)
    renamed = dataclasses.replace(few.take(order), columns={k: v[::-1] for k, v in few.columns.items()})
    a, b = (predict(net, APPLICATION, CONFIG, e) for e in (few, renamed))
    for name in a:
        np.testing.assert_allclose(b[name], a[name][order], atol=1e-5)


@pytest.mark.parametrize("view", VIEWS)
def test_the_pixels_of_an_absent_view_are_not_looked_at(examples: Examples, net: torch.nn.Module, view: str) -> None:
    few = examples.take(slice(0, 6))
    present = few.inputs["present"].copy()
    present[:, VIEWS.index(view)] = 0
    frames = few.inputs["frames"].copy()
    frames[:, VIEWS.index(view)] = np.random.default_rng(0).integers(0, 256, frames[:, 0].shape)
    blank, noise = (
        dataclasses.replace(few, inputs={**few.inputs, "present": present, "frames": f}) for f in (few.inputs["frames"], frames)
    )  # fmt: skip
    a, b = (predict(net, APPLICATION, CONFIG, e) for e in (blank, noise))
    np.testing.assert_array_equal(a["conflict"], b["conflict"])
    whole = predict(net, APPLICATION, CONFIG, few)["conflict"]
    assert not np.allclose(a["conflict"], whole)


def test_a_clip_may_begin_late_and_readings_may_be_nonsense(examples: Examples, net: torch.nn.Module) -> None:
    few = examples.take(slice(0, 6))
    present = few.inputs["present"].copy()
    for i in range(6):
        present[i, :, : 3 * i] = 0
    motion = few.inputs["kinematics"].copy()
    motion[0], motion[1], motion[2, :, 1], motion[3, 4] = np.nan, np.inf, 1e30, -np.inf
    outputs = predict(net, APPLICATION, CONFIG, dataclasses.replace(few, inputs={**few.inputs, "present": present, "kinematics": motion}))  # fmt: skip
    assert all(np.isfinite(v).all() for v in outputs.values())


def test_what_the_kinematics_add_depends_on_nothing_else_and_is_learned_by_itself(examples: Examples) -> None:
    few = examples.take(slice(0, 6))
    frames, present, motion = (
        torch.from_numpy(np.ascontiguousarray(few.inputs[k])) for k in ("frames", "present", "kinematics")
    )
    net = APPLICATION.build_model(CONFIG).train()
    conflict, state, alone = net(frames, present, motion)
    dark = net(torch.zeros_like(frames), torch.zeros_like(present), motion)
    torch.testing.assert_close(dark[2], alone)
    assert not torch.allclose(dark[0], conflict)
    assert len(net.eval()(frames, present, motion)) == 2
    loss, targets = APPLICATION.loss_function(), torch.from_numpy(few.targets)
    without = APPLICATION.configure(["model.motion_weight=0"])
    plain, weighted = (loss((conflict, state, alone), targets, c)[0] for c in (without, CONFIG))
    torch.testing.assert_close(loss((conflict, state), targets, CONFIG)[0], plain)
    (weighted - plain).backward()
    reached = {
        name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert reached == {"felt_over_time", "by_motion"}


def test_augmentation_leaves_a_view_and_drops_the_others_at_their_rate() -> None:
    config = APPLICATION.configure(
        [
            *("data.drop_view=0.5", "data.drop_kinematics=0.3", "data.frames=4", "data.late_start=0.0"),
            "data.drop_all_views=0.0",
        ]
    )
    inputs = {
        "frames": np.full((600, 3, 4, 16, 16), 100, np.uint8),
        "present": np.ones((600, 3, 4), np.float32),
        "kinematics": np.zeros((600, 4, 6), np.float32),
    }
    found = augment.augment(inputs, seeding.example_keys(1, np.arange(600)), config)
    there = found["present"].max(axis=2)
    assert there.max(axis=1).min() == 1
    assert np.abs(there.mean(axis=0) - (1 - 0.5 * 2 / 3)).max() < 0.06
    assert abs(np.isnan(found["kinematics"]).mean() - 0.3) < 0.06
    assert (found["frames"][there == 0] == 0).all()


def test_augmentation_leaves_the_kinematics_alone_where_there_are_any() -> None:
    config = APPLICATION.configure(["data.drop_all_views=0.4", "data.drop_kinematics=0.5", "data.late_start=0.0"])
    inputs = {
        "frames": np.full((400, 3, 4, 16, 16), 100, np.uint8),
        "present": np.ones((400, 3, 4), np.float32),
        "kinematics": np.zeros((400, 4, 6), np.float32),
    }
    inputs["kinematics"][200:] = np.nan
    found = augment.augment(inputs, seeding.example_keys(1, np.arange(400)), config)
    blind = found["present"].max(axis=(1, 2)) == 0
    assert 0.3 < blind[:200].mean() < 0.5
    assert not blind[200:].any()
    assert not np.isnan(found["kinematics"][blind]).any()


def test_augmentation_moves_all_frames_of_a_view_alike_and_begins_late() -> None:
    settings = [
        "data.drop_view=0.0",
        "data.drop_all_views=0.0",
        "data.light=0.0",
        "data.late_start=0.5",
        "data.shift=0.1",
    ]
    config = APPLICATION.configure(settings)
    clip = np.random.default_rng(0).integers(1, 256, (1, 3, 15, 32, 48)).astype(np.uint8)
    inputs = {"frames": np.repeat(clip, 200, 0), "present": np.ones((200, 3, 15), np.float32)}
    inputs["kinematics"] = np.zeros((200, 15, 6), np.float32)
    found = augment.augment(inputs, seeding.example_keys(2, np.arange(200)), config)
    begins = (found["present"][:, 0] == 0).sum(axis=1)
    assert 0.35 < (begins > 0).mean() < 0.65
    assert begins.max() == 7
    moves = set()
    for i in range(200):
        assert (found["present"][i, :, : begins[i]] == 0).all()
        assert (found["present"][i, :, begins[i] :] == 1).all()
        down, aside = move_between(clip[0, 1, -1], found["frames"][i, 1, -1])
        for t in range(int(begins[i]), 15):
            middle = clip[0, 1, t][8 + down : 24 + down, 8 + aside : 40 + aside]
            np.testing.assert_array_equal(found["frames"][i, 1, t][8:24, 8:40], middle)
        moves.add((down, aside))
    assert len(moves) > 20


def move_between(before: np.ndarray, after: np.ndarray) -> tuple[int, int]:
    """(down, aside): by how much the middle of ``after`` shows what lies further in ``before``."""
    for down in range(-3, 4):
        for aside in range(-5, 6):
            if np.array_equal(before[8 + down : 24 + down, 8 + aside : 40 + aside], after[8:24, 8:40]):
                return down, aside
    raise AssertionError("not moved by whole pixels")


# --- losses and metrics


def test_what_is_not_known_costs_nothing_and_counts_nowhere() -> None:
    loss = APPLICATION.loss_function()
    outputs = torch.randn(6, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    targets = torch.tensor([[1, 0], [0, 2], [1, 1], [0, 0], [1, 2], [0, 1]], dtype=torch.float64)
    whole = float(loss(outputs, targets, CONFIG)[0])
    parts = []
    for column in (0, 1):
        half = targets.clone()
        half[:, column] = torch.nan
        numerator, denominator = loss(outputs, half, CONFIG)
        assert float(denominator) == 6
        parts.append(float(numerator))
    assert sum(parts) == pytest.approx(whole)
    assert float(loss(outputs, torch.full((6, 2), torch.nan), CONFIG)[0]) == 0


def test_metrics_are_of_what_is_known(examples: Examples) -> None:
    outputs = {
        "conflict": np.nan_to_num(examples.targets[:, 0]),
        "state": np.eye(3)[np.nan_to_num(examples.targets[:, 1]).astype(int)],
    }
    found = APPLICATION.metrics(CONFIG, outputs, examples)
    assert found == {"roc_auc": 1.0, "average_precision": 1.0, "state_f1_macro": 1.0, "state_accuracy": 1.0}
    blind = dataclasses.replace(examples, targets=np.full_like(examples.targets, np.nan))
    assert APPLICATION.metrics(CONFIG, outputs, blind) == {}
    masks = APPLICATION.groups(CONFIG, examples)
    assert set(masks) == {"all_views", *(f"without_{v}" for v in VIEWS)}


def test_a_view_taken_as_absent_is_left_out_of_the_examples(drives: Drives, examples: Examples) -> None:
    config = APPLICATION.configure(['data.missing_views=["cabin"]', "data.missing_kinematics=true"])
    found = drives.examples(config)
    assert not found.inputs["present"][:, VIEWS.index("cabin")].any()
    assert not found.inputs["frames"][:, VIEWS.index("cabin")].any()
    np.testing.assert_array_equal(found.inputs["frames"][:, 0], examples.inputs["frames"][:, 0])
    assert np.isnan(found.inputs["kinematics"]).all()
    assert "not a view" in str(refusal(ConfigError, lambda: APPLICATION.configure(['data.missing_views=["roof"]'])))
    odd = APPLICATION.configure(["data.rate_hz=4.0", "data.clients=1"])
    assert "in steps of 0.1 s" in str(refusal(ConfigError, lambda: APPLICATION.generate(odd, 0)))
    assert "multiple of 8" in str(refusal(ConfigError, lambda: APPLICATION.configure(["data.width=44"])))


def test_the_floor_and_the_pictures_are_of_the_clips_that_they_are_given(examples: Examples) -> None:
    few = examples.of_clients(examples.clients()[:2])
    rest = examples.of_clients(examples.clients()[2:])
    found = APPLICATION.floor_function()(CONFIG, few, rest, seed=0)  # type: ignore[misc]
    assert set(found) == {
        f"{name}, boosted trees" for name in ("kinematics", *(f"{v} statistics" for v in VIEWS), "all")
    }
    for outputs in found.values():
        assert set(APPLICATION.metrics(CONFIG, outputs, rest)) >= {"roc_auc", "state_f1_macro"}
    outputs = found["all, boosted trees"]
    drawn = APPLICATION.pictures_function()(CONFIG, outputs, rest)  # type: ignore[misc]
    assert 2 <= len(drawn) <= 4
    assert all(picture.startswith(b"\x89PNG") and "vehicle-" in caption for picture, caption in drawn)


# --- data


def test_a_vehicle_is_the_same_however_many_there_are(drives: Drives) -> None:
    fewer = APPLICATION.generate(APPLICATION.configure(["data.clients=2", "data.clips_per_client=24"]), 3)
    assert repr(fewer.clips) == repr(drives.select(fewer.client_ids()).clips)  # NaN is not equal to itself
    for name, recording in fewer.recordings.items():
        for view, stream in recording.views.items():
            np.testing.assert_array_equal(stream.source, drives.recordings[name].views[view].source)


def test_a_clip_collected_on_the_device_becomes_the_same_example(
    drives: Drives, examples: Examples, tmp_path: Path
) -> None:
    clip = drives.clips[0]
    recording = drives.recordings[clip.recording]
    arrays: dict[str, np.ndarray] = {}
    for view, stream in recording.views.items():
        mine = np.abs(stream.times - clip.end_s) < 4
        arrays |= {view: np.asarray(stream.source)[mine], f"{view}_s": stream.times[mine]}
    assert recording.motion is not None
    mine = np.abs(recording.motion.times - clip.end_s) < 4
    arrays |= {data.KINEMATICS: recording.motion.values[mine], f"{data.KINEMATICS}_s": recording.motion.times[mine]}
    form = APPLICATION.samples
    assert form is not None
    (tmp_path / "clip.npz").write_bytes(form.encode(arrays))
    assert form.check(tmp_path / "clip.npz")["schema"] == "clip"
    (tmp_path / "out").mkdir()
    told = form.label({"conflict": "1", "state": "drowsy"})
    form.write([Sample(id="x", path=tmp_path / "clip.npz", time=0.0, label=told)], tmp_path / "out", "me", CONFIG)
    found = APPLICATION.read(tmp_path / "out").examples(CONFIG)
    for name, value in found.inputs.items():
        np.testing.assert_array_equal(value[0], examples.inputs[name][0], err_msg=name)
    assert found.targets.tolist() == [[1.0, 2.0]]
    assert found.clients() == ("vehicle-me",)
    for wrong in ({"conflict": 2}, {"state": "asleep"}, {"conflict": 1, "mood": "good"}, {}):
        assert refusal(DataError, lambda wrong=wrong: form.label(wrong)) is not None


def test_presets_are_of_the_sizes_that_the_readme_states() -> None:
    text = (Path(data.__file__).parent / "README.md").read_text(encoding="utf-8")
    for preset in ("compact", "default", "large"):
        with torch.device("meta"):
            count = sum(p.numel() for p in APPLICATION.build_model(APPLICATION.configure(preset=preset)).parameters())
        assert f"`{preset}` {count:,}" in text, (preset, f"{count:,}")
        assert preset != "large" or count >= 100_000_000
