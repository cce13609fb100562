"""driver_attention's formats: views synchronised by their timestamps, frames cut to shape, what is broken refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from applications.driver_attention import APPLICATION, driver, media, pipeline
from applications.driver_attention.config import VIEWS, Config
from fl_core.contracts.errors import DataError
from tests.helpers import refusal

CONFIG: Config = APPLICATION.configure(["data.clients=4", "data.clips_per_client=24"])


def device(folder: Path, *, shift: float = 0.0, frames: int = 20) -> np.ndarray:
    """A recording of 4 s at 5 Hz: a folder of images, an animated file, an array; motion at 20 Hz. Returns the frames."""
    made = np.random.default_rng(0).integers(0, 256, (3, frames, 32, 48)).astype(np.uint8)
    (folder / "r" / "front").mkdir(parents=True)
    for i, pixels in enumerate(made[0]):
        Image.fromarray(pixels).save(folder / "r" / "front" / f"{i:04d}.png")
    pages = [Image.fromarray(p) for p in made[1]]
    pages[0].save(folder / "r" / "cabin.tif", save_all=True, append_images=pages[1:])
    np.save(folder / "r" / "side.npy", made[2])
    times = "\n".join(str(k / 5 + shift) for k in range(frames))
    (folder / "r" / "times.csv").write_text(f"time_s\n{times}\n")
    motion = "\n".join(f"{k / 20},{k},{'' if k % 2 else 0.5}" for k in range(81))
    (folder / "r" / "motion.csv").write_text(f"time_s,speed_mps,long_acc_mps2\n{motion}\n")
    (folder / "media.csv").write_text(
        "recording,view,file,timestamps,start_s,rate_hz\nr,front,r/front,r/times.csv,,\nr,cabin,r/cabin.tif,,0,5\n"
        "r,side,r/side.npy,r/times.csv,,\nr,kinematics,r/motion.csv,,,\n"
    )
    (folder / "clips.csv").write_text(
        "clip_id,recording,vehicle_id,end_s,conflict,state\na,r,7,2.8,1,drowsy\nb,r,7,3.8,,\n"
    )
    return made


def test_views_of_different_kinds_are_synchronised_by_their_timestamps(tmp_path: Path) -> None:
    made = device(tmp_path, shift=0.04)
    found = APPLICATION.read(tmp_path).examples(CONFIG)
    assert found.clients() == ("vehicle-7",)
    np.testing.assert_array_equal(found.targets, np.array([[1, 2], [np.nan, np.nan]], np.float32))
    for clip, last in enumerate((14, 19)):
        for view in range(3):
            np.testing.assert_array_equal(found.inputs["frames"][clip, view], made[view, last - 14 : last + 1])
    assert found.inputs["present"].all()
    speed = pipeline.NAMES.index("speed_mps")
    np.testing.assert_allclose(found.inputs["kinematics"][0, :, speed], np.arange(15) * 4)
    assert np.isnan(found.inputs["kinematics"][..., pipeline.NAMES.index("turn_signal")]).all()


def test_frames_that_came_at_another_time_are_missing(tmp_path: Path) -> None:
    device(tmp_path, shift=1.0)
    found = APPLICATION.read(tmp_path).examples(CONFIG)
    assert found.inputs["present"][0, 0].tolist() == [0] * 5 + [1] * 10
    assert found.inputs["present"][0, 1].all()
    assert not found.inputs["frames"][0, 0, :5].any()


@pytest.mark.parametrize(
    ("have", "expected"),
    [([0.0, 1.0, 2.0], [0, -1, 2]), ([], [-1, -1, -1]), ([1.05], [-1, 0, -1]), ([0.95, 1.02], [-1, 1, -1])],
)
def test_the_nearest_frame_in_time_is_taken_if_it_is_near(have: list[float], expected: list[int]) -> None:
    wanted = np.array([0.05, 1.0 if have != [0.0, 1.0, 2.0] else 1.5, 2.05])
    assert pipeline.nearest(wanted, np.array(have), 0.1).tolist() == expected


FAULTS = {
    "a view": ("media.csv", "r,side,", "r,roof,", "view 'roof' is not known"),
    "a file": ("media.csv", "r/side.npy", "r/none.npy", "no such file"),
    "outside": ("media.csv", "r/side.npy", "../side.npy", "not a file inside"),
    "a kind": ("media.csv", "r/cabin.tif", "r/motion.csv", "no frames are read from this kind"),
    "a video": ("media.csv", "r/cabin.tif", "r/cabin.mp4", "fieldfleet[video]"),
    "no rate": ("media.csv", "r/cabin.tif,,0,5", "r/cabin.tif,,,", "start_s and rate_hz"),
    "times": ("r/times.csv", "0.2\n", "0.0\n", "do not ascend"),
    "too few times": ("r/times.csv", "0.2\n", "", "19 timestamps for 20 frames"),
    "a word": ("r/motion.csv", "0.05,1,", "0.05,fast,", "speed_mps is 'fast'"),
    "a label": ("clips.csv", "drowsy", "asleep", "state is 'asleep'"),
    "an end": ("clips.csv", "2.8", "never", "end_s is 'never'"),
    "twice": ("clips.csv", "\nb,", "\na,", "there twice"),
    "a recording": ("clips.csv", "b,r,", "b,q,", "nothing of the recording 'q'"),
    "two vehicles": ("clips.csv", "b,r,7", "b,r,8", "is of vehicle '7'"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_broken_data_set_is_refused_by_name(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    device(tmp_path)
    (tmp_path / "r" / "cabin.mp4").write_bytes(b"no video")
    name, old, new, message = FAULTS[fault]
    text = (tmp_path / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new, 1))
    assert message in str(refusal(DataError, lambda: APPLICATION.read(tmp_path)))


def test_frames_of_a_video_are_read_by_their_numbers(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for k in range(20):
            picture = av.VideoFrame.from_ndarray(np.full((64, 96), 12 * k, np.uint8), format="gray")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    source = tmp_path / "v.mp4"
    found = media.Stream(np.arange(20) / 5, source).frames(np.array([0, 3, 19]), 32, 48)
    assert found.shape == (3, 32, 48)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), [0, 36, 228], atol=3)
    assert "ends before frame 20" in str(refusal(DataError, lambda: list(media.opened(source, np.array([20])))))
    source.write_bytes(b"no video" * 100)
    assert "v.mp4: the video does not decode" in str(
        refusal(DataError, lambda: list(media.opened(source, np.array([0]))))
    )


def test_damaged_frames_are_refused_by_name(tmp_path: Path) -> None:
    device(tmp_path)
    raw = (tmp_path / "r" / "front" / "0003.png").read_bytes()
    (tmp_path / "r" / "front" / "0003.png").write_bytes(raw[: len(raw) // 2])
    assert "0003.png" in str(refusal(DataError, lambda: APPLICATION.read(tmp_path).examples(CONFIG)))
    np.save(tmp_path / "r" / "side.npy", np.zeros((20, 32, 48), np.float32))
    assert "side.npy: is float32" in str(refusal(DataError, lambda: APPLICATION.read(tmp_path)))


def test_frames_of_another_size_are_cut_to_shape_and_resampled() -> None:
    wide = np.zeros((64, 200, 3), np.uint8)
    wide[:, 100:] = 255
    found = media.fitted(wide, 32, 48)
    assert found.shape == (32, 48)
    assert found[:, :24].max() == 0
    assert found[:, 24:].min() == 255


def cabin_folder(folder: Path) -> None:
    (folder / "images").mkdir()
    lines = ["file,label,frame,block"]
    for frame in range(60):
        name = f"images/{frame:04d}.jpg"
        Image.new("RGB", (96, 96), (frame * 4, 0, 0)).save(folder / name)
        lines.append(f"{name},{'drowsy' if 25 <= frame < 40 else 'awake'},{frame},{frame // 20}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


def test_one_camera_on_the_driver_is_a_data_set_of_states(tmp_path: Path) -> None:
    cabin_folder(tmp_path)
    found = APPLICATION.read(tmp_path).examples(CONFIG)
    assert found.clients() == ("vehicle-block-0", "vehicle-block-1", "vehicle-block-2")
    assert np.isnan(found.targets[:, 0]).all()
    assert {driver.ATTENTIVE, driver.DROWSY} <= set(found.targets[:, 1][~np.isnan(found.targets[:, 1])].tolist())
    assert np.isnan(found.targets[:, 1]).any(), "where the labels of the last frames do not agree"
    present = found.inputs["present"]
    assert present[:, VIEWS.index("cabin")].any(axis=1).all()
    assert not present[:, VIEWS.index("front")].any()
    assert np.isnan(found.inputs["kinematics"]).all()
    metrics = APPLICATION.metrics(CONFIG, {"conflict": np.zeros(len(found)), "state": np.zeros((len(found), 3))}, found)
    assert set(metrics) == {"state_f1_macro", "state_accuracy"}
    text = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(text.replace("awake,3,", "nodding,3,"))
    assert "label 'nodding'" in str(refusal(DataError, lambda: APPLICATION.read(tmp_path)))
