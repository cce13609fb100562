"""A federation to disturb: the real engine and SuperLink over TLS in this process, devices in processes of their own.

What each device adds to the model depends on its name and the round, and so does its weight: whatever is lost, counted
twice or counted in the wrong round shows in the final weights.
"""

from __future__ import annotations

import collections
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fl_core.contracts import checkpoint as checkpoints
from fl_core.contracts.arrays import Arrays
from fl_core.identity import keys
from fl_core.learning.application import application
from fl_server.engine import RoundEngine
from fl_server.history import RoundRecord
from fl_server.home import ServerHome
from fl_server.superlink import SuperLink
from tests.fault_proxy import TcpProxy, proxy_to
from tests.federation import ARRAYS, DeviceProcess, new_home, running
from tests.helpers import eventually
from tests.mqtt_helpers import free_port

NAMES = ("van-1", "lorry-22")
TOY = "toy_regression"
DEADLINE = 120.0
BIG: Arrays = {"weight": np.random.default_rng(0).normal(size=(1 << 20)).astype(np.float32)}  # 4 MB


def step(device: str, round: int) -> float:
    """What ``tests/echo_worker.py`` adds with the switch ``vary``."""
    return zlib.crc32(f"{device} {round}".encode()) / 2**32


def weight(device: str, round: int) -> int:
    return len(device) + round


def expected(
    start: Arrays, counted: Sequence[Sequence[str]], by_hand: Mapping[str, tuple[float, int]] | None = None
) -> Arrays:
    """The model when in each round exactly these devices count, once each. by_hand: device -> (step, weight)."""
    arrays = {name: array.astype(np.float64) for name, array in start.items()}
    hand = by_hand or {}
    for number, names in enumerate(counted, 1):
        if names:
            moves = [hand.get(name, (step(name, number), weight(name, number))) for name in names]
            moved = sum(by * count for by, count in moves) / sum(count for _, count in moves)
            arrays = {name: array + moved for name, array in arrays.items()}
    return arrays


