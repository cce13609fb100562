"""Every error that a user may see, and the exit code of each.

    FieldfleetError                  (never raised itself)
    ├── GoalMissed             1     a goal or check was missed
    ├── InputError             2     wrong input: an argument, a file, a key, a value
    │   ├── ConfigError        2     a preset or an override
    │   ├── DataError          2     a data set
    │   └── IntegrityError     2     a file whose hash, size or signature does not fit its manifest
    ├── EnvironmentFault       3     a package, a port, a clock, a certificate, a disk
    ├── RefusedError           4     a peer refused us or could not be reached
    └── Interrupted          130     the work was told to stop; what is done is kept

A message names the file, the key or the device; the remedy says what to do next.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command. 0 done, 130 interrupted by the user."""

    DONE = 0
    GOAL_MISSED = 1
    WRONG_INPUT = 2
    ENVIRONMENT = 3
    REFUSED = 4
    INTERRUPTED = 130


class FieldfleetError(Exception):
    """Base of all errors shown to the user without a traceback."""

    exit_code: ExitCode = ExitCode.WRONG_INPUT

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message


class GoalMissed(FieldfleetError):
    exit_code = ExitCode.GOAL_MISSED


class InputError(FieldfleetError):
    exit_code = ExitCode.WRONG_INPUT


class ConfigError(InputError):
    pass


class DataError(InputError):
    pass


class IntegrityError(InputError):
    pass


class EnvironmentFault(FieldfleetError):
    exit_code = ExitCode.ENVIRONMENT


class RefusedError(FieldfleetError):
    exit_code = ExitCode.REFUSED


class Interrupted(FieldfleetError):
    exit_code = ExitCode.INTERRUPTED


def unknown_name(kind: str, name: str, known: list[str]) -> InputError:
    """The one way in which a wrong name is refused: with the list of the known ones."""
    return InputError(f"unknown {kind} {name!r}", remedy=f"known: {', '.join(sorted(known)) or 'none'}")
