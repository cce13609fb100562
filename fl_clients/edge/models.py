"""What the agent does with the models of its applications: update them, have them run on their data, have them served.

The agent itself never loads a model: updates and inference are in processes of their own. Policy is in ``shell`` and
``duties``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_clients.connection import open_transport
from fl_clients.edge.home import AgentHome
from fl_clients.edge.inference_process import InferenceProcess, ProcessEnded
from fl_clients.edge.relay import repository_at
from fl_clients.edge.settings import AgentSettings
from fl_clients.edge.slots import Slots
from fl_clients.edge.updater import UpdateResult, update
from fl_clients.edge.welcome import enter_or_remember, pinned_root, root_file, stored_welcome
from fl_core.contracts.errors import EnvironmentFault, FieldfleetError, InputError, unknown_name
from fl_core.identity.keys import PrivateKey

if TYPE_CHECKING:
    from fl_clients.tunnel import TunnelClient


LOG = logging.getLogger(__name__)
FATAL_LOADS = 3


class NothingPublished(EnvironmentFault):
    """The fleet has no model yet: nothing is wrong on this device."""


class Models:
    """Used by the agent's one task thread; ``current``, ``serve`` and ``tick`` from any. data: application -> folder."""

    def __init__(
        self,
        home: AgentHome,
        settings: AgentSettings,
        key: PrivateKey,
        data: Mapping[str, Path],
        tunnel: TunnelClient | None = None,
    ) -> None:
        self.home, self.settings, self.data = home, settings, data
        self._open = lambda: open_transport(home, settings, key, tunnel)
        self.names = settings.device.names
        folders = {name: home.application(name).folder for name in self.names}
        self.process = InferenceProcess(folders, settings.inference)
        self._slots = {name: Slots(folder) for name, folder in folders.items()}
        self._fatal: dict[str, tuple[tuple[str, int] | None, int]] = {}
        self._facts: dict[str, tuple[tuple[str, int] | None, dict[str, Any] | None]] = {}

    def chosen(self, application: str) -> tuple[str, ...]:
        """``application``, or all of them where it is empty. Raises InputError for one that does not run here."""
        if application and application not in self.names:
            raise unknown_name("application of this device", application, list(self.names))
        if not self.names:
            raise InputError(
                f"{self.home.settings_file}: device.applications is empty",
                remedy="name the applications whose models this device runs",
            )
        return (application,) if application else self.names

    def update(self, application: str) -> UpdateResult:
        """Fetch, verify, test and switch in a child process.

        Raises a FieldfleetError when the update is refused; the model in use then stays.
        """
        if pinned_root(self.home) is None:  # nothing had been published at the first contact
            with contextlib.closing(self._open()) as connection:
                enter_or_remember(self.home, connection)
        found = stored_welcome(self.home)
        if found is None or pinned_root(self.home) is None:
            raise NothingPublished(
                "the server has published no model yet",
                remedy="on the server: fieldfleet publish BUNDLE --repo HOME/repository",
            )
        own = self.settings.of(application)
        folder = self.home.application(application).folder
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(self._open()) as connection, repository_at(connection, found.repository) as repository:
            result = update(
                folder,
                application=application,
                repository=repository,
                root=root_file(self.home),
                channel=own.channel,
                target=own.target or None,
                ca=self.home.ca_file,
            )
        self.process.reload(application)
        return result

    def current(self, application: str) -> dict[str, Any] | None:
        """Facts of the model in use; None before the first update."""
        slots = self._slots[application]
        identity = slots.identity()
        known = self._facts.get(application)
        if known is None or known[0] != identity or known[1] is None:
            known = self._facts[application] = (identity, slots.facts())
        return known[1]

    def currents(self) -> dict[str, dict[str, Any] | None]:
        return {name: self.current(name) for name in self.names}

    def infer(self, application: str) -> dict[str, Any]:
        """Run the model on this device's data; the predictions stay here, a summary is returned.

        Raises EnvironmentFault (no model, no data, a crash) or DataError (the data are not readable). A model whose
        loading alone keeps ending the process is rolled back.
        """
        identity = self._slots[application].identity()
        try:
            self.process.load(application)
            self._fatal.pop(application, None)
        except ProcessEnded:
            self._count_fatal(application, identity)
            raise
        return self.process.infer(application, self.data[application])

    def _count_fatal(self, application: str, identity: tuple[str, int] | None) -> None:
        before = self._fatal.get(application)
        count = before[1] + 1 if before is not None and before[0] == identity else 1
        self._fatal[application] = (identity, count)
        if count >= FATAL_LOADS and identity is not None:
            LOG.error("agent: the model of %s ended the inference process %d times", application, count)
            with contextlib.suppress(FieldfleetError):  # there is no former one: it is tried again
                self._slots[application].roll_back(identity)

    def serve(self, host: str, port: int) -> int:
        """Start the gRPC service of all models; returns its port."""
        self.chosen("")
        return self.process.serve(host, port)

    def tick(self) -> None:
        self.process.tick()

    def close(self) -> None:
        self.process.close()
