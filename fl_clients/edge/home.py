"""The device's own folder: settings, key, counters. Nothing in it comes from the server but welcome.json and the slots.

agent.toml     what the owner decides          keys/          device.key, device.pub: made here, never leave
ca.pem         the server's authority          welcome.json   what the server said at the last contact (0600)
boot           how often the agent started     outbox.db      MQTT messages and jobs
fleet/         replies of the federation       data/          the device's own data, unless agent.toml says where
applications/NAME/   slots/ the model bundles, update/ the updater's work, predictions/ what the device computed
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fl_clients.edge.settings import AgentSettings, read_settings
from fl_core.contracts.errors import ConfigError, EnvironmentFault, InputError
from fl_core.storage import atomic

SETTINGS_NAME = "agent.toml"


@dataclass(frozen=True)
class ApplicationHome:
    """Paths of one application inside HOME; the updater and the slots work in ``folder``."""

    folder: Path

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions"

    @property
    def samples(self) -> Path:
        return self.folder / "samples"


@dataclass(frozen=True)
class AgentHome:
    """Paths inside HOME."""

    folder: Path

    def application(self, name: str) -> ApplicationHome:
        return ApplicationHome(self.folder / "applications" / name)

    @property
    def settings_file(self) -> Path:
        return self.folder / SETTINGS_NAME

    @property
    def key_file(self) -> Path:
        return self.folder / "keys" / "device.key"

    @property
    def public_key_file(self) -> Path:
        return self.folder / "keys" / "device.pub"

    @property
    def account_file(self) -> Path:
        return self.folder / "keys" / "broker.json"

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def welcome_file(self) -> Path:
        return self.folder / "welcome.json"

    @property
    def store_file(self) -> Path:
        return self.folder / "outbox.db"

    @property
    def fleet(self) -> Path:
        return self.folder / "fleet"

    @property
    def states(self) -> Path:
        """What federated algorithms keep on this device from round to round."""
        return self.folder / "states"

    def data_folders(self, settings: AgentSettings, options: Sequence[str] = ()) -> dict[str, Path]:
        """Application -> folder of its data; "" is the folder of a device that names no application.

        ``options``: of --data, a folder or NAME=FOLDER each; they come before agent.toml. A folder for several
        applications holds one folder for each. Raises InputError for an option that is not right.
        """
        names, found = settings.device.names or ("",), dict[str, Path]()
        common = self.folder / Path(settings.device.data).expanduser()
        for option in options:
            name, equals, rest = option.partition("=")
            named = bool(equals) and name in names
            folder = Path(rest if named else option)
            if not folder.is_dir():
                raise InputError(
                    f"--data {option}: no such folder", remedy=f"or NAME=FOLDER with one of: {', '.join(names)}"
                )
            if named:
                found[name] = folder
            else:
                common = folder
        for name in names:
            own = settings.of(name).data
            if own and not settings.samples.enabled and common == self.folder / Path(settings.device.data).expanduser():
                found.setdefault(name, self.folder / Path(own).expanduser())
            fallback = common if len(names) == 1 else common / name
            found.setdefault(
                name, self.application(name).samples if settings.samples.enabled and not options else fallback
            )
        return found

    def settings(self) -> AgentSettings:
        """Raises ConfigError naming the file and the key."""
        if not self.settings_file.is_file():
            raise ConfigError(
                f"{self.settings_file}: no such file",
                remedy=f"fieldfleet agent init {self.folder} --server URL --ca FILE",
            )
        return read_settings(self.settings_file)

    def next_boot(self) -> int:
        """Counts this start, durably. A new or unreadable counter begins at the clock, so that it still grows."""
        file = self.folder / "boot"
        try:
            last = json.loads(file.read_text(encoding="ascii"))
            if type(last) is not int or not 0 < last < 2**52:
                raise ValueError
        except (OSError, ValueError):
            last = int(time.time() * 1000)
        atomic.write_json(file, last + 1)
        return last + 1

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One agent per HOME. Raises EnvironmentFault when another one runs; the lock ends with the process."""
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise EnvironmentFault(
                    f"{self.folder}: another agent runs in this folder", remedy="stop it first, or use another HOME"
                ) from None
            yield
        finally:
            os.close(handle)
