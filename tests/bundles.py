"""Small real bundles and repositories for tests of delivery and inference: toy_regression, no torch, milliseconds."""

from __future__ import annotations

import functools
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fl_core.contracts.bundle import GOLDEN_NAME, open_bundle
from fl_core.contracts.config import to_table
from fl_core.contracts.manifests import MANIFEST_NAME, BundleManifest, to_json
from fl_core.delivery.publication import Publication, publish_bundle
from fl_core.learning.application import Application, application
from fl_core.runtime.golden import FP32, Golden, write_golden
from fl_core.runtime.session import Session
from fl_core.storage import atomic

TOY = "toy_regression"
TARGET = "x86"
Exits = list[tuple[str, list[int]]]  # (name, shape behind the batch) of each output


def linear_model(path: Path, weights: np.ndarray[Any, Any], *, padding: int = 0) -> None:
    """features (N, F) -> value (N,): a product with ``weights``; ``padding`` bytes make the file larger."""
    product = helper.make_node("MatMul", ["features", "w"], ["value"])
    tensors = [numpy_helper.from_array(weights.astype(np.float32), "w")]
    _write_model(path, [product], tensors, ("features", ["batch", len(weights)]), [("value", [])], padding=padding)


def _write_model(
    path: Path, nodes: list[Any], tensors: list[Any], entry: tuple[str, list[Any]], exits: Exits, *, padding: int = 0
) -> None:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(entry[0], TensorProto.FLOAT, entry[1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name, shape in exits],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    if padding:
        model.doc_string = "x" * padding
    path.write_bytes(model.SerializeToString())


def toy_bundle(folder: Path, *, seed: int = 0, targets: tuple[str, ...] = (TARGET,), padding: int = 0) -> Path:
    """A verified bundle whose model depends on ``seed``; every target has the same model."""
    app = application(TOY)
    config = app.configure()
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=config.data.features)
    inputs = {"features": rng.normal(size=(4, config.data.features)).astype(np.float32)}
    return _bundle(
        folder,
        app,
        config,
        inputs,
        lambda path: linear_model(path, weights, padding=padding),
        seed=seed,
        targets=targets,
    )


def mean_bundle(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Of an application with one input: each number of each output is the input's mean, times a number of ``seed``."""
    app = application(name)
    config = app.configure()
    (entry,), exits = app.inputs(config), [(o.name, list(o.shape[1:])) for o in app.outputs(config)]
    rng = np.random.default_rng(seed)
    inputs = {entry.name: rng.normal(size=(4, *entry.shape[1:])).astype(np.float32)}

    def model(path: Path) -> None:
        axes = numpy_helper.from_array(np.arange(1, len(entry.shape), dtype=np.int64), "axes")
        factor = numpy_helper.from_array(np.float32(1 + seed), "factor")
        nodes = [
            helper.make_node("ReduceMean", [entry.name, "axes"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "factor"], ["number"]),
        ]
        tensors = [axes, factor]
        for name, shape in exits:  # (batch) -> (batch, 1, ...) -> (batch, *shape)
            ones = numpy_helper.from_array(np.array([-1] + [1] * len(shape), np.int64), f"{name}/ones")
            tile = numpy_helper.from_array(np.array([1, *shape], np.int64), f"{name}/tile")
            nodes += [
                helper.make_node("Reshape", ["number", f"{name}/ones"], [f"{name}/one"]),
                helper.make_node("Tile", [f"{name}/one", f"{name}/tile"], [name]),
            ]
            tensors += [ones, tile]
        _write_model(path, nodes, tensors, (entry.name, ["batch", *entry.shape[1:]]), exits)

    return _bundle(folder, app, config, inputs, model, seed=seed, targets=(TARGET,))


def _bundle(
    folder: Path,
    app: Application,
    config: Any,
    inputs: dict[str, np.ndarray[Any, Any]],
    write_model: Callable[[Path], None],
    *,
    seed: int,
    targets: tuple[str, ...],
) -> Path:
    with atomic.new_folder(folder) as work:
        for name in targets:
            write_model(work / f"model.{name}.onnx")
        outputs = Session(work / f"model.{targets[0]}.onnx").run(inputs)
        write_golden(work / GOLDEN_NAME, Golden(inputs, {FP32: outputs, **dict.fromkeys(targets, outputs)}))
        manifest = BundleManifest(
            application=app.name,
            config=to_table(config),
            version=0,
            parent_sha256=f"{seed:064x}",
            inputs=[asdict(s) for s in app.inputs(config)],
            outputs=[asdict(s) for s in app.outputs(config)],
            targets={n: {"file": f"model.{n}.onnx", "precision": "fp32", "golden_tolerance": 1e-3} for n in targets},
            files={
                p.name: {"sha256": atomic.sha256_file(p), "bytes": p.stat().st_size} for p in sorted(work.iterdir())
            },
        )
        atomic.write_json(work / MANIFEST_NAME, to_json(manifest))
    open_bundle(folder)
    return folder


def publish_toy(work: Path, *, seed: int = 0, **options: Any) -> Publication:
    """Publish a toy bundle into ``work/repo``; options go to ``toy_bundle`` and ``publish_bundle``."""
    made = {name: options.pop(name) for name in ("targets", "padding") if name in options}
    return publish_bundle(toy_bundle(work / f"bundle-{seed}", seed=seed, **made), work / "repo", **options)


class Files(http.server.SimpleHTTPRequestHandler):
    """A folder over HTTP, without byte ranges; ``paths`` records what was asked for."""

    paths: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.paths.append(self.path)


class RangeFiles(Files):
    """With byte ranges; breaks the connection after ``break_after`` bytes of each body, where that is above 0."""

    break_after = 0

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, start = path.read_bytes(), 0
        wanted = self.headers.get("Range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                self.send_error(416)
                return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        body = data[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.break_after and len(body) > self.break_after:
            self.wfile.write(body[: self.break_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            self.wfile.write(body)


@contextmanager
def served(
    folder: Path, handler: type[Files] = Files, *, tls: ssl.SSLContext | None = None, **settings: Any
) -> Iterator[tuple[str, list[str]]]:
    """(URL, list of the paths asked for) of ``folder`` on loopback; over https with ``tls``."""
    paths: list[str] = []
    kind = type("Handler", (handler,), {"paths": paths, **settings})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(folder)))
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}", paths
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def damage(path: Path, position: int = -10) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def onnx_operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(str(path)).graph.node}
