"""What the agent does with models: update them, run them on its own data, serve them. Policy is in ``shell`` and ``duties``."""

from __future__ import annotations

import csv
import datetime
import io
import statistics
import time
from pathlib import Path
from typing import Any

from fl_clients.connection import open_transport
from fl_clients.edge.inference import InferenceEngine, Loaded
from fl_clients.edge.settings import AgentHome, AgentSettings
from fl_clients.edge.summary import summarize
from fl_clients.edge.updater import update
from fl_clients.edge.welcome import enter_or_remember, pinned_root, root_file, stored_welcome
from fl_core.contracts.errors import EnvironmentFault, InputError
from fl_core.identity.keys import PrivateKey
from fl_core.learning.examples import RawData
from fl_core.storage import atomic

KEEP_PREDICTIONS = 10
LATENCY_RUNS = 25
PRIVATE_COLUMNS = ("group",)


class NothingPublished(EnvironmentFault):
    """The fleet has no model yet: nothing is wrong on this device."""


class Models:
    """Used by the agent's one task thread; ``current`` and ``serve`` from any."""

    def __init__(self, home: AgentHome, settings: AgentSettings, key: PrivateKey, data: Path) -> None:
        self.home, self.settings, self.key, self.data = home, settings, key, data
        self.engine = InferenceEngine(home.folder, settings.device.application)
        self._server: Any = None

    def update(self) -> bool:
        """Fetch, verify, test and switch in a child process; True when another model is in use now.

        Raises a FieldfleetError when the update is refused; the model in use then stays.
        """
        if not self.settings.device.application:
            raise InputError(
                f"{self.home.settings_file}: device.application is empty",
                remedy="name the application whose model this device runs",
            )
        if pinned_root(self.home) is None:  # nothing had been published at the first contact
            connection = open_transport(self.home, self.settings, self.key)
            try:
                enter_or_remember(self.home, connection)
            finally:
                connection.close()
        found = stored_welcome(self.home)
        if found is None or pinned_root(self.home) is None:
            raise NothingPublished(
                "the server has published no model yet",
                remedy="on the server: fieldfleet publish BUNDLE --repo HOME/repository",
            )
        result = update(
            self.home.folder,
            application=self.settings.device.application,
            repository=self.settings.server.url.rstrip("/") + found.repository,
            root=root_file(self.home),
            channel=self.settings.device.channel,
            ca=self.home.ca_file,
        )
        self.engine.reload()
        return result.changed

    def current(self) -> dict[str, Any] | None:
        """Facts of the model in memory; None before the first update."""
        loaded = self.engine.loaded
        return loaded.facts() if loaded is not None else None

    def infer(self) -> dict[str, Any]:
        """Run the model on this device's data; the predictions stay here, a summary is returned.

        Raises EnvironmentFault (no model, no data) or DataError (the data are not readable).
        """
        model = self.engine.model()
        if not self.data.is_dir():
            raise EnvironmentFault(
                f"{self.data}: no data on this device", remedy="name its folder with --data or in agent.toml"
            )
        raw = model.application.read(self.data)
        began = time.perf_counter()
        columns = self.engine.infer(raw)
        count = len(columns["example_id"])
        milliseconds = 1000 * (time.perf_counter() - began) / count
        self._write(columns, model.version)
        return {
            **summarize(columns),
            "num_examples": count,
            "ms_per_example": round(milliseconds, 3),
            "latency_ms_p50": self._latency(model, raw),
            "model": model.facts(),
        }

    def _latency(self, model: Loaded, raw: RawData) -> float | None:
        """Median milliseconds of the model on one example, without preprocessing; None where no client has examples."""
        for client in raw.client_ids():
            examples = raw.select([client]).examples(model.config)
            if len(examples) == 0:
                continue
            times = []
            for number in range(LATENCY_RUNS):
                one = examples.take([number % len(examples)])
                began = time.perf_counter()
                model.session.run(one.inputs)
                times.append(1000 * (time.perf_counter() - began))
            return round(statistics.median(times), 3)
        return None

    def serve(self, host: str, port: int) -> int:
        """Start the gRPC service; returns its port. grpc is imported here only, where serving is wanted."""
        from fl_clients.edge.service import serve

        self._server = serve(self.engine, host=host, port=port)
        return int(self._server.port)

    def close(self) -> None:
        if self._server is not None:
            self._server.stop()

    def _write(self, columns: dict[str, Any], version: int) -> None:
        """predictions/TIME-vVERSION.csv; the newest files are kept."""
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
        names = [name for name in columns if name not in PRIVATE_COLUMNS]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(zip(*(columns[name] for name in names), strict=True))
        atomic.write_bytes(self.home.predictions / f"{stamp}-v{version}.csv", out.getvalue().encode(), mode=0o600)
        for old in sorted(self.home.predictions.glob("*.csv"))[:-KEEP_PREDICTIONS]:
            old.unlink()
