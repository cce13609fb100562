"""The server's one HTTPS door: Flower's Fleet API, our long poll and welcome, and the signed repository (read only).

Flower's Control and Runtime APIs are not served: nobody starts runs or registers devices over the network. Every body
has a limit, every call but the repository's is authenticated, and the store is used by one thread at a time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fl_core.contracts.errors import EnvironmentFault, IntegrityError, RefusedError
from fl_core.flower import wire
from fl_core.flower.adapter import LinkStore
from fl_core.flower.records import RecordReader
from fl_core.flower.wire import FleetRefused
from fl_core.link import batch
from fl_server.bell import Bell
from fl_server.bulk import BATCH_BYTES, Download, Upload
from fl_server.device_states import parse_posted
from fl_server.directory import Caller, Directory
from fl_server.doorman import AUTHORITY_PATH, ENROL_PATH, ROTATE_PATH, Doorman
from fl_server.doorman import BODY_LIMIT as DOOR_LIMIT
from fl_server.repository_files import RepositoryFiles
from fl_server.telemetry import Telemetry
from fl_server.tunnel import DEVICE_SCOPE, KEY_SCOPE

log = logging.getLogger(__name__)
T = TypeVar("T")

LONGEST_POLL = 600.0
LONGEST_INTERVAL = 1800.0  # Flower's HEARTBEAT_MAX_INTERVAL
SMALL_BODY = 64 << 10
BODY_LIMITS = {
    "push-object": wire.MAX_OBJECT_BYTES + SMALL_BODY,
    "push-messages": wire.MAX_ENVELOPE_BYTES,
}
BULKY_AT_ONCE, UPLOADS_AT_ONCE = 4, 32  # further ones wait in their sockets; an upload holds about 2 MiB
STALL_SECONDS = 120.0  # without a byte, an upload gives its place to another


class TooLarge(Exception):
    pass


class Endpoint:
    """An ASGI application. welcome(caller, host by which it called) -> what a device is told.

    note_state(device, body): what a device without MQTT says of its condition.
    """

    def __init__(
        self,
        store: LinkStore,
        directory: Directory,
        bell: Bell,
        repository: RepositoryFiles,
        welcome: Callable[[Caller, str], dict[str, Any]],
        telemetry: Telemetry,
        doorman: Doorman,
        note_state: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._store, self._directory, self._bell = store, directory, bell
        self._repository, self._welcome, self._telemetry = repository, welcome, telemetry
        self._doorman, self._note_state = doorman, note_state
        self._worker = ThreadPoolExecutor(1, "superlink-store")
        self._bulky, self._uploads = asyncio.Semaphore(BULKY_AT_ONCE), asyncio.Semaphore(UPLOADS_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            response = await self._answer(Request(scope, receive))
            if (generation := self._repository.generation()) is not None:
                response.headers[wire.REPOSITORY_HEADER] = str(generation)
            await response(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _lifespan(receive, send)

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    async def _answer(self, request: Request) -> Response:
        path, method = request.url.path, request.method
        try:
            if path.startswith(wire.REPOSITORY_PATH) and method in ("GET", "HEAD"):
                return self._repository.respond(path.removeprefix(wire.REPOSITORY_PATH), request.headers.get("range"))
            if path == AUTHORITY_PATH and method in ("GET", "HEAD"):
                return JSONResponse(self._doorman.authority(_address(request)))
            if method != "POST":
                return _refusal(404, "not found")
            if self._bell.closing:
                return _refusal(503, "the server is stopping")
            if path.startswith(wire.FLEET_PATH):
                return await self._fleet(request, path.removeprefix(wire.FLEET_PATH))
            if path == wire.WAIT_PATH:
                return await self._wait(request)
            if path == wire.PULL_PATH:
                return await self._pull(request)
            if path == wire.PUSH_PATH:
                return await self._push(request)
            if path == wire.WELCOME_PATH:
                return await self._greet(request)
            if path == batch.TELEMETRY_PATH:
                return await self._take_records(request)
            if path == ENROL_PATH:
                return await self._enrol(request)
            if path == ROTATE_PATH:
                return await self._rotate(request)
            if path == wire.STATE_PATH:
                return await self._hear_state(request)
            return _refusal(404, "not found")
        except FleetRefused as refused:
            return _refusal(refused.status, refused.reason)
        except RefusedError as refused:
            return _refusal(401, str(refused).replace("\n  remedy: ", "; "))
        except IntegrityError as wrong:
            return _refusal(413 if "too large" in wrong.message else 400, wrong.message)
        except TooLarge:
            return _refusal(413, "the request is too large")
        except ClientDisconnect:
            return Response(status_code=499)
        except EnvironmentFault as fault:  # a full disk: devices keep their replies and come again
            log.error("request refused: %s: %s", path, fault.message)
            return _refusal(503, "the server cannot store anything now; try again")
        except Exception:
            log.exception("request failed: %s", path)
            return _refusal(503, "the server could not answer; try again")

    async def _fleet(self, request: Request, name: str) -> Response:
        caller = await self._authenticate(request)
        if name.endswith("-object"):
            async with self._bulky:
                return await self._fleet_call(request, name, caller)
        return await self._fleet_call(request, name, caller)

    async def _fleet_call(self, request: Request, name: str, caller: Caller) -> Response:
        body = await _body(request, BODY_LIMITS.get(name, SMALL_BODY))

        answer = await self._in_store(lambda: self._store.fleet(name, body, caller.node, caller.device.public_key_pem))
        if answer.reply_complete or name in ("activate-node", "deactivate-node"):
            self._bell.ring_engine()
        return Response(answer.body, media_type=wire.MEDIA_TYPE)

    async def _wait(self, request: Request) -> Response:
        """Long poll and sign of life in one: 200 when a message waits, 204 when none came in time."""
        caller = await self._authenticate(request)
        return Response(status_code=200 if await self._waited(request, caller) else 204)

    async def _pull(self, request: Request) -> Response:
        """``wait``, and the whole message in its answer."""
        caller = await self._authenticate(request)
        if not await self._waited(request, caller):
            return Response(status_code=204)

        async def read(ids: list[str]) -> list[bytes]:
            return await self._in_store(lambda: self._store.read_objects(ids, BATCH_BYTES))

        def begin() -> tuple[Download, list[bytes]]:
            with self._store.together():
                download = Download(self._store, caller)
                return download, self._store.read_objects(download.ids, BATCH_BYTES)

        download, first = await self._in_store(begin)
        if not download.ids:  # taken back or expired in the meantime
            return Response(status_code=204)
        return StreamingResponse(download.parts(first, read), media_type=wire.MEDIA_TYPE)

    async def _push(self, request: Request) -> Response:
        """A whole reply in one request."""
        caller = await self._authenticate(request)
        async with self._uploads:
            upload, reader = Upload(self._store, caller), RecordReader(origin=caller.device.name)
            try:
                async for data in _steady(request.stream()):
                    records = reader.feed(data)
                    if len(data) > SMALL_BODY:
                        await asyncio.to_thread(upload.take, records)
                    else:
                        upload.take(records)
                reader.end()
                await self._in_store(upload.finish)
            finally:
                upload.close()
        self._bell.ring_engine()
        return Response(status_code=200)

    async def _waited(self, request: Request, caller: Caller) -> bool:
        """Whether a message waits for this device; at most the request's ``seconds``."""
        node = _node_id(await _body(request, SMALL_BODY))
        if node != caller.node:
            raise FleetRefused(401, "the request names another node than its signature")
        seconds = _number(request, "seconds", LONGEST_POLL)
        every = _number(request, "every", LONGEST_INTERVAL)
        lost = request.query_params.get("lost") == "1"
        if seconds <= 0:
            return await self._in_store(lambda: self._look(node, every, lost))
        door, gone = self._bell.door(node), False  # before looking, so that nothing is missed in between
        try:
            if await self._in_store(lambda: self._look(node, max(seconds, every), lost)):
                return True
            rung, gone = await _first_of(door, request, seconds)
            if self._bell.closing:
                raise FleetRefused(503, "the server is stopping")
            if rung:  # with a message, or because it was shut out
                await self._in_store(lambda: self._directory.caller(caller.device.public_key_pem))
            return rung
        finally:
            current = self._bell.leave(node, door)
            if gone and current:  # the device is cut off or dead: it should not be asked before it is back
                await self._in_store(lambda: self._store.deactivate(node))
                self._bell.ring_engine()

    def _look(self, node: int, every: float, lost: bool) -> bool:
        self._store.sign_of_life(node, every)
        return self._store.undelivered(node, lost=lost)

    async def _greet(self, request: Request) -> Response:
        caller = await self._authenticate(request)
        host = request.url.hostname or ""
        return JSONResponse({**self._welcome(caller, host), "node_id": caller.node, "time": time.time()})

    async def _take_records(self, request: Request) -> Response:
        """A batch of telemetry: answered once it is on disk."""
        caller = await self._authenticate(request)
        data = await _body(request, batch.PACKED_LIMIT)
        records = batch.unpack(data, origin=f"records of {caller.device.name}")
        taken = await asyncio.to_thread(self._telemetry.take, caller.device.name, records)
        return JSONResponse({"store": records.store, "upto": taken.upto})

    async def _enrol(self, request: Request) -> Response:
        body = await _body(request, DOOR_LIMIT)
        return JSONResponse(await self._in_store(lambda: self._doorman.enrol(_address(request), body)))

    async def _rotate(self, request: Request) -> Response:
        caller = await self._authenticate(request)
        body = await _body(request, DOOR_LIMIT)
        return JSONResponse(await self._in_store(lambda: self._doorman.rotate(caller, body)))

    async def _hear_state(self, request: Request) -> Response:
        caller = await self._authenticate(request)
        body = await _body(request, SMALL_BODY)
        name = caller.device.name
        found = parse_posted(body, origin=name)
        await asyncio.to_thread(self._note_state, name, found)
        self._bell.ring_engine()  # a round may wait for a device that may be asked
        return Response(status_code=204)

    async def _authenticate(self, request: Request) -> Caller:
        key, device = request.scope.get(KEY_SCOPE), request.scope.get(DEVICE_SCOPE)
        if key is None:
            return await self._in_store(lambda: self._directory.authenticate(request.headers))
        caller = await self._in_store(lambda: self._directory.caller(key))  # proved at the tunnel's handshake
        if caller.device.name != device:
            raise RefusedError(f"this key is registered as another device than {device!r}")
        return caller

    async def _in_store(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function)