class Arena:
    """``devices`` are registered and started; ``begin()`` starts the rounds, ``finish()`` waits for their end."""

    def __init__(
        self, superlink: SuperLink, devices: Sequence[DeviceProcess], out: Path, proxy: TcpProxy | None, model: Arrays
    ) -> None:
        self.superlink, self.devices, self.out, self.model = superlink, list(devices), out, model
        self._proxy = proxy
        self.records: list[RoundRecord] = []
        self.after: dict[int, Callable[[], None]] = {}  # round -> called when it has ended, before the next begins
        self.failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.stop = threading.Event()

    @property
    def proxy(self) -> TcpProxy:
        assert self._proxy is not None
        return self._proxy

    def device(self, name: str) -> DeviceProcess:
        return next(device for device in self.devices if device.name == name)

    def engine(self, rounds: int, *overrides: str) -> RoundEngine:
        app = application(TOY)
        settings = [f"algorithm.deadline_s={DEADLINE}", "algorithm.evaluate_every=0", *overrides]
        return RoundEngine(
            grid=self.superlink.grid(),
            application=app,
            config=app.configure(settings),
            start=None,
            initial=self.model,
            num_rounds=rounds,
            seed=0,
            out=self.out,
            stage="federated",
            on_round=self._ended,
            stop=self.stop,
        )

    def begin(self, rounds: int, *overrides: str) -> None:
        names = {device.name for device in self.devices}
        eventually(lambda: names <= set(self.superlink.grid().device_names().values()), 60)
        engine = self.engine(rounds, f"algorithm.min_clients={len(self.devices)}", *overrides)

        def run() -> None:
            try:
                engine.run()
            except BaseException as error:
                self.failure = error

        self._thread = threading.Thread(target=run, name="rounds", daemon=True)
        self._thread.start()

    def _ended(self, record: RoundRecord) -> None:
        if record.round in self.after:
            self.after[record.round]()
        self.records.append(record)  # who waits for the round finds what was to come after it done

    def wait_round(self, number: int, timeout: float = 90.0) -> RoundRecord:
        def ended() -> bool:
            if self.failure is not None:
                raise AssertionError(f"the run ended: {self.failure}\n{self.logs()}") from self.failure
            return len(self.records) >= number

        eventually(ended, timeout)
        return self.records[number - 1]

    def finish(self, timeout: float = 90.0) -> list[RoundRecord]:
        assert self._thread is not None
        self._thread.join(timeout)
        assert not self._thread.is_alive(), f"round {len(self.records) + 1} did not end\n{self.logs()}"
        assert self.failure is None, f"{self.failure}\n{self.logs()}"
        return self.records

    def close(self) -> None:
        self.stop.set()
        self.superlink.bell.ring_engine()
        if self._thread is not None:
            self._thread.join(30)

    def logs(self) -> str:
        return "\n".join(f"{device.name}: {device.events[-8:]}\n{device.log()[-2000:]}" for device in self.devices)

    # what every fault has to leave true

    def check_model(
        self,
        counted: Sequence[Sequence[str]] | None = None,
        by_hand: Mapping[str, tuple[float, int]] | None = None,
    ) -> None:
        """Each round counted exactly these devices (default: all), once, and the weights say so too."""
        counted = counted if counted is not None else [[d.name for d in self.devices]] * len(self.records)
        found = [sorted(record.clients) for record in self.records]
        assert found == [sorted(names) for names in counted], [
            (list(r.clients), r.refused, r.late, r.skipped) for r in self.records
        ]
        arrays = checkpoints.load(self.out).arrays
        for name, array in expected(self.model, counted, by_hand).items():
            np.testing.assert_allclose(arrays[name], array, rtol=1e-5, atol=1e-5)

    def check_acknowledged(self) -> None:
        """What the server took from a device (it said so, and the device forgot its copy) is in the model."""
        for device in self.devices:
            told = collections.Counter(event for event, _ in list(device.events))
            counted = sum(device.name in record.clients for record in self.records)
            assert told["reply"] - told["dropped"] <= counted, device.events
            assert not list((device.folder / "fleet" / "outbox").glob("*.reply"))

    def check_trained(self, again: Mapping[str, int] | None = None) -> None:
        """Each device trained once a round; ``again``: how many rounds it may have begun a second time."""
        for device in self.devices:
            seen = collections.Counter(device.seen())
            extra = sum(seen.values()) - len(self.records)
            assert set(seen) == set(range(1, len(self.records) + 1))
            assert 0 <= extra <= (again or {}).get(device.name, 0), f"{device.name} trained {device.seen()}"


@contextmanager
def arena(
    folder: Path,
    *,
    names: Sequence[str] = NAMES,
    proxied: bool = False,
    model: Arrays = ARRAYS,
    home: ServerHome | None = None,
    prepare: Callable[[DeviceProcess], Any] = lambda device: None,
) -> Iterator[Arena]:
    """``proxied``: the first device reaches the server through ``arena.proxy``. prepare(device) before it starts."""
    port = free_port()
    home = home or new_home(folder / "home", port=port)
    started: list[DeviceProcess] = []
    with running(home, port=port) as superlink, proxy_to(port) as proxy:
        try:
            for name in names:
                target = proxy.port if proxied and name == names[0] else port
                device = DeviceProcess(f"https://127.0.0.1:{target}", home.ca_file, folder, name)
                superlink.registry.register(name, keys.public_pem(device.key))
                device.switch("vary", True)
                prepare(device)
                device.start()
                started.append(device)
            found = Arena(superlink, started, folder / "out", proxy, model)
            try:
                yield found
            finally:
                found.close()
        finally:
            for device in started:
                device.stop(signal.SIGKILL)


def workers(device: DeviceProcess) -> list[int]:
    """Worker processes of this device, from /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        if str(device.switches).encode() in words and words[1].endswith(b"_worker.py"):
            found.append(int(folder.name))
    return found
