"""Traffic around one vehicle, many moments at once: what happens, what the driver sees of it, and how both end. SI units.

Nothing here knows a label. A moment's events and the driver's eyes are drawn independently; the driver brakes and steers by
what he saw one reaction time ago (Intelligent Driver Model: Treiber, Hennecke and Helbing, Phys. Rev. E 62, 2000), and a
conflict is what then is measured: too little time to a collision (Hayward 1972), to a vehicle beside, or the lane left.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from applications.driver_attention.driver import DROWSY, STEP_S, Eyes

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
LANE, WIDTH, LENGTH = 3.6, 1.8, 4.5  # m
FAR = 1e4  # m: nobody is there
STRONGEST = 8.0  # m/s2
JERK = 18.0  # m/s3
EVENTS = {"none": 0.12, "lead brakes": 0.2, "cut-in": 0.18, "drift": 0.14, "lane change": 0.36}
CLOSE_TTC, SAFE_TTC = 1.5, 2.6  # s: a conflict at the first, ordinary traffic from the second on
CLOSE_SIDE, SAFE_SIDE = 1.2, 2.6  # s to the side of another vehicle
TOUCHING, CLEAR = 0.35, 0.75  # m beside another vehicle
OUT, WITHIN = 0.95, 0.6  # m from the lane's middle, not meaning to leave it
MIRROR_STEPS = 25
AGILITY = 1.2  # m/s2 sideways
SLOWEST = 2.0  # m/s of closing speed that counts: creeping up to a queue is no conflict


@dataclass(frozen=True, kw_only=True)
class Script:
    """(n,) each: what is to happen at step ``at``, and the driver's habits."""

    event: npt.NDArray[np.int64]  # of EVENTS
    at: npt.NDArray[np.int64]
    speed: Array
    headway: Array
    reaction: npt.NDArray[np.int64]  # steps
    curvature: Array
    lead: Mask  # whether somebody drives ahead at first
    lead_braking: Array
    lead_slows_to: Array  # share of its speed
    push: Array  # m/s: how fast the road or the wind carries the vehicle aside, left positive
    beside: Mask  # somebody is in the left lane near by
    beside_x: Array  # m ahead of our middle when the event begins
    beside_speed: Array  # m/s faster than we are, before the event
    cuts_to: Array  # m/s faster than we are, from the event on
    cut_speed: Array  # m/s aside
    signals: Mask
    checks: Mask  # looks into the mirror before a lane change
    slows: Array  # m/s2: brakes for a reason of his own, 0 = does not
    slows_at: npt.NDArray[np.int64]
    place: Array  # m from the lane's middle where he likes to drive


@dataclass(frozen=True, kw_only=True)
class Scene:
    """(n, S) each. y: of us from our lane's middle, left positive; heading: rad; lead_gap, beside_x: m ahead of our middle to
    theirs, FAR = nobody; beside_y: like y; severity: 0 nothing to 1 conflict and more."""

    speed: Array
    acceleration: Array
    y: Array
    side_speed: Array
    heading: Array
    curvature: Array
    travelled: Array
    lead_gap: Array
    lead_brakes: Mask
    beside_x: Array
    beside_y: Array
    signal: Array
    severity: Array

    def take(self, rows: npt.NDArray[np.int64], steps: npt.NDArray[np.int64]) -> Scene:
        """rows: (m,), steps: (m, T) -> the same with (m, T)."""
        return replace(self, **{f.name: getattr(self, f.name)[rows[:, None], steps] for f in fields(self)})


