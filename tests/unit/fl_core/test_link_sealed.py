"""Signed batches and receipts: what a broker in between may not do."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from fl_core.contracts.errors import IntegrityError, RefusedError
from fl_core.identity import ca
from fl_core.identity.keys import PrivateKey, create_device_key, public_pem
from fl_core.link.batch import Batch, Record, pack, to_text
from fl_core.link.sealed import ReceiptReader, RecordGate, seal

STORE = "c" * 32
BATCH = Batch(store=STORE, records=(Record(seq=1, kind="telemetry", time=1.0, body={"n": 1}),))


class Ends:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys: dict[str, PrivateKey] = {n: create_device_key(folder / f"{n}.key") for n in ("van-1", "van-2")}
        self.gate = self.server("server")
        self.reader = ReceiptReader(folder / "server" / "ca" / "ca.pem")

    def server(self, name: str) -> RecordGate:
        folder = self.folder / name
        ca.create_ca(folder / "ca", "fleet-1")
        ca.issue_server_certificate(folder / "ca", folder, ["127.0.0.1"])
        pems = {name: public_pem(key) for name, key in self.keys.items()}
        return RecordGate.of_files("fleet-1", folder / "server.pem", folder / "server.key", pems.get)

    def sealed(self, device: str = "van-1", fleet: str = "fleet-1") -> dict[str, Any]:
        return seal(pack(BATCH), self.keys[device], fleet, device, have=self.reader.have)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return Ends(tmp_path_factory.mktemp("ends"))


def test_what_a_device_signed_is_taken_as_its_own(ends: Ends) -> None:
    assert ends.gate.open(ends.sealed(), "van-1") == BATCH


@pytest.mark.parametrize(
    "change",
    [
        {"z": to_text(pack(Batch(store=STORE, records=(Record(seq=1, kind="telemetry", time=1.0, body={}),))))},
        {"s": ""},
        {"s": base64.b64encode(b"x" * 96).decode()},
        {"s": None},
        {"z": 7},
    ],
)
def test_an_altered_batch_is_refused(ends: Ends, change: dict[str, Any]) -> None:
    with pytest.raises((IntegrityError, RefusedError)):
        ends.gate.open({**ends.sealed(), **change}, "van-1")


def test_a_batch_counts_for_its_signer_in_its_fleet_only(ends: Ends) -> None:
    with pytest.raises(RefusedError):
        ends.gate.open(ends.sealed("van-2"), "van-1")
    with pytest.raises(RefusedError):
        ends.gate.open(ends.sealed(fleet="other"), "van-1")
    with pytest.raises(RefusedError, match="revoked"):
        ends.gate.open(ends.sealed(), "van-3")


def test_a_receipt_is_believed_when_this_server_signed_it_for_this_device(ends: Ends) -> None:
    first = ends.gate.receipt("van-1", STORE, 7, have=ends.reader.have)
    assert ends.reader.read(first, "fleet-1", "van-1") == (STORE, 7)
    second = ends.gate.receipt("van-1", STORE, 8, have=ends.reader.have)
    assert "certificate" not in second, "it travels once"
    assert ends.reader.read(second, "fleet-1", "van-1") == (STORE, 8)
    for wrong in (
        {**second, "upto": 9},
        {**second, "store": "d" * 32},
        {**second, "s": ""},
        {**second, "s": 5},
        {**second, "certificate": "!"},
        {**second, "certificate": base64.b64encode(b"no certificate").decode()},
        ends.server("impostor").receipt("van-1", STORE, 99, have=""),
    ):
        with pytest.raises(IntegrityError):
            ends.reader.read(wrong, "fleet-1", "van-1")
    with pytest.raises(IntegrityError):
        ends.reader.read(second, "fleet-1", "van-2")
    assert ends.reader.read(second, "fleet-1", "van-1") == (STORE, 8), "a forged certificate is not remembered"
