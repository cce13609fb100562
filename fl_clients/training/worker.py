"""The worker process: flwr and torch, one instruction at a time over pipes. ``python -m fl_clients.training.worker``.

It answers what is installed on this device and enabled in its settings; nothing that arrives is executed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from flwr.app import Error, Message

from fl_clients.edge.samples.store import data_version, open_data
from fl_clients.training import frames
from fl_core.contracts.cli import start_logging
from fl_core.contracts.errors import DataError, FieldfleetError
from fl_core.flower import adapter
from fl_core.learning.application import Application
from fl_core.learning.client_states import ClientStates, FolderStates
from fl_core.learning.examples import Examples, RawData

log = logging.getLogger(__name__)
Handler = Callable[[Message], Message]
GENERATED = "generated"
PR_SET_PDEATHSIG = 1
APP_RAISED = 2  # Flower's ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def device_source(data: str, client: str, seed: int, name: str = "device") -> Callable[[Application, Any], Examples]:
    """Where this device's examples come from: a folder in the application's format, its generator, or the labelled
    samples of this moment where the folder is a store of samples.

    client: only this client of the data set ("" = all of it; a generated data set needs one). name: this device's.
    """

    def source(application: Application, config: Any) -> Examples:
        if data == GENERATED:
            if not client:
                raise DataError("generated data needs a client name", remedy="agent run HOME --client NAME")
            return examples(application, config, application.generate(config, seed))
        with open_data(application, config, Path(data), labelled=True, client=name) as raw:
            return examples(application, config, raw)

    def examples(application: Application, config: Any, raw: RawData) -> Examples:
        if client:
            known = raw.client_ids()
            if client not in known:
                raise DataError(
                    f"{data}: no {application.client_term} {client!r}",
                    remedy=f"known: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}",
                )
            raw = raw.select([client])
        return raw.examples(config)

    return source


def device_sources(
    places: Sequence[str], client: str, seed: int, name: str = "device"
) -> Callable[[Application, Any], Examples]:
    """``device_source`` of one place for every application, or of each application's own (NAME=PLACE)."""
    if len(places) == 1:
        return device_source(places[0], client, seed, name)
    sources = {app: device_source(place, client, seed, name) for app, place in _pairs(places).items()}

    def source(application: Application, config: Any) -> Examples:
        if application.name not in sources:
            raise DataError(f"this device has no data for {application.name}")
        return sources[application.name](application, config)

    return source


def data_versions(places: Sequence[str]) -> Callable[[Application, Any], str]:
    """What changes with this device's samples; "" for whole data sets, which do not change under a worker."""
    pairs = _pairs(places)

    def version(application: Application, config: Any) -> str:
        place = places[0] if len(places) == 1 else pairs.get(application.name, GENERATED)
        return "" if place == GENERATED else data_version(application, config, Path(place))

    return version


def folder_states(root: Path | None) -> Callable[[str], ClientStates] | None:
    """By run; None where this device has no folder for states."""
    return None if root is None else lambda run: FolderStates(root, run)


def _pairs(places: Sequence[str]) -> dict[str, str]:
    return {name: place for name, _, place in (place.partition("=") for place in places)}


def serve(
    handler: Handler, incoming: BinaryIO, outgoing: BinaryIO, counts: Callable[[], Mapping[str, int]] = dict
) -> None:
    """Until the input ends. A request that fails is answered with Flower's error reply.

    counts(): application -> number of examples, told to the agent beside each reply.
    """
    while True:
        frame = frames.read_frame(incoming, origin="agent")
        if frame is None:
            return
        header, blobs = frame
        objects = dict(zip(header["ids"], blobs, strict=True))
        blobs.clear()
        message = adapter.inflate(header["message_id"], objects, origin="request")
        envelope, tree, parts = adapter.deflate(_handled(handler, message))
        frames.write_frame(outgoing, {"ids": list(parts), "counts": dict(counts())}, [envelope, tree, *parts.values()])


def _handled(handler: Handler, message: Message) -> Message:
    try:
        return handler(message)
    except FieldfleetError as error:
        return Message(Error(APP_RAISED, error.message[:2000]), reply_to=message)
    except Exception as error:
        log.exception("the request failed")
        return Message(Error(APP_RAISED, f"{type(error).__name__}: {error}"[:2000]), reply_to=message)


def end_with_parent() -> None:
    """A paused worker reads no end of input: the kernel ends it when the agent dies, where it can (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m fl_clients.training.worker", description=__doc__)
    options.add_argument("--name", required=True, help="this device's name")
    options.add_argument(
        "--data",
        action="append",
        required=True,
        help=f"folder of this device's data, or {GENERATED!r}; APPLICATION=FOLDER for each of several",
    )
    options.add_argument("--client", default="", help="only this client of the data set")
    options.add_argument("--data-seed", type=int, default=0, help="seed of generated data")
    options.add_argument("--application", action="append", default=[], help="enabled application (default: every one)")
    options.add_argument("--states", type=Path, help="folder for what algorithms keep here from round to round")
    options.add_argument("--threads", type=int, default=1, help="threads of one local update")
    options.add_argument("--verbose", action="store_true")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the application prints goes to stderr, not into the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent decides when this process ends
    end_with_parent()
    start_logging(verbose=args.verbose)
    import torch

    from fl_clients.training.client import ClientRuntime

    torch.set_num_threads(max(1, args.threads))
    source = device_sources(args.data, args.client, args.data_seed, args.name)
    allowed = frozenset(args.application) or None
    runtime = ClientRuntime(
        args.name,
        source,
        allowed=allowed,
        version=data_versions(args.data),
        states=folder_states(args.states),
        clock=time.monotonic,
    )
    serve(runtime.handle, sys.stdin.buffer, outgoing, lambda: runtime.counts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
