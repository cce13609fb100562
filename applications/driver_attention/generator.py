"""Drives without data: traffic and a driver's eyes are simulated, small cameras see them, and what happens is measured.

Vehicles differ in their cameras' places, light and noise, in sensors, in driver, and some lack a camera: natural clients.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from applications.driver_attention import cameras, driver, pipeline, traffic
from applications.driver_attention.config import VIEWS, Config
from applications.driver_attention.data import Clip, Drives, Motion, Recording
from applications.driver_attention.driver import STEP_S
from applications.driver_attention.media import Stream
from fl_core.contracts.errors import ConfigError
from fl_core.learning import seeding

CANDIDATES = 2.5  # moments simulated for each clip that is kept
EPOCH_S = 100.0  # between two clips of a recording: their frames never mix
ABSENT = 0.04  # chance that a vehicle lacks a certain camera
GAP = 0.03  # chance that a camera loses frames in a clip
AFTER = 5  # steps within which a clip ends after a conflict began
LEAST_VIEWS = 2


def generate(config: Config, seed: int) -> Drives:
    """data.clients vehicles with data.clips_per_client clips each; vehicle k is the same however many there are.

    Raises ConfigError for a rate that is no whole number of the simulation's steps.
    """
    stride = 1 / (config.data.rate_hz * STEP_S)
    if abs(stride - round(stride)) > 1e-6 or stride < 1:
        raise ConfigError(
            f"data.rate_hz = {config.data.rate_hz}: generated drives move in steps of {STEP_S} s",
            remedy="10, 5, 2.5 or 2 frames a second",
        )
    recordings, clips = {}, []
    for k in range(config.data.clients):
        recording, own = vehicle(config, seed, k)
        recordings[recording.name] = recording
        clips += own
    return Drives(recordings, tuple(clips))


def vehicle(config: Config, seed: int, k: int) -> tuple[Recording, list[Clip]]:
    d = config.data
    rng = seeding.generator(seed, "driver_attention vehicle", k)
    car = cameras.Vehicle.draw(rng)
    stride = round(1 / (d.rate_hz * STEP_S))
    length = (d.frames - 1) * stride
    scene, eyes, ends, conflict = moments(rng, d.clips_per_client, length)
    rows = np.arange(len(ends))
    steps = ends[:, None] - stride * np.arange(d.frames - 1, -1, -1)
    state = driver.state(eyes, steps[:, 0], steps[:, -1])
    seen = cameras.pictures(scene, eyes, rows, steps, car, rng, d.height, d.width)
    times = EPOCH_S * (rows + 1)[:, None] + np.arange(-d.frames + 1, 1) / d.rate_hz
    name = f"{k + 1:04d}"
    views = {view: Stream(times.reshape(-1), pixels.reshape(-1, d.height, d.width)) for view, pixels in seen.items()}
    views = {view: thinned(stream, len(rows), rng) for view, stream in views.items()}
    for view in VIEWS:
        if rng.random() < ABSENT and len(views) > LEAST_VIEWS:
            del views[view]
    motion = Motion(times.reshape(-1), instruments(scene, rows, steps, rng))
    clips = [
        Clip(
            f"{name}/{i}",
            name,
            f"vehicle-{name}",
            f"{name}/{i}",
            float(times[i, -1]),
            float(conflict[i]),
            float(state[i]),
        )
        for i in range(len(rows))
    ]
    return Recording(name, views, motion), clips


def moments(
    rng: np.random.Generator, count: int, length: int
) -> tuple[traffic.Scene, driver.Eyes, npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(scene, eyes, step of each clip's end, conflict) of ``count`` moments whose outcome people would agree on.

    A clip ends just after a conflict has begun, when a driver has hardly reacted, or at any time where there is none.
    """
    kept = []
    have = 0
    while have < count:
        scene, eyes, ends, conflict, clear = simulated(rng, round(CANDIDATES * (count - have)) + 4, length)
        chosen = np.flatnonzero(clear)[: count - have]
        parts = {k: v[chosen] for k, v in vars(scene).items()}, {k: v[chosen] for k, v in vars(eyes).items()}
        kept.append((*parts, ends[chosen], conflict[chosen]))
        have += len(chosen)
    scenes = traffic.Scene(**{k: np.concatenate([part[0][k] for part in kept]) for k in kept[0][0]})
    looks = driver.Eyes(**{k: np.concatenate([part[1][k] for part in kept]) for k in kept[0][1]})
    return scenes, looks, np.concatenate([part[2] for part in kept]), np.concatenate([part[3] for part in kept])


