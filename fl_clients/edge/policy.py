"""When this device trains: the owner's rules against the device's condition. No I/O, no clock of its own."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

from fl_core.contracts import config
from fl_core.contracts.device_state import DeviceState

DAY_S = 86_400.0
# What made the device wait must be better by this before it goes on, else it stops and starts at the threshold.
BATTERY_MARGIN, TEMPERATURE_MARGIN = 0.03, 3.0
_HOURS = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """``[policy]`` of agent.toml. What is asked for must be known: without a sensor, a rule for it means no training."""

    train_min_battery: float = config.number(0.0, low=0.0, high=1.0, help="from 0 to 1, charging or not; 0 = any")
    train_require_charging: bool = config.flag(False)
    train_max_temperature_c: float = config.number(0.0, low=0.0, high=150.0, help="0 = no bound")
    train_on_metered: bool = config.flag(True)
    quiet_hours: str = config.text("", help='no training then, local time: "22:00-06:00"')
    max_train_s_per_day: float = config.number(0.0, low=0.0, high=DAY_S, help="0 = no bound")
    wait_s: float = config.number(
        60.0, low=0.0, high=DAY_S, help="a message that may not be trained now waits so long, then it is refused"
    )
    pause_s: float = config.number(
        300.0, low=0.0, high=DAY_S, help="training that was paused waits so long to go on, then it is given up"
    )
    worker_memory_mb: int = config.number(
        0, low=0, high=2**24, help="data memory of the training process (RLIMIT_DATA); 0 = no bound"
    )
    worker_nice: int = config.number(5, low=0, high=19, help="how far training stands behind other programs")

    @property
    def restricts(self) -> bool:
        """Whether there is any rule."""
        return bool(
            self.train_min_battery
            or self.train_require_charging
            or self.train_max_temperature_c
            or not self.train_on_metered
            or self.quiet_hours
            or self.max_train_s_per_day
        )

    def __post_init__(self) -> None:
        if self.quiet_hours and _HOURS.fullmatch(self.quiet_hours) is None:
            raise ValueError(f'quiet_hours = {self.quiet_hours!r} is not accepted; write "22:00-06:00"')


@dataclass(frozen=True)
class Decision:
    """reason: why nothing is trained now, "" = training is allowed. lasts_s: it stays so at least that long."""

    reason: str = ""
    lasts_s: float = 0.0

    @property
    def allowed(self) -> bool:
        return not self.reason


def decide(
    settings: PolicySettings,
    state: DeviceState,
    now: datetime.datetime,
    trained_s: float,
    *,
    waiting: bool = False,
) -> Decision:
    """now: local time. trained_s: seconds of training since midnight. waiting: the last decision was to wait."""
    return (
        _time(settings, now)
        or _budget(settings, now, trained_s)
        or _power(settings, state, waiting)
        or _heat(settings, state, waiting)
        or _network(settings, state)
        or Decision()
    )


def _time(settings: PolicySettings, now: datetime.datetime) -> Decision | None:
    left = quiet_left(settings.quiet_hours, now)
    end = settings.quiet_hours.partition("-")[2]
    return Decision(f"quiet hours until {end}", left) if left > 0 else None


def _budget(settings: PolicySettings, now: datetime.datetime, trained_s: float) -> Decision | None:
    most = settings.max_train_s_per_day
    if not most or trained_s < most:
        return None
    return Decision(f"trained {trained_s:.0f} s today, {most:.0f} s are allowed", DAY_S - _seconds_of_day(now))


def _power(settings: PolicySettings, state: DeviceState, waiting: bool) -> Decision | None:
    if settings.train_require_charging and state.charging is not True:
        return Decision("not charging" if state.charging is False else "charging is not known")
    least = settings.train_min_battery
    if least:
        if state.battery_level is None and state.charging:  # mains power, no battery
            return None
        if state.battery_level is None:
            return Decision("the battery's charge is not known")
        if state.battery_level < min(1.0, least + (BATTERY_MARGIN if waiting else 0.0)):
            return Decision(f"battery {state.battery_level:.2f}, {least:.2f} needed")
    return None


def _heat(settings: PolicySettings, state: DeviceState, waiting: bool) -> Decision | None:
    most = settings.train_max_temperature_c
    if not most:
        return None
    if state.temperature_c is None:
        return Decision("the temperature is not known")
    if state.temperature_c > most - (TEMPERATURE_MARGIN if waiting else 0.0):
        return Decision(f"{state.temperature_c:.0f} C, {most:.0f} C allowed")
    return None


def _network(settings: PolicySettings, state: DeviceState) -> Decision | None:
    if settings.train_on_metered or state.metered is False:
        return None
    return Decision("metered network" if state.metered else "whether the network is metered is not known")


def quiet_left(hours: str, now: datetime.datetime) -> float:
    """Seconds until the quiet hours end; 0 outside of them. Equal ends mean the whole day."""
    found = _HOURS.fullmatch(hours)
    if found is None:
        return 0.0
    first_h, first_m, last_h, last_m = (int(part) for part in found.groups())
    first, last, clock = first_h * 3600 + first_m * 60, last_h * 3600 + last_m * 60, _seconds_of_day(now)
    length = (last - first) % DAY_S or DAY_S
    since = (clock - first) % DAY_S
    return length - since if since < length else 0.0


def _seconds_of_day(now: datetime.datetime) -> float:
    return now.hour * 3600 + now.minute * 60 + now.second + now.microsecond / 1e6