def draw(rng: np.random.Generator, count: int, warm_up: int) -> Script:
    """``count`` moments of one driver."""
    event = rng.choice(len(EVENTS), size=count, p=list(EVENTS.values()))
    names = np.array(list(EVENTS))[event]
    speed = rng.choice([8.0, 13.0, 20.0, 28.0], size=count) * rng.uniform(0.8, 1.15, count)
    cut, change = names == "cut-in", names == "lane change"
    beside = np.where(change, rng.random(count) < 0.8, cut | (rng.random(count) < 0.5))
    tight = rng.random(count) < 0.6
    where = np.where(tight, rng.uniform(4.5, 9.0, count), rng.uniform(10.0, 30.0, count))
    near = np.where(change, rng.uniform(-3.5, 3.5, count), rng.uniform(-25.0, 25.0, count))
    habit = rng.uniform(0.6, 1.6)
    return Script(
        event=event,
        at=warm_up + rng.integers(0, 20, count),
        speed=speed,
        headway=np.clip(habit * rng.uniform(0.7, 1.3, count), 0.45, 2.0),
        reaction=rng.integers(4, 9, count),
        curvature=np.where(rng.random(count) < 0.6, rng.normal(0, 1, count) * 1.2 / np.maximum(speed, 12.0) ** 2, 0.0),
        lead=(names == "lead brakes") | (rng.random(count) < 0.6),
        lead_braking=np.where(rng.random(count) < 0.3, rng.uniform(1.0, 2.5, count), rng.uniform(3.5, 7.5, count)),
        lead_slows_to=rng.uniform(0.0, 0.5, count),
        push=np.where(names == "drift", rng.choice([-1, 1], size=count) * rng.uniform(0.4, 0.9, count), 0.0),
        beside=beside,
        beside_x=np.where(cut, where, near),
        beside_speed=np.where(cut, rng.uniform(1.5, 6.0, count), np.where(change, rng.uniform(-0.6, 0.6, count), rng.uniform(-4.0, 6.0, count))),
        cuts_to=np.where(tight, -rng.uniform(3.0, 8.0, count), rng.uniform(-1.0, 3.0, count)),
        cut_speed=rng.uniform(1.1, 2.0, count),
        signals=rng.random(count) < 0.85,
        checks=rng.random(count) < 0.5,
        slows=np.where(rng.random(count) < 0.35, rng.uniform(1.0, 4.0, count), 0.0),
        slows_at=warm_up + rng.integers(-25, 40, count),
        place=rng.normal(0, 0.15) + rng.normal(0, 0.1, count),
    )  # fmt: skip


def is_event(script: Script, name: str) -> Mask:
    return np.asarray(script.event == list(EVENTS).index(name))


def idm(speed: Array, desired: Array, gap: Array, closing: Array, headway: Array) -> Array:
    """The Intelligent Driver Model's acceleration (m/s2) with 1.6 m/s2 at most and comfortable braking of 2.2 m/s2."""
    wanted = 2.0 + np.maximum(0.0, speed * headway + speed * closing / (2 * np.sqrt(1.6 * 2.2)))
    result: Array = 1.6 * (1 - np.minimum((speed / desired) ** 4, 4.0) - (wanted / np.maximum(gap, 0.5)) ** 2)
    return result