def simulated(
    rng: np.random.Generator, count: int, length: int
) -> tuple[traffic.Scene, driver.Eyes, npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """As ``moments``, of ``count`` moments; and (count,) whether the outcome is clear."""
    warm_up = length + 5
    steps = warm_up + 20 + 45
    script = traffic.draw(rng, count, warm_up)
    kind = rng.choice(len(pipeline.STATES), size=count, p=[0.5, 0.3, 0.2])
    eyes = driver.draw(rng, kind, steps, script.at)
    for i in np.flatnonzero(traffic.is_event(script, "lane change") & script.checks & (kind == driver.ATTENTIVE)):
        driver.glance_left(eyes, int(i), int(script.at[i]) - int(rng.integers(8, 16)), int(rng.integers(5, 9)))
    scene = traffic.simulate(script, eyes, kind, steps, rng)
    begun = scene.severity >= 1
    begun[:, : length + 1] = False
    happens: npt.NDArray[np.bool_] = np.asarray(begun.any(axis=1))
    first = np.where(happens, begun.argmax(axis=1), 0)
    anywhere = script.at + rng.integers(0, 40, count)
    ends = np.clip(np.where(happens, first + rng.integers(0, AFTER + 1, count), anywhere), length, steps - 1)
    within = np.arange(steps)[None] >= (ends - length)[:, None]
    within &= np.arange(steps)[None] <= ends[:, None]
    worst = np.where(within, scene.severity, 0.0).max(axis=1)
    before = scene.severity[:, : length + 1].max(axis=1) > 0  # trouble that the event has no part in
    return scene, eyes, ends, happens, (happens | (worst == 0)) & ~before


def thinned(stream: Stream, clips: int, rng: np.random.Generator) -> Stream:
    """Without the frames that the camera lost: in some clips a stretch of them."""
    keep = np.ones((clips, len(stream.times) // clips), bool)
    for i in np.flatnonzero(rng.random(clips) < GAP):
        first = int(rng.integers(keep.shape[1]))
        keep[i, first : first + int(rng.integers(1, 5))] = False
    assert isinstance(stream.source, np.ndarray)
    flat = keep.reshape(-1)
    return Stream(stream.times[flat], stream.source[flat])


def instruments(
    scene: traffic.Scene, rows: npt.NDArray[np.int64], steps: npt.NDArray[np.int64], rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """(clips x frames, C): what the vehicle's sensors say of its motion, each with its own zero and noise."""
    at = scene.take(rows, steps)
    before = scene.take(rows, np.maximum(steps - 2, 0))
    aside = (at.side_speed - before.side_speed) / (2 * STEP_S)
    turning = at.speed * at.curvature + (at.heading - before.heading) / (2 * STEP_S)
    shape = at.speed.shape
    noise = rng.standard_normal((4, *shape))
    zero = rng.normal(0, [0.15, 0.15, 0.3])
    values = np.stack(
        [
            np.maximum(0.0, at.speed * rng.normal(1, 0.01) + 0.1 * noise[0]),
            at.acceleration + zero[0] + 0.3 * noise[1],
            at.curvature * at.speed**2 + aside + zero[1] + 0.35 * noise[2],
            np.degrees(turning) + zero[2] + 0.5 * noise[3],
            (at.acceleration < -0.8).astype(float),
            at.signal,
        ],
        axis=-1,
    )
    if rng.random() < 0.1:  # a vehicle whose pedal is not on the bus
        values[..., pipeline.NAMES.index("brake")] = np.nan
    made: npt.NDArray[np.float32] = values.reshape(-1, values.shape[-1]).astype(np.float32)
    return made
