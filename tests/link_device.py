"""A device process for tests: FleetLink alone. URL CA KEY HOME WORKER..., events as JSON lines on stdout."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path

from fl_clients.connection import ServerConnection
from fl_clients.training.link import FleetLink
from fl_core.identity.keys import load_private_key


def main() -> int:
    url, ca, key, home, *worker = sys.argv[1:]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())

    def tell(event: str, facts: object) -> None:
        print(json.dumps([event, facts]), flush=True)

    connection = ServerConnection(url, Path(ca), load_private_key(Path(key)))
    FleetLink(connection, Path(home), worker, on_event=tell, poll_seconds=20).run(stop)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
