"""Updates of the model in a short-lived process of its own, so that the agent never holds the TUF client's memory.

``python -m fl_clients.edge.updater --home HOME ...`` prints one line of JSON and ends with an exit code of the house.
``update`` starts that process and reads its answer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fl_core.contracts.errors import (
    EnvironmentFault,
    ExitCode,
    FieldfleetError,
    GoalMissed,
    IntegrityError,
    RefusedError,
)
from fl_core.delivery.names import DEFAULT_CHANNEL
from fl_core.runtime.machine import local_target

ANSWER_LIMIT = 1 << 20
DEFAULT_TIMEOUT_S = 3600.0
GRACE_S = 10.0
ERRORS: Mapping[int, type[FieldfleetError]] = {
    ExitCode.GOAL_MISSED: GoalMissed,
    ExitCode.WRONG_INPUT: IntegrityError,
    ExitCode.ENVIRONMENT: EnvironmentFault,
    ExitCode.REFUSED: RefusedError,
}


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """status: "installed", "up-to-date" or "rejected" (the offered version failed here before).

    version: in use now; previous: in use before; facts: everything that the updater said.
    """

    status: str
    version: int | None
    previous: int | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return self.status == "installed"


def update(
    home: Path,
    *,
    application: str,
    repository: str,
    root: Path,
    channel: str = DEFAULT_CHANNEL,
    target: str | None = None,
    ca: Path | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> UpdateResult:
    """Fetch, verify, self-test and switch to the channel's version, in a child process.

    ``repository``: https://HOST/PATH (``ca``: its authority) or a folder; ``root``: the first root metadata, from the
    operator; ``target``: the edge target, this machine's by default. Raises a FieldfleetError when it is refused: the
    model in use then stays.
    """
    command = [sys.executable, "-m", "fl_clients.edge.updater", "--home", str(home), "--application", application]
    command += ["--channel", channel, "--target", target or local_target(), "--repository", repository]
    command += ["--root", str(root), "--timeout", str(timeout_s), *(["--ca", str(ca)] if ca else [])]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s + GRACE_S, check=False)
    except subprocess.TimeoutExpired:
        raise RefusedError(
            f"{repository}: the update took longer than {timeout_s:.0f} s", remedy="it goes on where it stopped"
        ) from None
    return read_answer(done.returncode, done.stdout, done.stderr)


def read_answer(code: int, stdout: bytes, stderr: bytes) -> UpdateResult:
    """The child's last line. Raises the error that it names, or EnvironmentFault when it broke off."""
    lines = stdout[-ANSWER_LIMIT:].decode("utf-8", "replace").strip().splitlines()
    try:
        table = json.loads(lines[-1]) if lines else None
    except ValueError:
        table = None
    if not isinstance(table, dict):
        last = stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
        raise EnvironmentFault(f"the updater broke off with code {code}: {last[0][:300]}")
    if code != ExitCode.DONE:
        raise ERRORS.get(code, EnvironmentFault)(str(table.get("error", "")), remedy=str(table.get("remedy", "")))
    return UpdateResult(
        status=str(table.get("status")), version=table.get("version"), previous=table.get("previous"), facts=table
    )


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m fl_clients.edge.updater", description="Update this device's model."
    )
    result.add_argument("--home", type=Path, required=True, help="the agent's folder")
    result.add_argument("--application", required=True)
    result.add_argument("--channel", default=DEFAULT_CHANNEL)
    result.add_argument("--target", default=local_target(), help="edge target (default: this machine's)")
    result.add_argument("--repository", required=True, help="https://HOST/PATH, or a folder")
    result.add_argument("--root", type=Path, required=True, help="the repository's first root metadata")
    result.add_argument("--ca", type=Path, help="authority of the https repository (default: the system's)")
    result.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S, help="seconds for the whole update")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    os.nice(5)  # inference goes first
    try:
        # tuf is imported here only: the agent, which imports this module for ``update``, never holds it.
        from fl_clients.edge.installation import Request, run_update

        answer = run_update(
            Request(
                home=args.home,
                application=args.application,
                channel=args.channel,
                target=args.target,
                repository=args.repository,
                root=args.root,
                ca=args.ca,
                deadline=time.monotonic() + args.timeout,
            )
        )
        code = int(ExitCode.DONE)
    except FieldfleetError as error:
        answer = {"status": "refused", "error": error.message, "remedy": error.remedy}
        code = int(error.exit_code)
    except ModuleNotFoundError as error:
        answer = {
            "status": "refused",
            "error": f"the package {error.name!r} is missing",
            "remedy": "pip install 'fieldfleet[edge]'",
        }
        code = int(ExitCode.ENVIRONMENT)
    except OSError as error:
        answer = {"status": "refused", "error": str(error), "remedy": "check the disk and its permissions"}
        code = int(ExitCode.ENVIRONMENT)
    print(json.dumps(answer, sort_keys=True), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
