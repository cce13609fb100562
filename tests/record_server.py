"""A server process for tests: the bridge alone. FOLDER PORT PASSWORD; ``identities`` first."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from fl_core.identity import ca
from fl_core.identity.keys import create_device_key, public_pem, read_public_key
from fl_core.link.sealed import RecordGate
from fl_core.link.session import BrokerAddress
from fl_core.link.topics import SERVER_ACCOUNT
from fl_server.bridge import Bridge


def identities(server: Path, device: Path) -> None:
    """Keys and certificates of both ends."""
    ca.create_ca(server / "ca", "fleet-1")
    ca.issue_server_certificate(server / "ca", server, ["127.0.0.1"])
    key = create_device_key(device / "keys" / "device.key")
    (device / "keys" / "device.pub").write_bytes(public_pem(key))
    (device / "ca.pem").write_bytes((server / "ca" / "ca.pem").read_bytes())


def main() -> int:
    address = BrokerAddress(
        host="127.0.0.1",
        port=int(sys.argv[2]),
        username=SERVER_ACCOUNT,
        password=sys.argv[3],
        client_id=SERVER_ACCOUNT,
        keepalive_s=20,
    )
    folder = Path(sys.argv[1])
    pem = read_public_key(folder.parent / "device" / "keys" / "device.pub")
    gate = RecordGate.of_files("fleet-1", folder / "server.pem", folder / "server.key", {"van-1": pem}.get)
    Bridge(folder, "fleet-1", address, gate=gate).start()
    print("up", flush=True)
    threading.Event().wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
