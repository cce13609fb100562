"""driver_conflict: the protocol, the faults of the format, the model's graph and what must not leak."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from applications.driver_conflict import APPLICATION, augment, data, pipeline
from applications.driver_conflict.config import Config, DataConfig
from applications.driver_conflict.data import Drives, Event
from fl_core.contracts.errors import ConfigError, DataError
from fl_core.learning import partition, seeding
from fl_core.learning.examples import Examples
from fl_core.runtime import scores

CONFIG: Config = APPLICATION.configure(["data.clients=6", "data.events_per_client=4"])


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


def score(net: torch.nn.Module, window: np.ndarray) -> np.ndarray:
    """Logits of a conflict."""
    with torch.no_grad():
        return net(torch.from_numpy(window))[0].numpy()


def cut(event: Event, rows: int) -> Event:
    """The same drive, recorded from ``rows`` later on."""
    first, last = event.conflict
    facts = {**event.facts, "event_start_row": str(max(0, first - rows)), "event_end_row": str(last - rows)}
    return dataclasses.replace(event, rows=event.rows[rows:], facts=facts)


# --- the protocol


def test_windows_are_labelled_by_the_protocol() -> None:
    starts = pipeline.window_starts(440)
    assert starts[0] == 0
    assert set(np.diff(starts)) == {15}
    assert starts[-1] + 30 <= 440
    labels = dict(zip(starts.tolist(), pipeline.window_labels(starts, 300, 341).tolist(), strict=True))
    assert labels[210] == 0  # ends at row 240: 6 s before
    assert labels[225] == -1  # ends at row 255: 4.5 s before
    assert labels[270] == -1  # ends as the conflict begins
    assert labels[285] == 1
    assert labels[330] == 1
    assert labels[345] == -1  # after the conflict
    assert pipeline.window_labels(np.array([0]), 80, 90)[0] == -1  # exactly 5 s before is not more than 5 s


def test_every_window_ends_its_own_context(drives: Drives, examples: Examples) -> None:
    column = [drives.channels.index(n) for n in pipeline.NAMES]
    by_id = {e.event_id: pipeline.clean(e.rows[:, column]) for e in drives.events}
    for i in range(0, len(examples), 7):
        rows = by_id[int(examples.columns["event_id"][i])]
        end = int(examples.columns["end_row"][i])
        want = rows[max(0, end - 80) : end]
        got = examples.inputs["window"][i]
        inertial = pipeline.index("lat_acc_g")
        other = [c for c in range(got.shape[1]) if c not in (inertial, pipeline.index("long_acc_g"))]
        np.testing.assert_array_equal(got[80 - len(want) :][:, other], want[:, other])
        assert np.isnan(got[: 80 - len(want)]).all()
        assert examples.columns["full_context"][i] == (end >= 80)


def test_only_events_with_a_working_speed_channel_count(drives: Drives, examples: Examples) -> None:
    stuck = {e.event_id for e in drives.events if e.facts["speed_ok"] == "0"}
    assert not stuck & set(examples.columns["event_id"].tolist())
    bad = dataclasses.replace(drives.events[0], facts={**drives.events[0].facts, "accel_ok": "0", "speed_ok": "1"})
    window = Drives(drives.channels, (bad,)).examples(CONFIG).inputs["window"]
    assert np.isnan(window[:, :, [pipeline.index(n) for n in pipeline.ACCELERATIONS]]).all()


def test_sensor_faults_become_missing_samples() -> None:
    rows = np.zeros((1, len(pipeline.NAMES)), np.float32)
    fault = {"speed_vehicle_mph": -1.0, "speed_gps_mph": 969.6, "lat_acc_g": np.nan, "long_acc_g": np.inf}
    for name, value in {**fault, "fwd_range_rate_ftps": 3.0}.items():
        rows[0, pipeline.index(name)] = value
    missing = {pipeline.NAMES[i] for i in np.flatnonzero(np.isnan(pipeline.clean(rows)[0]))}
    assert missing == {*fault, *pipeline.RADARS[0], *pipeline.RADARS[1]}


def test_time_counters_and_light_are_no_inputs(drives: Drives, examples: Examples) -> None:
    forbidden = [drives.channels.index(n) for n in ("t_s", "sync", "light")]
    events = []
    for e in drives.events:
        rows = e.rows.copy()
        rows[:, forbidden] = 7.0
        events.append(dataclasses.replace(e, rows=rows))
    again = Drives(drives.channels, tuple(events)).examples(CONFIG)
    np.testing.assert_array_equal(again.inputs["window"], examples.inputs["window"])


# --- what must not leak


@pytest.mark.parametrize("rows", [1, 15, 37, 60])
def test_cutting_the_start_of_events_changes_no_full_context_score(
    drives: Drives, examples: Examples, net: torch.nn.Module, rows: int
) -> None:
    column = [drives.channels.index(n) for n in pipeline.NAMES]
    full = examples.take(examples.columns["full_context"])
    whole = dict(
        zip(
            zip(full.columns["event_id"], full.columns["end_row"], strict=True),
            score(net, full.inputs["window"]),
            strict=True,
        )
    )
    compared = 0
    for event in drives.events:
        ends = np.array([e for i, e in whole if i == event.event_id and e - rows >= 80], np.int64)
        if not len(ends):
            continue
        window = data.prepared(cut(event, rows), column)
        after = score(net, pipeline.contexts(window, ends - rows))
        before = np.array([whole[(event.event_id, e)] for e in ends])
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)
        compared += len(ends)
    assert compared > 50


def test_cutting_on_the_grid_keeps_windows_labels_and_scores(drives: Drives, examples: Examples) -> None:
    late = Drives(drives.channels, tuple(cut(e, 30) for e in drives.events if e.conflict[1] >= 30))
    again = late.examples(CONFIG)
    names = ("event_id", "start_row")
    old = {(int(i), int(s) - 30): k for k, (i, s) in enumerate(zip(*(examples.columns[n] for n in names), strict=True))}
    compared = 0
    for k, (i, s) in enumerate(zip(*(again.columns[n] for n in names), strict=True)):
        if again.columns["full_context"][k]:
            j = old[(int(i), int(s))]
            assert again.targets[k] == examples.targets[j]
            np.testing.assert_array_equal(again.inputs["window"][k], examples.inputs["window"][j])
            compared += 1
    assert compared > 50


def test_short_history_is_never_learned_from_where_it_tells_the_position(drives: Drives) -> None:
    train, validation = partition.split_groups(drives.examples(CONFIG), 0.3, 0)
    assert train.columns["full_context"].all()
    assert not validation.columns["full_context"].all()
    assert not set(train.columns["group"]) & set(validation.columns["group"])


def test_augmentation_shortens_history_whatever_the_label() -> None:
    cfg = Config(data=DataConfig(truncate=0.5, drop_sensor=0.1))
    window = np.ones((4000, 80, len(pipeline.NAMES)), np.float32)
    keys = seeding.example_keys(5, np.arange(4000))
    out = augment.augment({"window": window}, keys, cfg)["window"]
    missing = np.isnan(out).all(axis=2)
    assert not missing[:, 50:].any()
    lengths = missing.sum(axis=1)
    assert 0.45 < np.mean(lengths > 0) < 0.55
    assert set(range(51)) == set(lengths.tolist())
    np.testing.assert_array_equal(out[7:9], augment.augment({"window": window[7:9]}, keys[7:9], cfg)["window"])
    assert np.isfinite(window).all()


def test_position_in_generated_records_tells_nothing() -> None:
    cfg = APPLICATION.configure()
    made = APPLICATION.generate(cfg, 0).examples(cfg)
    full = made.columns["full_context"]
    found = scores.roc_auc(made.targets[full], made.columns["start_row"][full])
    assert found is not None
    assert abs(found - 0.5) < 0.05


# --- the native format


def test_generated_drives_survive_their_native_format(drives: Drives, examples: Examples, tmp_path: Path) -> None:
    one = drives.select(drives.client_ids()[1:2])
    one.write(tmp_path / "device")
    back = APPLICATION.read(tmp_path / "device")
    assert back.client_ids() == drives.client_ids()[1:2]
    want, got = one.examples(CONFIG), back.examples(CONFIG)
    np.testing.assert_array_equal(got.inputs["window"], want.inputs["window"])
    for name in want.columns:
        np.testing.assert_array_equal(got.columns[name], want.columns[name])


def test_a_vehicle_is_the_same_however_many_there_are(drives: Drives) -> None:
    fewer = APPLICATION.generate(APPLICATION.configure(["data.clients=2", "data.events_per_client=4"]), 3)
    for a, b in zip(fewer.events, drives.events, strict=False):
        assert a.facts == b.facts
        np.testing.assert_array_equal(a.rows, b.rows)


def _break_npz(folder: Path, **changes: np.ndarray) -> None:
    with np.load(folder / "series.npz") as arrays:
        content = {**{k: arrays[k] for k in arrays.files}, **changes}
    np.savez(folder / "series.npz", **{k: v for k, v in content.items() if v is not None})


def _truncate(folder: Path) -> None:
    raw = (folder / "series.npz").read_bytes()
    (folder / "series.npz").write_bytes(raw[: len(raw) // 2])


def _edit_csv(folder: Path, old: str, new: str) -> None:
    text = (folder / "events.csv").read_text(encoding="utf-8")
    assert old in text
    (folder / "events.csv").write_text(text.replace(old, new, 1), encoding="utf-8")


BROKEN = {
    "truncated": (_truncate, "series.npz"),
    "no npz": (lambda f: (f / "series.npz").unlink(), "no such file"),
    "no channels": (lambda f: _break_npz(f, channels=None), "'channels' is missing"),
    "a channel": (lambda f: _rename_channel(f, "yaw_rate_dps"), "'yaw_rate_dps' is missing"),
    "rows": (lambda f: _break_npz(f, X=np.zeros((5, 17), np.float32)), "takes rows"),
    "shape": (lambda f: _break_npz(f, X=np.zeros((5, 3), np.float32)), "X is"),
    "column": (lambda f: _edit_csv(f, "vehicle_id", "car"), "'vehicle_id' is missing"),
    "flag": (lambda f: _replace_cell(f, "speed_ok", "yes"), "speed_ok is 'yes'"),
    "interval": (lambda f: _replace_cell(f, "event_end_row", "99999"), "do not fit"),
    "row number": (lambda f: _replace_cell(f, "event_start_row", "-3"), "not a whole number"),
    "vehicle": (lambda f: _replace_cell(f, "vehicle_id", "../x"), "not usable"),
    "stranger": (lambda f: _replace_cell(f, "event_id", "424242"), "only one of"),
}


def _rename_channel(folder: Path, name: str) -> None:
    with np.load(folder / "series.npz") as arrays:
        channels = arrays["channels"]
    _break_npz(folder, channels=np.array(["other" if c == name else str(c) for c in channels]))


def _replace_cell(folder: Path, column: str, value: str) -> None:
    lines = (folder / "events.csv").read_text(encoding="utf-8").splitlines()
    cells = lines[1].split(",")
    cells[lines[0].split(",").index(column)] = value
    (folder / "events.csv").write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]), encoding="utf-8")


@pytest.mark.parametrize("fault", list(BROKEN))
def test_a_broken_data_set_is_refused_by_name(drives: Drives, tmp_path: Path, fault: str) -> None:
    drives.select(drives.client_ids()[:1]).write(tmp_path / "d")
    action, message = BROKEN[fault]
    action(tmp_path / "d")
    with pytest.raises(DataError, match=message):
        APPLICATION.read(tmp_path / "d")


# --- the model


@pytest.mark.parametrize("kind", ["batch", "group", "none"])
def test_hostile_readings_give_finite_scores(examples: Examples, kind: str) -> None:
    model = APPLICATION.build_model(APPLICATION.configure([f"model.norm={kind}"])).eval()
    window = examples.inputs["window"][:6].copy()
    window[0, 3] = np.inf
    window[1, :, 2] = -np.inf
    window[2] = np.nan
    window[3] = 3e38
    window[4] = -3e38
    assert np.isfinite(score(model, window)).all()
    np.testing.assert_allclose(score(model, window[3:4]), score(model, window[2:3]))


def test_the_graph_treats_faults_as_the_pipeline_does(drives: Drives, net: torch.nn.Module) -> None:
    event = next(e for e in drives.events if e.usable)
    raw = event.rows[:, [drives.channels.index(n) for n in pipeline.NAMES]]
    ends = np.array([80, 95])
    np.testing.assert_allclose(
        score(net, pipeline.contexts(raw, ends)), score(net, pipeline.contexts(pipeline.clean(raw), ends)), atol=1e-6
    )


def test_metrics_name_what_is_defined_and_nothing_else(examples: Examples) -> None:
    outputs = {"logit": np.linspace(-1, 1, len(examples)), "incident": np.zeros((len(examples), 5))}

    def measured(part: np.ndarray) -> dict[str, float]:
        return APPLICATION.metrics(CONFIG, {k: v[part] for k, v in outputs.items()}, examples.take(part))

    found = measured(np.arange(len(examples)))
    windows = {"roc_auc", "average_precision", "accuracy", "f1"}
    assert set(found) == windows | {"event_roc_auc", "false_alarms_per_hour", "incident_f1_macro", "incident_accuracy"}
    json.dumps(found, allow_nan=False)
    assert set(measured(np.flatnonzero(examples.targets == 0))) == {"accuracy", "f1"}
    assert measured(np.zeros(0, int)) == {}


def hand_made(score: list[list[float]], truth: list[list[int]]) -> tuple[dict[str, np.ndarray], Examples]:
    """Outputs and examples of events with a window every 1.5 s."""
    event = np.concatenate([np.full(len(s), i) for i, s in enumerate(score)])
    start = np.concatenate([15 * np.arange(len(s)) for s in score])
    chance = np.concatenate([np.array(s) for s in score])
    columns = {"event_id": event, "start_row": start, "scored": np.ones(len(event), bool)}
    outputs = {"logit": np.log(chance / (1 - chance)), "incident": np.zeros((len(event), 5))}
    return outputs, Examples({}, np.concatenate([np.array(t) for t in truth]), columns)


def test_events_and_false_alarms_are_counted_as_by_hand() -> None:
    """Windows that follow each other are one alarm; a gap between them makes two."""
    score = [[0.7, 0.8, 0.1, 0.6, 0.9], [0.1, 0.1, 0.1, 0.5]]
    outputs, examples = hand_made(score, [[0, 0, 0, 0, 1], [0, 0, 0, 1]])
    found = APPLICATION.metrics(CONFIG, outputs, examples)
    quiet_hours = 7 * 1.5 / 3600
    assert found["false_alarms_per_hour"] == pytest.approx(2 / quiet_hours)  # threshold 0.5: both conflicts of two
    assert found["event_roc_auc"] == 0.75  # 0.9 > 0.8 and 0.1; 0.5 > 0.1 alone
    moved = dataclasses.replace(examples, columns={**examples.columns, "event_id": 7 - examples.columns["event_id"]})
    assert APPLICATION.metrics(CONFIG, outputs, moved) == found


def test_the_kind_of_an_event_is_told_by_all_its_windows() -> None:
    outputs, examples = hand_made([[0.9, 0.9, 0.9], [0.2, 0.9], [0.9]], [[2, 2, 2], [0, 4], [1]])
    outputs["incident"][:3] = [[2, 0, 0, 0, 0], [0, 3, 0, 0, 0], [2, 0, 0, 0, 0]]
    outputs["incident"][3:] = [9, 0, 0, 0, 0]
    found = APPLICATION.metrics(CONFIG, outputs, examples)
    assert found["incident_accuracy"] == 0.5, "a conflict of unknown kind does not count"
    assert found["incident_f1_macro"] == pytest.approx((2 / 3 + 0) / 2)
    outputs["logit"][[0, 2]] = -3.0  # hardly a conflict: the window between them is the one that tells
    assert APPLICATION.metrics(CONFIG, outputs, examples)["incident_accuracy"] == 0.0


def test_windows_between_those_of_the_protocol_are_learned_from_and_never_scored(drives: Drives) -> None:
    dense = drives.examples(APPLICATION.configure(["data.training_hop=5"]))
    plain = drives.examples(APPLICATION.configure(["data.training_hop=15"]))
    grid = dense.take(dense.columns["scored"])
    assert plain.columns["scored"].all()
    np.testing.assert_array_equal(grid.inputs["window"], plain.inputs["window"])
    np.testing.assert_array_equal(grid.targets, plain.targets)
    more = dense.take(~dense.columns["scored"])
    assert more.columns["trainable"].all()
    assert 1.5 < len(more) / partition.trainable(plain).columns["event_id"].size < 2.5
    outputs = {"logit": np.random.default_rng(0).normal(size=len(dense)), "incident": np.zeros((len(dense), 5))}
    noisy = {k: np.where(dense.columns["scored"].reshape(-1, *[1] * (v.ndim - 1)), v, 9.0) for k, v in outputs.items()}
    assert APPLICATION.metrics(CONFIG, outputs, dense) == APPLICATION.metrics(CONFIG, noisy, dense)


def test_the_kind_of_a_conflict_is_taken_as_it_is_coded(drives: Drives, examples: Examples) -> None:
    assert set(examples.targets.tolist()) <= set(range(len(pipeline.LABELS)))
    for event in drives.events:
        mine = examples.targets[(examples.columns["event_id"] == event.event_id) & (examples.targets > 0)]
        assert set(mine.tolist()) <= {pipeline.incident_label(event.facts["incident_type"])}
    assert pipeline.LABELS[pipeline.incident_label("rear-end striking")] == "rear_end_striking"
    assert pipeline.LABELS[pipeline.incident_label("animal")] == "other"
    assert pipeline.LABELS[pipeline.incident_label("")] == "conflict"


def test_a_sensor_taken_as_absent_is_left_out(drives: Drives, examples: Examples) -> None:
    found = drives.examples(APPLICATION.configure(['data.missing_sensors=["front_radar"]', "data.training_hop=15"]))
    gone = [pipeline.index(name) for name in pipeline.SENSORS["front_radar"]]
    assert np.isnan(found.inputs["window"][:, :, gone]).all()
    kept = [c for c in range(len(pipeline.NAMES)) if c not in gone]
    grid = examples.take(examples.columns["scored"])
    np.testing.assert_array_equal(found.inputs["window"][:, :, kept], grid.inputs["window"][:, :, kept])
    with pytest.raises(ConfigError, match="not a sensor"):
        APPLICATION.configure(['data.missing_sensors=["lidar"]'])


def test_the_floor_ranks_windows_and_names_kinds() -> None:
    config = APPLICATION.configure(["data.clients=16", "data.events_per_client=6"])
    examples = APPLICATION.generate(config, 0).examples(config)
    train, test = (examples.of_clients(part) for part in (examples.clients()[:12], examples.clients()[12:]))
    (outputs,) = APPLICATION.floor_function()(CONFIG, train, test, seed=0).values()  # type: ignore[misc]
    found = APPLICATION.metrics(CONFIG, outputs, test)
    assert found["roc_auc"] > 0.7
    assert "incident_f1_macro" in found
    drawn = APPLICATION.pictures_function()(config, outputs, test)  # type: ignore[misc]
    assert len(drawn) == 5
    assert all(picture.startswith(b"\x89PNG") for picture, _ in drawn)
    assert sum("vehicle-" in caption for _, caption in drawn) == 4


def test_the_loss_adds_up_over_any_split() -> None:
    cfg = APPLICATION.configure(["model.positive_weight=2.5"])
    loss = APPLICATION.loss_function()
    logits, kinds = torch.randn(10, dtype=torch.float64), torch.randn(10, 5, dtype=torch.float64)
    truth = torch.tensor([0, 1, 0, 2, 0, 4, 0, 6, 0, 1])
    whole = loss((logits, kinds), truth, cfg)
    parts = [loss((logits[i : i + 3], kinds[i : i + 3]), truth[i : i + 3], cfg) for i in range(0, 10, 3)]
    for k in range(2):
        torch.testing.assert_close(whole[k], sum(p[k] for p in parts))
    assert whole[1] == 5 + 5 * 2.5


def test_balanced_kinds_cost_what_their_shares_say() -> None:
    """Where the window tells nothing, equal logits are right for kinds judged as equally frequent."""
    shares = np.array(pipeline.INCIDENT_SHARES)
    assert shares.sum() == pytest.approx(1.0)
    loss = APPLICATION.loss_function()

    def cost(balance: float, logits: np.ndarray) -> float:
        cfg = APPLICATION.configure([f"model.incident_balance={balance}", "model.incident_weight=1.0"])
        kinds = torch.tensor(logits).expand(5, 5)
        several = [
            loss((torch.zeros(1), kinds[:1]), torch.tensor([pipeline.FIRST_INCIDENT + k]), cfg)[0] for k in range(5)
        ]
        return float(sum(s * (c - np.log(2)) for s, c in zip(shares, several, strict=True)))

    entropy = -(shares * np.log(shares)).sum()
    assert cost(1.0, np.zeros(5)) == pytest.approx(entropy, abs=1e-6)
    assert cost(0.0, np.log(shares)) == pytest.approx(entropy, abs=1e-6)
    assert cost(0.0, np.zeros(5)) == pytest.approx(np.log(5), abs=1e-6)


def test_presets_are_of_the_sizes_that_the_readme_states() -> None:
    text = (Path(data.__file__).parent / "README.md").read_text(encoding="utf-8")
    for preset in ("compact", "default", "large"):
        with torch.device("meta"):
            count = sum(p.numel() for p in APPLICATION.build_model(APPLICATION.configure(preset=preset)).parameters())
        assert f"`{preset}` {count:,}" in text, (preset, f"{count:,}")
        assert preset != "large" or count >= 100_000_000
