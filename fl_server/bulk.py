"""Whole messages in one request each: the same protobuf messages and objects as Flower's Fleet calls, side by side.

A round of a model with 60 arrays is two requests a device instead of some 250.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable

from fl_core.flower import wire
from fl_core.flower.adapter import LinkStore
from fl_core.flower.records import head
from fl_core.flower.wire import FleetRefused
from fl_server.directory import Caller

BATCH_BYTES, SPOOL_BYTES = 1 << 20, 1 << 20
ReadBatch = Callable[[list[str]], Awaitable[list[bytes]]]


class Download:
    """The next message for a device: its envelope (a PullMessagesResponse) and the ids of its objects."""

    def __init__(self, store: LinkStore, caller: Caller) -> None:
        self.envelope, self.ids = store.take(caller.node)

    async def parts(self, first: list[bytes], read: ReadBatch) -> AsyncIterator[bytes]:
        """The body: records, read in batches. An object that has gone meanwhile is an empty record, and the last one."""
        yield head(self.envelope)
        yield self.envelope
        contents, done = first, 0
        while contents:
            for content in contents:
                yield head(content)
                yield content
                if not content:
                    return
            done += len(contents)
            contents = await read(self.ids[done:]) if done < len(self.ids) else []


class Upload:
    """A reply as it arrives: its records, the envelope (a PushMessagesRequest) first. On disk when it is large.

    Nothing reaches the store before all of it is here, so that there are no half replies.
    """

    def __init__(self, store: LinkStore, caller: Caller) -> None:
        self._store, self._caller, self._envelope = store, caller, b""
        self._awaited: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._spool = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 closed by close()

    def take(self, records: list[bytes]) -> None:
        """Raises FleetRefused for an object that does not belong to the reply, IntegrityError for an unreadable one."""
        if not self._envelope and records:
            self._begin(records[0])
            records = records[1:]
        for content in records:
            object_id = wire.object_id(content)
            if object_id not in self._awaited:
                raise FleetRefused(400, f"object {object_id[:16]} does not belong to the reply")
            self._awaited.remove(object_id)
            self._sizes[object_id] = len(content)
            self._spool.write(content)

    def finish(self) -> None:
        """Hand it over. Raises FleetRefused 503 when objects are missing."""
        if not self._envelope:
            raise FleetRefused(400, "an empty upload")
        if self._awaited:
            raise FleetRefused(503, f"{len(self._awaited)} objects are missing: push the reply again")
        self._spool.seek(0)
        contents = ((object_id, self._spool.read(size)) for object_id, size in self._sizes.items())
        self._store.accept(self._envelope, contents, self._caller.node, self._caller.device.public_key_pem)

    def close(self) -> None:
        self._spool.close()

    def _begin(self, envelope: bytes) -> None:
        try:
            request = wire.fleet.PushMessagesRequest.FromString(envelope)
        except Exception as error:  # protobuf's DecodeError, whichever implementation is loaded
            raise FleetRefused(400, f"not a readable reply: {type(error).__name__}") from None
        wire.check_sender(request, self._caller.node, self._caller.device.public_key_pem)
        self._envelope = envelope
        self._awaited = set(wire.tree_ids(request.message_object_trees[0], origin=self._caller.device.name))
