"""Car following in one lane, many drives at once: what the generator's scenarios unfold in.

The follower obeys the Intelligent Driver Model (Treiber, Hennecke and Helbing, Phys. Rev. E 62, 2000) on what it saw
one reaction time ago, and nothing while it looks away; the vehicle behind follows it by the same law. SI units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from applications.driver_conflict.pipeline import RATE_HZ

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
STEP_S = 1.0 / RATE_HZ
FAR_M = 1e4
STRONGEST_BRAKING = 8.5  # m/s2: dry road
JERK = 15.0  # m/s3
MAX_ACCELERATION = 1.6
CAR_LENGTH_GAP = 2.0  # m, jam distance


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What happens to E drives of T steps; (E,) constants of a driver, (E, T) events of a drive.

    new_gap, new_relative: from this step a new vehicle is ahead at that gap (m; FAR_M = none) and relative speed (m/s);
    NaN where the vehicle ahead stays. own_braking: deceleration for a reason that no radar sees (m/s2).
    """

    desired_speed: Array
    headway: Array
    reaction_steps: npt.NDArray[np.int64]
    comfortable_braking: Array
    lead_target: Array
    lead_braking: Array
    new_gap: Array
    new_relative: Array
    looking: Mask
    follower_looking: Mask
    own_braking: Array


@dataclass(frozen=True)
class Motion:
    """(E, T) each. gap and closing speed (positive = closing in) to the vehicle ahead and from the one behind."""

    speed: Array
    acceleration: Array
    gap: Array
    closing: Array
    rear_gap: Array
    rear_closing: Array


def idm(speed: Array, desired: Array, gap: Array, closing: Array, headway: Array, braking: Array) -> Array:
    """The Intelligent Driver Model's acceleration (m/s2)."""
    dynamic = speed * headway + speed * closing / (2 * np.sqrt(MAX_ACCELERATION * braking))
    wanted = CAR_LENGTH_GAP + np.maximum(0.0, dynamic)
    free = np.minimum((speed / desired) ** 4, 4.0)
    result: Array = MAX_ACCELERATION * (1 - free - (wanted / np.maximum(gap, 0.5)) ** 2)
    return result


def simulate(plan: Plan) -> Motion:
    drives, steps = plan.lead_target.shape
    rows = np.arange(drives)
    shape = (drives, steps)
    speed, acceleration, gap, closing, rear_gap, rear_closing = (np.zeros(shape) for _ in range(6))
    v = 0.9 * plan.desired_speed
    a = np.zeros(drives)
    s = np.full(drives, FAR_M)
    lead = v.copy()
    rear_v, rear_a, rear_s = v.copy(), np.zeros(drives), CAR_LENGTH_GAP + 1.3 * v
    for t in range(steps):
        fresh = ~np.isnan(plan.new_gap[:, t])
        s = np.where(fresh, plan.new_gap[:, t], s)
        lead = np.where(fresh, np.maximum(0.0, v + plan.new_relative[:, t]), lead)
        speed[:, t], acceleration[:, t], gap[:, t], closing[:, t] = v, a, s, v - lead
        rear_gap[:, t], rear_closing[:, t] = rear_s, rear_v - v
        ago = np.maximum(t - plan.reaction_steps, 0)
        command = idm(v, plan.desired_speed, gap[rows, ago], closing[rows, ago], plan.headway, plan.comfortable_braking)
        command = np.where(plan.looking[:, t], command, np.clip(a, -1.0, 0.3))
        command = np.minimum(command, np.where(plan.own_braking[:, t] > 0, -plan.own_braking[:, t], np.inf))
        a = _limited(a, command)
        rear_command = idm(rear_v, plan.desired_speed * 1.1, rear_s, rear_v - v, plan.headway, plan.comfortable_braking)
        rear_command = np.where(plan.follower_looking[:, t], rear_command, np.clip(rear_a, -1.0, 0.3))
        rear_a = _limited(rear_a, rear_command)
        lead_a = np.clip((plan.lead_target[:, t] - lead) / 1.5, -plan.lead_braking[:, t], 1.5)
        v, old_v = np.maximum(0.0, v + a * STEP_S), v
        a = np.where(v > 0, a, np.maximum(a, 0.0))
        lead, old_lead = np.maximum(0.0, lead + lead_a * STEP_S), lead
        rear_v, old_rear = np.maximum(0.0, rear_v + rear_a * STEP_S), rear_v
        s = np.where(s < FAR_M / 2, np.maximum(0.3, s + (old_lead + lead - old_v - v) * STEP_S / 2), FAR_M)
        rear_s = np.maximum(0.3, rear_s + (old_v + v - old_rear - rear_v) * STEP_S / 2)
    return Motion(speed, acceleration, gap, closing, rear_gap, rear_closing)


def _limited(a: Array, command: Array) -> Array:
    bounded = np.clip(command, -STRONGEST_BRAKING, MAX_ACCELERATION)
    return a + np.clip(bounded - a, -JERK * STEP_S, JERK * STEP_S)
