"""A device as the server sees one: Fleet calls, long poll, bulk pull and push over TLS, as a coroutine of a few kB.

It speaks for a registered key of its own over one keep-alive connection. Its "training" adds a number of its own to
the model's arrays, so that replies differ and the server's store cannot share them.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message

from fl_core.flower import adapter, wire
from fl_core.flower.messages import Reply, Request
from fl_core.flower.records import RecordReader, packed, packed_size
from fl_core.identity.keys import PrivateKey
from fl_core.identity.signature import HeaderSigner

POLL_S = 240.0
RETRY_S = 0.5
LINE_LIMIT = 1 << 20


class Refused(Exception):
    pass


@dataclass
class Ledger:
    """What all devices of one benchmark saw. seconds: of each kind of request; a waiting long poll counts as none."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    first: dict[tuple[str, int], float] = field(default_factory=dict)  # when a round's first instruction was delivered
    delivered_after: list[float] = field(default_factory=list)
    answered_after: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    joined: int = 0
    replies: int = 0

    def instruction(self, kind: str, number: int) -> None:
        now = time.perf_counter()
        self.delivered_after.append(now - self.first.setdefault((kind, number), now))


class Http:
    """One keep-alive connection; bodies whole, at most some MB."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext, signer: HeaderSigner) -> None:
        self._where, self._tls, self._signer = (host, port), tls, signer
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, parts: Iterable[bytes], size: int) -> tuple[int, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._where, ssl=self._tls, limit=LINE_LIMIT)
        reader, writer = self._streams
        signed = "".join(f"{name}: {value}\r\n" for name, value in self._signer.headers().items())
        head = f"POST {path} HTTP/1.1\r\nhost: {self._where[0]}\r\ncontent-length: {size}\r\n"
        head += f"content-type: {wire.MEDIA_TYPE}\r\n{signed}\r\n"
        writer.write(head.encode("ascii") + b"".join(parts))
        await writer.drain()
        return await _answer(reader)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(lines[0].split()[1])
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if headers.get("transfer-encoding") != "chunked":
        return status, await reader.readexactly(int(headers.get("content-length", "0")))
    parts = []
    while length := int(await reader.readline(), 16):
        parts.append(await reader.readexactly(length))
        await reader.readline()
    await reader.readline()
    return status, b"".join(parts)


class ProtocolDevice:
    """run() until cancelled; failures are counted in the ledger and it joins again, as an agent does."""

    def __init__(self, index: int, name: str, key: PrivateKey, http: Http, ledger: Ledger) -> None:
        self.index, self.name, self.ledger = index, name, ledger
        self._signer, self._http = HeaderSigner(key), http
        self._node = wire.Node(node_id=0)

    async def run(self, gate: asyncio.Semaphore) -> None:
        joined = False
        while True:
            try:
                if not joined:
                    async with gate:  # a real fleet's devices do not all start in the same second
                        await self._join()
                    joined = True
                    self.ledger.joined += 1
                await self._serve()
            except (OSError, EOFError, asyncio.IncompleteReadError, ssl.SSLError, Refused) as error:
                self.ledger.errors[f"{type(error).__name__}: {error}"[:120]] += 1
                self._http.close()
                self.ledger.joined -= int(joined)
                joined = False
                await asyncio.sleep(RETRY_S)

    async def _join(self) -> None:
        body = await self._call("welcome", wire.WELCOME_PATH, b"")
        self._node = wire.Node(node_id=int(json.loads(body)["node_id"]))
        request = wire.fleet.ActivateNodeRequest(public_key=self._signer.public_pem, heartbeat_interval=30.0)
        await self._call("activate", wire.FLEET_PATH + "activate-node", request.SerializeToString())

    async def _serve(self) -> None:
        path = f"{wire.PULL_PATH}?seconds={POLL_S:g}&every={POLL_S:g}&lost=0"
        body = wire.fleet.PullMessagesRequest(node=self._node).SerializeToString()
        found = await self._call("", path, body)
        if not found:
            return
        began = time.perf_counter()
        envelope, parts = self._reply(found)
        pushed = time.perf_counter()
        await self._call("push", wire.PUSH_PATH, [envelope, *parts])
        self.ledger.seconds["compute"].append(pushed - began)
        self.ledger.answered_after.append(time.perf_counter() - began)
        self.ledger.replies += 1

    async def _call(self, name: str, path: str, body: bytes | list[bytes]) -> bytes:
        began = time.perf_counter()
        parts, size = (list(packed(body)), packed_size(body)) if isinstance(body, list) else ([body], len(body))
        status, answer = await self._http.post(path, parts, size)
        if name:
            self.ledger.seconds[name].append(time.perf_counter() - began)
        if status not in (200, 204):
            raise Refused(f"{path.partition('?')[0]}: {status} {answer[:60].decode(errors='replace')}")
        return answer if status == 200 else b""

    def _reply(self, body: bytes) -> tuple[bytes, list[bytes]]:
        """(PushMessagesRequest, objects) for what a bulk pull brought."""
        reader = RecordReader(origin=self.name)
        first, *contents = reader.feed(body)
        reader.end()
        found = wire.fleet.PullMessagesResponse.FromString(first)
        ids = wire.tree_ids(found.message_object_trees[0], origin=self.name)
        message = adapter.inflate(ids[-1], dict(zip(ids, contents, strict=True)), origin=self.name)
        adapter.assume_identity(run_id=message.metadata.run_id, task_id=0, node_id=int(self._node.node_id))
        request = Request.from_record(message.content, origin=self.name)
        self.ledger.instruction(message.metadata.message_type, request.round)
        envelope, tree, objects = adapter.deflate(Message(self._trained(request).to_record(), reply_to=message))
        push = wire.fleet.PushMessagesRequest(
            node=self._node,
            messages_list=[wire.message.Message.FromString(envelope)],
            message_object_trees=[wire.message.ObjectTree.FromString(tree)],
        )
        return push.SerializeToString(), list(objects.values())

    def _trained(self, request: Request) -> Reply:
        """Adds ``index + 1``: after r rounds of plain averaging each weight has grown by r times the mean of these."""
        arrays: dict[str, Any] = {
            name: array + np.asarray(self.index + 1, array.dtype) for name, array in request.arrays.items()
        }
        return Reply(num_examples=10, metrics={"loss": 1.0 / request.round}, arrays=arrays)
