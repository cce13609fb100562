"""A server process for tests: the bridge alone. FOLDER PORT PASSWORD."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from fl_core.link.session import BrokerAddress
from fl_core.link.topics import SERVER_ACCOUNT
from fl_server.bridge import Bridge


def main() -> int:
    address = BrokerAddress(
        host="127.0.0.1",
        port=int(sys.argv[2]),
        username=SERVER_ACCOUNT,
        password=sys.argv[3],
        client_id=SERVER_ACCOUNT,
        keepalive_s=20,
    )
    Bridge(Path(sys.argv[1]), "fleet-1", address).start()
    print("up", flush=True)
    threading.Event().wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
