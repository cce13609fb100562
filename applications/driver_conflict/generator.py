"""Drives without data: scenarios in a car-following simulator, seen through each vehicle's imperfect sensors.

Conflicts begin at a memoryless random time (geometric, as a constant hazard would make them), so that a window's place
in its record says nothing about its label; ordinary braking, stops, lane changes and cut-ins happen everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from applications.driver_conflict import sensors
from applications.driver_conflict.config import Config
from applications.driver_conflict.data import Drives, Event
from applications.driver_conflict.simulator import FAR_M, Plan, simulate
from fl_core.learning import seeding

WARM_UP = 150  # steps before the record begins, so that its start looks like any other moment
MEAN_WAIT = 250.0  # rows: mean time to the conflict; gives about the real share of conflict windows
LONGEST_WAIT = 900
KINDS = {  # share of each conflict, its incident_type and nature, as the 100-Car study codes them
    "lead_braking": (0.42, "rear-end striking", "a lead vehicle"),
    "cut_in": (0.14, "rear-end striking", "vehicle in adjacent lane"),
    "swerve": (0.16, "sideswipe same direction", "vehicle in adjacent lane"),
    "departure": (0.10, "road departure (left or right)", "single vehicle conflict"),
    "struck": (0.10, "rear-end struck", "a following vehicle"),
    "crossing": (0.08, "turn into path(same direction)", "vehicle turning into another vehicle path (same direction)"),
}


@dataclass
class Drive:
    """One drive's script, over WARM_UP + rows steps; ``Plan`` says what the arrays mean."""

    rng: np.random.Generator
    kind: str
    steps: int
    start: int  # first row of the coded conflict, without the warm-up
    end: int
    desired_speed: float
    lead_target: np.ndarray
    lead_braking: np.ndarray
    new_gap: np.ndarray
    new_relative: np.ndarray
    looking: np.ndarray
    follower_looking: np.ndarray
    own_braking: np.ndarray
    lateral: np.ndarray  # m/s2 of steering, beside the road's curvature
    curvature: np.ndarray  # 1/m
    signal: np.ndarray
    driver: dict[str, float] = field(default_factory=dict)

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def replace_lead(self, step: int, headway_s: float, relative: float) -> None:
        self.new_gap[step] = 3.0 + headway_s * self.desired_speed if headway_s < 10 else FAR_M
        self.new_relative[step] = relative

    def brake_lead(self, step: int, to: float, braking: float, steps: int) -> None:
        self.lead_target[step : step + steps] = to
        self.lead_braking[step : step + steps] = braking

    def steer(self, step: int, peak: float, steps: int) -> None:
        """One period of a sine, as in a lane change: out and back."""
        stop = min(step + steps, self.steps)
        self.lateral[step:stop] += peak * np.sin(2 * np.pi * np.arange(stop - step) / steps)


def _blank(rng: np.random.Generator) -> Drive:
    kind = str(rng.choice(list(KINDS), p=[share for share, _, _ in KINDS.values()]))
    start = min(int(rng.geometric(1 / MEAN_WAIT)), LONGEST_WAIT)
    length = int(np.clip(rng.lognormal(np.log(50), 0.35), 15, 160))
    rows = start + length + int(rng.integers(60, 120))
    steps = WARM_UP + rows
    speed = float(rng.choice([11.0, 17.0, 28.0], p=[0.3, 0.35, 0.35]) * rng.uniform(0.75, 1.2))
    zeros = np.zeros(steps)
    return Drive(
        rng, kind, steps, start, start + length, speed,
        lead_target=np.full(steps, speed * rng.uniform(0.75, 1.0)), lead_braking=np.full(steps, 2.0),
        new_gap=np.full(steps, np.nan), new_relative=zeros.copy(),
        looking=np.ones(steps, bool), follower_looking=np.ones(steps, bool),
        own_braking=zeros.copy(), lateral=zeros.copy(), curvature=zeros.copy(), signal=zeros.copy(),
        driver={"headway": rng.uniform(0.7, 1.8), "reaction": float(rng.integers(4, 10)), "braking": rng.uniform(1.5, 3.0)},
    )  # fmt: skip


