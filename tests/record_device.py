"""A device process for tests that only makes and delivers records. HOME NAME PASSWORD PORT TOTAL: record n holds {"n": n}."""

from __future__ import annotations

import sqlite3
import sys
import threading
from pathlib import Path

from fl_clients.connection import Transport, Unreachable, Welcome
from fl_clients.edge.courier import Courier
from fl_clients.edge.field_link import FieldLink
from fl_clients.edge.home import AgentHome
from fl_clients.edge.settings import MqttSettings, OutboxSettings
from fl_core.identity.keys import load_private_key
from fl_core.link.backoff import Backoff


def no_transport() -> Transport:
    raise Unreachable("this device has its broker only")


def main() -> int:
    folder, name, password, port, total = (
        Path(sys.argv[1]),
        sys.argv[2],
        sys.argv[3],
        int(sys.argv[4]),
        int(sys.argv[5]),
    )
    link = FieldLink(
        AgentHome(folder),
        MqttSettings(),
        dict,
        lambda: courier.ring(),
        OutboxSettings(hold_s=0),
        load_private_key(folder / "keys" / "device.key"),
        answered=lambda store, upto: courier.answered(store, upto),
    )
    courier = Courier(link.records, link, no_transport, answer_s=1.0, backoff=Backoff(0.05, 0.2))
    mqtt = {"host": "127.0.0.1", "port": port, "tls": False, "username": name, "password": password}
    link.enter(Welcome(name, "fleet-1", 1, mqtt, "", None, 0.0))
    stop = threading.Event()
    threading.Thread(target=courier.run, args=(stop,), daemon=True).start()

    def pump() -> None:
        while not stop.is_set():
            link.receive(1.0)

    threading.Thread(target=pump, daemon=True).start()
    while (number := _last(folder / "outbox.db") + 1) <= total:
        assert link.report("count", {"n": number}) is None
        print(number, flush=True)
    while link.records.first() is not None:
        stop.wait(0.02)
    print("delivered", flush=True)
    stop.wait()
    return 0


def _last(file: Path) -> int:
    with sqlite3.connect(file) as database:
        row = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
    return int(row[0]) if row else 0


if __name__ == "__main__":
    raise SystemExit(main())
