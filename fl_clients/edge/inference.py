"""The model in use on this device: loaded once, replaced when the slot changes, rolled back when it does not load."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_clients.edge.slots import Slots, model_facts
from fl_core.contracts.bundle import Bundle
from fl_core.contracts.errors import EnvironmentFault, FieldfleetError, InputError
from fl_core.learning.application import Application, application
from fl_core.learning.examples import RawData
from fl_core.runtime.golden import golden_check
from fl_core.runtime.machine import release_library_pages, return_memory_early
from fl_core.runtime.session import Session, SessionOptions, run_application

LOG = logging.getLogger(__name__)
Array = npt.NDArray[Any]
DEFAULT_BATCH = 32  # activations of a batch are the larger part of an inference's memory


@dataclass(frozen=True)
class Loaded:
    """One bundle, ready to run; ``config`` is the application's, from the bundle's manifest."""

    bundle: Bundle
    target: str
    application: Application
    config: Any
    session: Session

    @property
    def version(self) -> int:
        return self.bundle.manifest.version

    def facts(self) -> dict[str, Any]:
        """What the device says of its model."""
        return model_facts(self.bundle.manifest, self.target)


class InferenceEngine:
    """``name``: the only application that is accepted; empty = any installed one. Safe to use from several threads."""

    def __init__(self, home: Path, name: str = "", *, threads: int = 1, batch_size: int = DEFAULT_BATCH) -> None:
        return_memory_early()
        self._slots, self._name = Slots(home), name
        self._options, self._batch_size = SessionOptions(threads=threads), batch_size
        self._lock = threading.Lock()
        self._identity: tuple[str, int] | None = None
        self._failure: tuple[tuple[str, int], FieldfleetError] | None = None
        self._loaded: Loaded | None = None
        self._last_used = time.monotonic()

    @property
    def loaded(self) -> Loaded | None:
        """The model in memory, without a look at the slots."""
        return self._loaded

    def reload(self) -> bool:
        """Load the slot in use if it is not the one in memory; True when the model changed.

        A model that does not verify, load or pass its self-test is rolled back to the former one. Raises its error
        when there is none; a model that is already in memory then stays in use.
        """
        with self._lock:
            identity = self._slots.identity()
            if identity is None or identity == self._identity:
                return False
            if self._failure is not None and self._failure[0] == identity:
                raise self._failure[1].with_traceback(None)
            try:
                self._loaded = self._load()
            except FieldfleetError as error:
                LOG.error("model in slot %s: %s", identity[0], error.message)
                identity = self._roll_back(identity, error)
            # The slot's state from before it was read: a switch in the meantime is then seen next time.
            self._identity, self._failure = identity, None
            return True

    def unload_if_idle(self, seconds: float) -> bool:
        """Let go of a model that was not asked for so long; the next question loads it again. True when it went."""
        with self._lock:
            if self._loaded is None or time.monotonic() - self._last_used < seconds:
                return False
            self._loaded = self._identity = None
            return True

    def model(self) -> Loaded:
        """The model in use, loaded anew when the slot changed. Raises EnvironmentFault before the first update."""
        self._last_used = time.monotonic()
        try:
            self.reload()
        except FieldfleetError:
            if self._loaded is None:
                raise
        loaded = self._loaded
        if loaded is None:
            raise EnvironmentFault(
                "no model is installed on this device", remedy="publish one, and let the agent update"
            )
        return loaded

    def infer(self, raw: RawData) -> dict[str, Array]:
        """Columns of all examples in ``raw``: those that identify an example, and what the application reads out.

        Client after client, so that one client's inputs are in memory at a time. Raises EnvironmentFault (no model)
        or InputError (the data do not fit the model).
        """
        model = self.model()
        parts = [part for client in raw.client_ids() if (part := self._infer_one(model, raw.select([client])))]
        if not parts:
            raise InputError(f"the data hold no example that {model.application.name} can use")
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _infer_one(self, model: Loaded, raw: RawData) -> dict[str, Array]:
        examples = raw.examples(model.config)
        if len(examples) == 0:
            return {}
        outputs = run_application(model.application, model.config, model.session, examples, batch_size=self._batch_size)
        return {**examples.columns, **model.application.postprocess(model.config, outputs)}

    def run(self, inputs: Mapping[str, Array]) -> tuple[Loaded, dict[str, Array]]:
        """The model that ran, and its raw outputs by name. Raises InputError naming the input that does not fit."""
        model = self.model()
        return model, model.session.run(inputs, batch_size=self._batch_size)

    def _load(self) -> Loaded:
        found = self._slots.open_current()
        if found is None:
            raise EnvironmentFault("no model is installed on this device")
        bundle, target = found
        manifest = bundle.manifest
        if self._name and manifest.application != self._name:
            raise InputError(f"the model is of {manifest.application}, this device runs {self._name}")
        app = application(manifest.application)
        config = app.configure_from(manifest.config, origin=f"{bundle.folder}/manifest.json")
        session = Session(bundle.model_file(target), self._options)
        golden_check(bundle, target, session=session)
        release_library_pages()
        return Loaded(bundle, target, app, config, session)

    def _roll_back(self, failed: tuple[str, int], reason: FieldfleetError) -> tuple[str, int] | None:
        """The identity of the bundle that was loaded instead. Raises ``reason`` where there is none."""
        try:
            self._slots.roll_back(failed)
            identity = self._slots.identity()
            self._loaded = self._load()
        except FieldfleetError as error:
            LOG.error("no roll-back: %s", error.message)
            self._failure = (failed, reason)
            raise reason from None
        LOG.warning("rolled back to version %d", self._loaded.version)
        return identity