def _moments(drive: Drive, every_s: float) -> list[int]:
    """Steps of a Poisson process with one event each ``every_s`` seconds on average."""
    count = drive.rng.poisson(drive.steps / (10 * every_s))
    return sorted(int(s) for s in drive.rng.integers(0, drive.steps - 1, count))


def _ordinary(drive: Drive) -> None:
    """What happens in any traffic: nothing here is a conflict, though some of it is brisk."""
    rng, v = drive.rng, drive.desired_speed
    drive.replace_lead(0, drive.between(1.0, 2.5) if rng.random() < 0.7 else 99, 0.0)
    for step in _moments(drive, 18):
        brisk = rng.random() < 0.15
        to = 0.0 if rng.random() < 0.3 else v * drive.between(0.3, 0.8)
        drive.brake_lead(
            step, to, drive.between(2.5, 4.5) if brisk else drive.between(1.2, 3.0), int(rng.integers(25, 90))
        )
    for step in _moments(drive, 45):
        drive.replace_lead(step, drive.between(0.7, 2.2) if rng.random() < 0.75 else 99, drive.between(-3.0, 2.0))
    for step in _moments(drive, 35):
        drive.steer(step, rng.choice([-1, 1]) * drive.between(0.6, 1.8), int(rng.integers(35, 60)))
        if rng.random() < 0.8:
            drive.signal[max(0, step - 15) : step + 35] = rng.integers(1, 3)
    for step in _moments(drive, 25):
        length = int(rng.integers(20, 100))
        sharp = 2.5 / max(v, 8.0) ** 2
        drive.curvature[step : step + length] += rng.choice([-1, 1]) * drive.between(0.1, 1.0) * sharp
    for step in _moments(drive, 60):
        drive.own_braking[step : step + int(rng.integers(10, 40))] = drive.between(1.0, 3.0)
    for step in _moments(drive, 20):
        drive.looking[step : step + int(rng.integers(5, 20))] = False


def _lead_braking(drive: Drive, c: int) -> None:
    drive.replace_lead(max(0, c - 40), drive.between(0.6, 1.4), drive.between(-1.0, 0.5))
    drive.brake_lead(
        c, drive.desired_speed * drive.between(0.0, 0.4), drive.between(3.5, 7.0), int(drive.between(25, 50))
    )
    drive.looking[c : c + int(drive.between(6, 18))] = False


def _cut_in(drive: Drive, c: int) -> None:
    step = c + int(drive.between(1, 7))
    drive.replace_lead(step, drive.between(0.05, 0.45), -drive.between(2.0, 7.0))
    drive.brake_lead(step, drive.desired_speed * 0.6, 2.5, 40)
    if drive.rng.random() < 0.4:
        drive.steer(step + 6, drive.rng.choice([-1, 1]) * drive.between(1.5, 3.5), int(drive.between(15, 30)))


def _swerve(drive: Drive, c: int) -> None:
    step = c + int(drive.between(2, 10))
    drive.steer(step, drive.rng.choice([-1, 1]) * drive.between(2.2, 5.0), int(drive.between(14, 30)))
    if drive.rng.random() < 0.6:
        drive.own_braking[step : step + int(drive.between(6, 18))] = drive.between(2.5, 6.0)


def _departure(drive: Drive, c: int) -> None:
    side = drive.rng.choice([-1, 1])
    drive.looking[max(0, c - 10) : c + 20] = False
    drive.lateral[c : c + 12] += side * drive.between(0.3, 0.8)
    drive.steer(c + int(drive.between(8, 18)), -side * drive.between(2.0, 5.0), int(drive.between(16, 30)))