@dataclass
class World:
    """(n,) each, at one instant; as in ``Scene``."""

    speed: Array
    acceleration: Array
    y: Array
    side_speed: Array
    travelled: Array
    lead_gap: Array
    lead_speed: Array
    beside_x: Array
    beside_y: Array
    beside_speed: Array

    @classmethod
    def at_first(cls, script: Script, rng: np.random.Generator) -> Self:
        n, speed = len(script.at), script.speed
        ahead = script.beside_x - script.beside_speed * script.at * STEP_S
        return cls(
            speed=speed.copy(), acceleration=np.zeros(n), y=script.place + rng.normal(0, 0.08, n), side_speed=np.zeros(n),
            travelled=np.zeros(n), lead_gap=np.where(script.lead, LENGTH + 2.0 + script.headway * speed, FAR),
            lead_speed=speed.copy(), beside_x=np.where(script.beside, ahead, FAR), beside_y=LANE + rng.normal(0, 0.1, n),
            beside_speed=speed + script.beside_speed,
        )  # fmt: skip

    def ahead(self) -> tuple[Array, Array]:
        """(gap, closing speed) to whoever drives in front of us; FAR and 0 where nobody does."""
        joined = (np.abs(self.beside_y - self.y) < WIDTH) & (self.beside_x > 0) & (self.beside_x < FAR / 2)
        behind = (self.lead_gap < FAR / 2) & (np.abs(self.y) < WIDTH)
        gap = np.minimum(np.where(behind, self.lead_gap - LENGTH, FAR), np.where(joined, self.beside_x - LENGTH, FAR))
        who = np.where(joined & (self.beside_x < self.lead_gap), self.beside_speed, self.lead_speed)
        return gap, np.where(gap < FAR / 2, self.speed - who, 0.0)

    def move(
        self, acceleration: Array, side_speed: Array, lead_speed: Array, beside_speed: Array, moves: Array
    ) -> None:
        """One step on; ``moves``: the speed of the vehicle beside to the left."""
        self.acceleration, self.side_speed = acceleration, side_speed
        self.lead_speed, self.beside_speed = lead_speed, beside_speed
        self.beside_y = np.maximum(0.0, self.beside_y + moves * STEP_S)
        self.speed, before = np.maximum(0.0, self.speed + acceleration * STEP_S), self.speed
        self.y = self.y + side_speed * STEP_S
        self.travelled = self.travelled + (self.speed + before) / 2 * STEP_S
        nearer = np.maximum(LENGTH + 0.2, self.lead_gap + (lead_speed - self.speed) * STEP_S)
        self.lead_gap = np.where(self.lead_gap < FAR / 2, nearer, FAR)
        drifting = self.beside_x + (beside_speed - self.speed) * STEP_S
        self.beside_x = np.where(self.beside_x < FAR / 2, drifting, FAR)


def simulate(script: Script, eyes: Eyes, kind: npt.NDArray[np.int64], steps: int, rng: np.random.Generator) -> Scene:
    """``kind``: of the driver's state, which lengthens reactions; ``rng``: of how steadily he steers."""
    n = len(script.at)
    rows = np.arange(n)
    made = {f.name: np.zeros((n, steps)) for f in fields(Scene)}
    sees = eyes.on_road
    reaction = script.reaction + np.where(kind == DROWSY, 4, 0)
    cut, change = is_event(script, "cut-in"), is_event(script, "lane change")
    slowing = is_event(script, "lead brakes")
    checked = eyes.mirror_seen(script.at, MIRROR_STEPS)
    goes = change & ~(checked & script.beside)  # who sees a vehicle beside stays
    now = World.at_first(script, rng)
    wander = np.cumsum(rng.normal(0, 0.05, (n, steps)), axis=1)
    wander -= wander.mean(axis=1, keepdims=True)
    gaps, closings = np.full((n, steps), FAR), np.zeros((n, steps))
    for t in range(steps):
        after = t >= script.at
        braking = slowing & after & (t < script.at + 35)
        moves = np.where(cut & after & (now.beside_y > 0), -script.cut_speed, 0.0)
        gaps[:, t], closings[:, t] = now.ahead()
        _note(made, t, now, script, braking, change)
        made["severity"][:, t] = severity(
            gaps[:, t], closings[:, t], now.y, now.side_speed - moves, now.beside_x, now.beside_y, goes & after
        )
        ago = np.maximum(t - reaction, 0)  # the driver acts on what he saw a reaction time ago
        saw = sees[rows, ago]
        own = (t >= script.slows_at) & (t < script.slows_at + 15) & sees[:, t]
        command = _pedals(script, now, gaps[rows, ago], closings[rows, ago], sees[:, t] & saw, own)
        acceleration = now.acceleration + np.clip(command - now.acceleration, -JERK * STEP_S, JERK * STEP_S)
        meant = np.where(goes, np.clip((t - script.at) * STEP_S / 4.0, 0, 1) * LANE, 0.0)
        steered = np.clip(0.9 * (meant + script.place - now.y), -1.3, 1.3) + 0.25 * wander[:, t]
        pushed = script.push * (after & (t < script.at + 40))
        wanted = np.where(saw | (goes & after), steered + 0.25 * pushed, 0.25 * wander[:, t] + pushed)
        side = now.side_speed + np.clip(wanted - now.side_speed, -AGILITY * STEP_S, AGILITY * STEP_S)
        now.move(acceleration, side, *_others(script, now, braking, cut & after), moves)
    return Scene(**{**made, "lead_brakes": made["lead_brakes"] > 0})  # type: ignore[arg-type]