def _address(request: Request) -> str:
    return request.client.host if request.client else "tunnel"


async def _first_of(door: asyncio.Event, request: Request, seconds: float) -> tuple[bool, bool]:
    """(rung, caller gone), whichever comes first; neither after ``seconds``."""
    rung = asyncio.ensure_future(door.wait())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        done, _ = await asyncio.wait({rung, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return rung in done, gone in done and rung not in done
    finally:
        rung.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _steady(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The parts of a body. Raises FleetRefused 503 when none comes for too long."""
    while True:
        try:
            yield await asyncio.wait_for(anext(stream), STALL_SECONDS)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise FleetRefused(503, "the upload stalled: push the reply again") from None


async def _body(request: Request, limit: int) -> bytes:
    """Raises TooLarge as soon as the limit is passed, announced or not."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdigit() or int(announced) > limit:
        raise TooLarge
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise TooLarge
        parts.append(part)
    return b"".join(parts)


def _node_id(body: bytes) -> int:
    try:
        return int(wire.fleet.PullMessagesRequest.FromString(body).node.node_id)
    except Exception as error:  # protobuf's DecodeError, whichever implementation is loaded
        raise FleetRefused(400, f"not a readable wait request: {type(error).__name__}") from None


def _number(request: Request, name: str, largest: float) -> float:
    try:
        value = float(request.query_params.get(name, "0"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= largest:
        raise FleetRefused(400, f"{name} must be a number from 0 to {largest:g}")
    return value


def _refusal(status: int, reason: str) -> Response:
    return Response(json.dumps({"error": reason}), status, media_type="application/json")


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return
