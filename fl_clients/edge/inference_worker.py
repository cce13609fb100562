"""The inference process: onnxruntime, the models in use and the gRPC service, outside the agent, which so stays small.

``python -m fl_clients.edge.inference_worker --application NAME=FOLDER ...`` answers one line of JSON with one line of
JSON, and ends with its input. FOLDER: the application's own, with ``slots/``; predictions go to ``predictions/`` in it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_clients.edge.inference import InferenceEngine
from fl_clients.edge.predictions import infer
from fl_core.contracts.cli import start_logging
from fl_core.contracts.errors import EnvironmentFault, FieldfleetError, InputError
from fl_core.runtime.machine import resident_bytes

LOG = logging.getLogger(__name__)


class Worker:
    """``handle`` one request after the other: serve, infer, reload."""

    def __init__(self, folders: Mapping[str, Path], *, threads: int) -> None:
        self.folders = folders
        self.engines = {name: InferenceEngine(folder, name, threads=threads) for name, folder in folders.items()}
        self._server: Any = None

    def handle(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Raises FieldfleetError."""
        kind = request["do"]
        if kind == "serve":
            return self._serve(str(request["host"]), int(request["port"]))
        name = str(request["application"])
        if name not in self.engines:
            raise InputError(f"application {name!r} does not run here")
        if kind == "infer":
            return infer(self.engines[name], Path(str(request["data"])), self.folders[name] / "predictions")
        return {"changed": self.engines[name].reload()}

    def _serve(self, host: str, port: int) -> dict[str, Any]:
        from fl_clients.edge.service import serve  # grpc costs memory: only where serving is wanted

        self._server = serve(self.engines, host=host, port=port)
        return {"port": self._server.port}

    def rest(self, idle_s: float) -> None:
        for name, engine in self.engines.items():
            if engine.unload_if_idle(idle_s):
                LOG.info("inference: the model of %s left memory", name)

    def close(self) -> None:
        if self._server is not None:
            self._server.stop()


def answer(worker: Worker, line: bytes) -> dict[str, Any]:
    try:
        return {"ok": True, **worker.handle(json.loads(line)), "rss_mb": round(resident_bytes() / 2**20, 1)}
    except FieldfleetError as error:
        fault = error
    except Exception as error:  # an application's own code
        LOG.exception("inference")
        fault = EnvironmentFault(f"unexpected failure: {type(error).__name__}: {error}")
    return {"ok": False, "error": fault.message, "remedy": fault.remedy, "code": int(fault.exit_code)}


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m fl_clients.edge.inference_worker")
    options.add_argument("--application", action="append", required=True, metavar="NAME=FOLDER")
    options.add_argument("--idle", type=float, default=0.0, help="seconds until an unused model is unloaded; 0 = never")
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args(arguments)
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever an application prints goes to stderr, not into the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent decides when this process ends
    start_logging(verbose=False)
    folders = {name: Path(folder) for name, _, folder in (item.partition("=") for item in args.application)}
    worker = Worker(folders, threads=args.threads)
    incoming = sys.stdin.buffer
    try:
        while True:
            if args.idle and not select.select([incoming], [], [], max(0.1, args.idle / 4))[0]:
                worker.rest(args.idle)
                continue
            line = incoming.readline()
            if not line:
                return 0
            outgoing.write(json.dumps(answer(worker, line)).encode() + b"\n")
            outgoing.flush()
    finally:
        worker.close()


if __name__ == "__main__":
    sys.exit(main())
