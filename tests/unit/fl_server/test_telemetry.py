"""The server's table of telemetry: each record once, in order, gaps counted, readers with a durable place; and its two doors."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_clients.connection import Transport
from fl_clients.edge.courier import Courier
from fl_core.contracts.errors import InputError
from fl_core.identity import keys
from fl_core.link.batch import TELEMETRY_PATH, Batch, Record
from fl_core.link.envelope import Envelope
from fl_core.link.record_log import RecordLog
from fl_server.superlink import SuperLink
from fl_server.telemetry import Telemetry
from tests.federation import connect, new_home, new_key, running
from tests.helpers import eventually, fieldfleet

STORE = "a" * 32


@pytest.fixture
def telemetry(tmp_path: Path) -> Iterator[Telemetry]:
    found = Telemetry(tmp_path / "devices.db", max_per_device=50)
    yield found
    found.close()


def batch(*numbers: int, store: str = STORE) -> Batch:
    return Batch(store=store, records=tuple(Record(seq=n, kind="telemetry", time=n, body={"n": n}) for n in numbers))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["van-1", "van-2"]), st.sampled_from(["send", "answer lost", "dropped"]), st.integers(1, 5)
        ),
        max_size=30,
    )
)
def test_devices_that_repeat_and_drop(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int]]
) -> None:
    """Each device: a queue of numbers of which the oldest are sent until they are known to be taken."""
    telemetry = Telemetry(tmp_path_factory.mktemp("t") / "devices.db")
    queues: dict[str, list[int]] = {"van-1": [], "van-2": []}
    made, sent, seen = {"van-1": 0, "van-2": 0}, {"van-1": set[int](), "van-2": set[int]()}, list[tuple[str, int]]()
    for device, what, count in steps:
        queue = queues[device]
        queue += range(made[device] + 1, made[device] + count + 1)
        made[device] += count
        if what == "dropped":
            del queue[:1]
            continue
        taken = telemetry.take(device, batch(*queue[:4]))
        assert {record.seq for record in taken.fresh} == set(queue[:4]) - sent[device]
        sent[device] |= set(queue[:4])
        assert taken.upto >= queue[:4][-1]
        if what == "send":
            queues[device] = [n for n in queue if n > taken.upto]
        reader = telemetry.reader("r")
        seen += [(entry.device, entry.seq) for entry in reader]
        reader.commit()
    for device in queues:
        mine = [n for name, n in seen if name == device]
        assert mine == sorted(sent[device]), "once each, in the order they were made"
        assert telemetry.missing().get(device, 0) == (max(mine) - len(mine) if mine else 0)
    telemetry.close()


def test_a_reader_goes_on_where_it_committed(telemetry: Telemetry) -> None:
    telemetry.take("van-1", batch(1, 2, 3))
    reader = telemetry.reader("etl")
    assert [e.seq for e in reader] == [1, 2, 3]
    assert [e.seq for e in telemetry.reader("etl")] == [1, 2, 3], "nothing was committed"
    reader.commit()
    telemetry.take("van-1", batch(3, 4))
    again = telemetry.reader("etl")
    assert [e.seq for e in again] == [4]
    assert [e.seq for e in telemetry.read(since=2)] == [3, 4]
    with pytest.raises(InputError):
        telemetry.reader("../etl")


def test_limits_of_the_server_are_seen_by_the_reader_as_expired(telemetry: Telemetry) -> None:
    reader = telemetry.reader("slow")
    for n in range(1, 71):
        telemetry.take("van-1", batch(n))
    assert [e.seq for e in reader] == list(range(21, 71))
    assert reader.expired == 20
    assert telemetry.expired(since=0, until=telemetry.last()) == 20
    assert telemetry.missing() == {"van-1": 0}
    assert telemetry.take("van-1", batch(3)).fresh == (), "what has expired is not new"


def test_old_entries_go(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path / "devices.db", max_age_s=-1)
    telemetry.take("van-1", batch(1))
    telemetry.take("van-2", batch(1))
    assert telemetry.read() == []
    assert telemetry.take("van-1", batch(1, 2)).upto == 2
    telemetry.close()


def test_a_wiped_device_starts_a_new_store_and_single_reports_are_known_by_their_id(telemetry: Telemetry) -> None:
    telemetry.take("van-1", batch(1, 2))
    assert len(telemetry.take("van-1", batch(1, 2, store="b" * 32)).fresh) == 2
    report = Envelope(type="inference", id="one", body={"n": 9})
    assert telemetry.take_report("van-1", report)
    assert not telemetry.take_report("van-1", report)
    assert telemetry.take_report("van-2", report)
    assert [r["n"] for r in telemetry.latest("van-1")] == [9, 2, 1, 2, 1]
    assert [e.kind for e in telemetry.read(kind="inference", device="van-2")] == ["inference"]


# over HTTPS


class NoBroker:
    def send_records(self, data: bytes) -> bool:
        return False


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    with running(new_home(tmp_path_factory.mktemp("server") / "home")) as found:
        yield found


def test_a_device_without_mqtt_delivers_by_requests(superlink: SuperLink, tmp_path: Path) -> None:
    key = new_key(tmp_path)
    log = RecordLog(tmp_path / "o.db")
    for n in range(450):
        log.append("telemetry", {"n": n})
    connection = connect(superlink, key)
    courier = Courier(log, NoBroker(), lambda: connection)
    assert not courier.flush(5), "refused: nobody knows this device"
    assert log.depth() == (450, 0)
    superlink.registry.register("box-1", keys.public_pem(key))
    stop = threading.Event()
    thread = threading.Thread(target=courier.run, args=(stop,))
    thread.start()
    try:
        eventually(lambda: log.first() is None, 60)
        log.append("telemetry", {"n": 450})
        eventually(lambda: log.first() is None, 60)
    finally:
        stop.set()
        courier.interrupt()
        thread.join(30)
    entries = superlink.telemetry.read(device="box-1", limit=1000)
    assert [e.body["n"] for e in entries] == list(range(451))
    log.close()
    _hostile(connection)
    _as_an_operator(superlink)


def _hostile(connection: Transport) -> None:
    assert connection.request("POST", TELEMETRY_PATH, b"x", limit=9999).status == 400
    assert connection.request("POST", TELEMETRY_PATH, b"x" * 60_000, limit=9999).status == 413


def _as_an_operator(superlink: SuperLink) -> None:
    home = superlink.home.path
    done = fieldfleet("fleet", "telemetry", "--home", home, "--device", "box-1", "--since", "440", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [e["body"]["n"] for e in document["entries"]] == list(range(440, 451))
    assert (document["next"], document["expired"], document["missing"]) == (451, 0, {"box-1": 0})
    counts = []
    for _ in range(3):
        done = fieldfleet("fleet", "telemetry", "--home", home, "--reader", "etl", "--limit", "300", "--json")
        counts.append(len(json.loads(done.stdout)["entries"]))
    assert counts == [300, 151, 0]
    assert fieldfleet("fleet", "telemetry", "--home", home, "--reader", "etl", "--device", "box-1").returncode == 2