def _note(made: dict[str, Array], t: int, now: World, script: Script, braking: Mask, change: Mask) -> None:
    """The instant into step ``t`` of the scene's arrays."""
    for name in ("speed", "acceleration", "y", "side_speed", "travelled", "lead_gap", "beside_x", "beside_y"):
        made[name][:, t] = getattr(now, name)
    made["lead_brakes"][:, t] = braking & (now.lead_speed > 0)
    made["signal"][:, t] = np.where(script.signals & change & (t >= script.at - 10), 1.0, 0.0)
    made["curvature"][:, t] = script.curvature
    made["heading"][:, t] = now.side_speed / np.maximum(now.speed, 3.0)


def _pedals(script: Script, now: World, gap: Array, closing: Array, looks: Mask, own: Mask) -> Array:
    """The acceleration that the driver wants; gap, closing: as he saw them; own: who brakes for a reason of his own."""
    command = idm(now.speed, script.speed * 1.05, gap, closing, script.headway)
    urgent = (closing > SLOWEST) & (gap < 4.0 * closing)
    needed = closing**2 / (2 * np.maximum(gap - 2.0, 0.5))
    command = np.where(urgent, np.minimum(command, -1.3 * needed), np.maximum(command, -3.5))
    command = np.where(looks, command, np.clip(now.acceleration, -0.5, 0.2))
    command = np.where(own, np.minimum(command, -script.slows), command)
    return np.clip(command, -STRONGEST, 1.6)


def _others(script: Script, now: World, braking: Mask, cutting: Mask) -> tuple[Array, Array]:
    """(speed of the vehicle ahead, of the one beside) a step later."""
    slowest = script.lead_slows_to * script.speed * braking
    lead = np.maximum(slowest, now.lead_speed - braking * script.lead_braking * STEP_S)
    change = np.clip(now.speed + script.cuts_to - now.beside_speed, -0.6, 0.3)
    adapting = cutting & (now.beside_y < LANE - 1.0)
    return lead, np.where(adapting, np.maximum(0.0, now.beside_speed + change), now.beside_speed)


def severity(
    gap: Array, closing: Array, y: Array, approach: Array, beside_x: Array, beside_y: Array, meant: Mask
) -> Array:
    """(n,): at least 1 in a conflict, 0 in ordinary traffic, in between where people would not agree.

    approach: m/s of ours to the left, towards the vehicle beside; meant: who changes lanes.
    """
    ahead = np.where(closing > SLOWEST, gap / np.maximum(closing, SLOWEST), np.inf)
    found = between(ahead, SAFE_TTC, CLOSE_TTC)
    overlap = (np.abs(beside_x) < LENGTH + 0.5) & (beside_x < FAR / 2)
    room = np.abs(beside_y - y) - WIDTH
    beside = np.where((approach > 0.15) & (room > 0), room / np.maximum(approach, 0.15), np.inf)
    found = np.maximum(found, np.where(overlap, between(beside, SAFE_SIDE, CLOSE_SIDE), 0.0))
    found = np.maximum(found, np.where(overlap, between(room, CLEAR, TOUCHING), 0.0))
    return np.maximum(found, np.where(meant, 0.0, between(np.abs(y), WITHIN, OUT)))


def between(x: Array, safe: float, bad: float) -> Array:
    """0 at ``safe``, 1 at ``bad``, linear, clipped to 0..2."""
    result: Array = np.clip((safe - np.minimum(x, 1e6)) / (safe - bad), 0.0, 2.0)
    return result