def _struck(drive: Drive, c: int) -> None:
    step = c + int(drive.between(0, 10))
    drive.own_braking[step : step + int(drive.between(12, 30))] = drive.between(3.0, 6.0)
    drive.follower_looking[max(0, c - 5) : step + int(drive.between(12, 24))] = False


def _crossing(drive: Drive, c: int) -> None:
    step = c + int(drive.between(2, 8))
    drive.own_braking[step : step + int(drive.between(10, 25))] = drive.between(4.0, 8.0)


SCRIPTS = {
    "lead_braking": _lead_braking,
    "cut_in": _cut_in,
    "swerve": _swerve,
    "departure": _departure,
    "struck": _struck,
    "crossing": _crossing,
}


def _draw(rng: np.random.Generator) -> Drive:
    drive = _blank(rng)
    _ordinary(drive)
    SCRIPTS[drive.kind](drive, WARM_UP + drive.start)
    return drive


def _padded(arrays: list[np.ndarray], steps: int) -> np.ndarray:
    return np.stack([np.concatenate([a, np.repeat(a[-1:], steps - len(a))]) for a in arrays])


def _plan(drives: list[Drive]) -> Plan:
    steps = max(d.steps for d in drives)
    scripts = {
        name: _padded([getattr(d, name) for d in drives], steps)
        for name in (
            "lead_target", "lead_braking", "new_gap", "new_relative", "looking", "follower_looking", "own_braking",
        )
    }  # fmt: skip
    constants = {key: np.array([d.driver[key] for d in drives], float) for key in ("headway", "reaction", "braking")}
    return Plan(
        desired_speed=np.array([d.desired_speed for d in drives]),
        headway=constants["headway"],
        reaction_steps=constants["reaction"].astype(np.int64),
        comfortable_braking=constants["braking"],
        **scripts,
    )


def generate(config: Config, seed: int) -> Drives:
    """data.clients vehicles with about data.events_per_client drives each; vehicle k is the same however many there are."""
    drives: list[Drive] = []
    owner: list[int] = []
    kits = []
    for k in range(config.data.clients):
        rng = seeding.generator(seed, "driver_conflict vehicle", k)
        kits.append(sensors.SensorKit.draw(rng))
        for _ in range(1 + rng.poisson(config.data.events_per_client - 1)):
            drives.append(_draw(rng))
            owner.append(k)
    motion = simulate(_plan(drives))
    events = []
    counts: dict[int, int] = {}
    for i, (drive, k) in enumerate(zip(drives, owner, strict=True)):
        counts[k] = counts.get(k, 0) + 1
        record = slice(WARM_UP, drive.steps)
        reading = sensors.read_out(kits[k], motion, i, record, drive.lateral, drive.curvature, drive.signal, drive.rng)
        events.append(_event(drive, k, counts[k], reading))
    return Drives(sensors.ALL_CHANNELS, tuple(events))


def _event(drive: Drive, vehicle: int, number: int, reading: sensors.Reading) -> Event:
    rows = drive.steps - WARM_UP
    event_id = (vehicle + 1) * 1000 + number
    jitter = drive.rng.integers(-4, 5, 2)  # two coders seldom agree on the row
    start = int(np.clip(drive.start + jitter[0], 0, rows))
    end = int(np.clip(drive.end + jitter[1], start, rows))
    _, incident, nature = KINDS[drive.kind]
    facts = {
        "event_id": str(event_id), "vehicle_id": f"{vehicle + 1:04d}", "subject_id": str(vehicle + 1),
        "severity": "near_crash", "nature": nature, "incident_type": incident, "n_rows": str(rows),
        "event_start_row": str(start), "event_end_row": str(end),
        "speed_ok": str(int(reading.speed_ok)), "accel_ok": str(int(reading.accel_ok)), "row0": "0",
    }  # fmt: skip
    return Event(event_id, f"vehicle-{facts['vehicle_id']}", reading.rows, facts)
