"""For unmodified Flower programs: a bundle without code for ``flower-supernode``, and what ``flwr`` lists.

A stock SuperNode runs no message without a bundle. Ours holds nothing but the name of a module that must be installed on
the device, as for our own agents: no code travels.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import zipfile
from typing import Any

CLIENT_APP = "fl_clients.training.client_app:app"
BUNDLE_ID, BUNDLE_VERSION = "fieldfleet/fieldfleet-client", "1.0.0"
_PYPROJECT = f"""\
[project]
name = "fieldfleet-client"
version = "{BUNDLE_VERSION}"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fieldfleet"

[tool.flwr.app.components]
serverapp = "{CLIENT_APP}"
clientapp = "{CLIENT_APP}"
"""
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # the same bytes, and the same hash, at every start
CONTROL_PATH = "/v1/control/"
_LISTS = {
    "list-runs": ("ListRunsRequest", "list_runs"),
    "list-nodes": ("ListNodesRequest", "list_nodes"),
}


def bundle() -> bytes:
    """A Flower App Bundle (FAB): pyproject.toml and its manifest."""
    content = _PYPROJECT.encode()
    manifest = f"pyproject.toml,{hashlib.sha256(content).hexdigest()},{len(content) * 8}"
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in (("pyproject.toml", content), (".info/CONTENT", manifest.encode())):
            archive.writestr(zipfile.ZipInfo(name, _FIRST_DATE), data, zipfile.ZIP_DEFLATED)
    return target.getvalue()


def store_bundle(state: Any) -> tuple[str, str, str]:
    """(id, version, hash) of the bundle, in Flower's state."""
    fab = importlib.import_module("flwr.supercore.fab")
    return BUNDLE_ID, BUNDLE_VERSION, str(state.store_fab(fab.Fab("", bundle(), {})))


def listing(state: Any, name: str, body: bytes) -> bytes | None:
    """The answer to one of the Control API's lists; None for any other call. Raises DecodeError, FlowerError."""
    if name not in _LISTS:
        return None
    kind, handler = _LISTS[name]
    messages = importlib.import_module("flwr.proto.control_pb2")
    handlers = importlib.import_module("flwr.superlink.servicer.control.control_handlers")
    constant = importlib.import_module("flwr.common.constant")
    account = importlib.import_module("flwr.supercore.auth.typing").AccountInfo(
        flwr_aid=constant.NOOP_FLWR_AID, account_name=constant.NOOP_ACCOUNT_NAME
    )
    answer = getattr(handlers, handler)(getattr(messages, kind).FromString(body), account, state)
    return bytes(answer.SerializeToString())
