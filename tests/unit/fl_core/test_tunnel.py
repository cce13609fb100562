"""The tunnel without a network: two ends, and a broker between them that loses, repeats, swaps, alters and breaks off.

The oracle is a list of the bytes that were written: whatever the broker does, what is read is their beginning, and
all of it once the broker is honest again.
"""

from __future__ import annotations

import datetime
import random
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fl_core.contracts.errors import IntegrityError
from fl_core.identity import ca, keys
from fl_core.link.tunnel import packets
from fl_core.link.tunnel.channel import WINDOW
from fl_core.link.tunnel.end import End, Violation
from fl_core.link.tunnel.handshake import (
    DeviceHandshake,
    Keys,
    Place,
    ServerHandshake,
    UntrustedServer,
    authorities,
)
from fl_core.link.tunnel.packets import Frame, FrameKind, Kind, read_packet
from fl_core.link.tunnel.streams import FIRST_CREDIT, MAX_STREAMS, READ_WINDOW, Stream, Streams

SESSION = bytes(range(16))
PLACE = Place("fleet-1", "van-1")


def ends() -> tuple[End, End]:
    one, two = b"1" * 32, b"2" * 32
    return End(SESSION, Keys(one, two), server=False), End(SESSION, Keys(two, one), server=True)


def parse(data: bytes) -> packets.Packet:
    return read_packet(data, origin="test")


class Line:
    """One direction: packets on their way through the broker, and what the oracle knows."""

    def __init__(self, sender: End, receiver: End) -> None:
        self.sender, self.receiver = sender, receiver
        self.packets: list[bytes] = []
        self.opened: list[Stream] = []
        self.silent = False  # the broker does not say that it has taken packets

    def pump(self, now: float, *, lost: bool = False) -> None:
        for number, packet in self.sender.outgoing(now):
            if number is not None and not self.silent:
                self.sender.channel.taken(number, now, lost=lost)
            if not lost:
                self.packets.append(packet)

    def deliver(self, index: int, now: float) -> None:
        self.give(self.packets.pop(index), now)

    def give(self, packet: bytes, now: float) -> None:
        self.opened += self.receiver.take(parse(packet), now)


@settings(max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck))
class HostileBroker(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.device, self.server = ends()
        self.up, self.down = Line(self.device, self.server), Line(self.server, self.device)
        self.now, self.connected = 0.0, True
        self.asked: list[tuple[Stream, bytearray, bytearray]] = []  # stream, written by the device, read by it
        self.served: dict[int, tuple[Stream, bytearray, bytearray]] = {}  # by id: read by the server, written by it

    @rule(data=st.binary(max_size=200_000))
    def ask(self, data: bytes) -> None:
        if len(self.device.streams.open_streams) < MAX_STREAMS:
            stream = self.device.streams.open([b"POST", b"/path"])
            self.device.streams.write(stream, data)
            self.asked.append((stream, bytearray(data), bytearray()))
            self.step()

    @rule(data=st.binary(min_size=1, max_size=200_000), end=st.booleans(), pick=st.randoms(use_true_random=False))
    def write(self, data: bytes, end: bool, pick: random.Random) -> None:
        """On a random stream, from either side."""
        for side, table in ((self.device, self.asked), (self.server, list(self.served.values()))):
            if not table:
                continue
            stream, *logs = pick.choice(table)
            written = logs[0] if side is self.device else logs[1]
            if not stream.ended_out and stream.room:
                side.streams.write(stream, data)
                written += data
                if end:
                    side.streams.end(stream)
        self.step()

    @rule(index=st.integers(0, 1 << 16), upwards=st.booleans())
    def deliver(self, index: int, upwards: bool) -> None:
        """Any packet that is on its way: not always the first one."""
        line = self.up if upwards else self.down
        if line.packets:
            line.deliver(index % min(len(line.packets), WINDOW), self.now)
        self.step()

    @rule(index=st.integers(0, 1 << 16), upwards=st.booleans())
    def lose(self, index: int, upwards: bool) -> None:
        line = self.up if upwards else self.down
        if line.packets:
            line.packets.pop(index % len(line.packets))

    @rule(index=st.integers(0, 1 << 16), upwards=st.booleans())
    def repeat(self, index: int, upwards: bool) -> None:
        line = self.up if upwards else self.down
        if line.packets:
            packet = line.packets[index % len(line.packets)]
            line.give(packet, self.now)
            line.give(packet, self.now)
        self.step()

    @rule(index=st.integers(0, 1 << 16), place=st.integers(0, 1 << 20), bit=st.integers(0, 7), upwards=st.booleans())
    def alter(self, index: int, place: int, bit: int, upwards: bool) -> None:
        line = self.up if upwards else self.down
        if not line.packets:
            return
        packet = bytearray(line.packets[index % len(line.packets)])
        packet[place % len(packet)] ^= 1 << bit
        before = self.read_all()
        try:
            found = parse(bytes(packet))
            if found.session == SESSION and found.kind in (Kind.DATA, Kind.ACK):  # as the drivers choose
                line.give(bytes(packet), self.now)
        except IntegrityError:
            pass
        assert self.read_all() == before

    @rule(index=st.integers(0, 1 << 16), upwards=st.booleans())
    def reflect(self, index: int, upwards: bool) -> None:
        """A packet comes back to the side that sent it: numbers that are not taken yet must not open."""
        line, other = (self.up, self.down) if upwards else (self.down, self.up)
        if line.packets:
            packet = line.packets[index % len(line.packets)]
            try:
                other.give(packet, self.now)
            except IntegrityError:
                pass
            else:
                assert parse(packet).kind == Kind.DATA  # outside of the window: dropped before it is opened

    @rule(upwards=st.booleans())
    def break_link(self, upwards: bool) -> None:
        """What is on its way is lost; the side whose link it was says so when it is back."""
        line = self.up if upwards else self.down
        line.packets.clear()
        line.sender.channel.link_up(self.now)
        self.step()

    @rule(upwards=st.booleans(), silent=st.booleans())
    def fall_silent(self, upwards: bool, silent: bool) -> None:
        (self.up if upwards else self.down).silent = silent

    @rule(seconds=st.floats(0.01, 40.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.step()

    @rule(amount=st.integers(1, 300_000))
    def read(self, amount: int) -> None:
        for stream, _, received in self.asked:
            received += self.device.streams.read(stream, amount)
        for stream, received, _ in self.served.values():
            received += self.server.streams.read(stream, amount)
        self.step()

    def step(self) -> None:
        for line in (self.up, self.down):
            line.pump(self.now)
        for stream in self.up.opened:
            assert stream.id not in self.served, "a request was executed twice"
            assert stream.head == [b"POST", b"/path"]
            self.served[stream.id] = (stream, bytearray(), bytearray())
        self.up.opened.clear()

    def read_all(self) -> list[int]:
        found = [*self.asked, *self.served.values()]
        return [stream.waiting_in + stream.may_receive for stream, *_ in found]

    @invariant()
    def what_is_read_is_what_was_written(self) -> None:
        for stream, written, received in self.asked:
            if stream.id in self.served:
                _, got, answered = self.served[stream.id]
                assert written.startswith(got)
                assert answered.startswith(received)

    @invariant()
    def memory_is_bounded(self) -> None:
        for end in (self.device, self.server):
            assert end.channel.in_flight <= WINDOW
            for stream in end.streams.open_streams.values():
                assert stream.waiting_in <= (READ_WINDOW if stream.reading else FIRST_CREDIT)

    def teardown(self) -> None:
        """An honest broker again: everything arrives, each request once."""
        self.up.silent = self.down.silent = False
        for stream, *_ in self.asked:
            self.device.streams.end(stream)
        for _ in range(4_000):
            for stream, *_ in self.served.values():
                self.server.streams.end(stream)
            self.read(1 << 20)
            moved = False
            for line in (self.up, self.down):
                while line.packets:
                    line.deliver(0, self.now)
                    moved = True
            self.step()
            if not moved and not self.up.packets and not self.down.packets:
                arrived = not self.device.channel.in_flight and not self.server.channel.in_flight
                answered_all = all(stream.finished for stream, *_ in self.asked) and len(self.served) == len(self.asked)
                if arrived and answered_all:  # an answer may end before its request has arrived whole
                    break
                self.now += 5.0
        for stream, written, received in self.asked:
            _, got, answered = self.served[stream.id]
            assert got == written
            assert received == answered
        super().teardown()


TestHostileBroker = HostileBroker.TestCase


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    for name in ("ca", "other"):
        ca.create_ca(folder / name, "fleet-1")
        ca.issue_server_certificate(folder / name, folder / f"{name}-tls", ["localhost"])
    return folder


class Parties:
    def __init__(self, fleet: Path, *, issuer: str = "ca", place: Place = PLACE) -> None:
        self.key = keys.load_private_key(fleet / f"{issuer}-tls" / ca.SERVER_KEY_NAME)
        self.certificate = ca.load_certificate(fleet / f"{issuer}-tls" / ca.SERVER_NAME)
        self.device_key = ec.generate_private_key(ec.SECP384R1())
        self.device = DeviceHandshake(PLACE, self.device_key, authorities(fleet / "ca" / ca.CA_NAME))
        self.place = place

    def server(self, hello: bytes) -> ServerHandshake:
        der = self.certificate.public_bytes(x509_der())
        return ServerHandshake(self.place, parse(hello), der, self.key)


def x509_der() -> Any:
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.DER


def test_a_handshake_gives_both_the_same_keys_and_the_server_the_devices_key(fleet: Path) -> None:
    parties = Parties(fleet)
    server = parties.server(parties.device.hello())
    proof, device_keys = parties.device.finish(parse(server.answer))
    pem, server_keys = server.finish(parse(proof))
    assert pem == keys.public_pem(parties.device_key)
    assert (device_keys.send, device_keys.receive) == (server_keys.receive, server_keys.send)
    again = parties.server(parties.device.hello())
    with pytest.raises(IntegrityError, match="signature is not valid"):  # a recorded proof for a new answer
        again.finish(parse(proof))


@pytest.mark.parametrize("changes", [{"issuer": "other"}, {"place": Place("fleet-1", "van-2")}])
def test_a_server_of_another_authority_or_for_another_device_is_refused(fleet: Path, changes: dict[str, Any]) -> None:
    parties = Parties(fleet, **changes)
    server = parties.server(parties.device.hello())
    with pytest.raises(UntrustedServer):
        parties.device.finish(parse(server.answer))


def test_every_altered_byte_of_a_handshake_is_noticed(fleet: Path) -> None:
    parties = Parties(fleet)
    hello = parties.device.hello()
    server = parties.server(hello)
    proof, device_keys = parties.device.finish(parse(server.answer))
    generator = random.Random(0)
    for packet in (server.answer, proof):
        for place in generator.sample(range(packets.HEADER_BYTES, len(packet)), 60):
            wrong = bytearray(packet)
            wrong[place] ^= 1 << generator.randrange(8)
            with pytest.raises(IntegrityError):
                parties.device.finish(parse(bytes(wrong))) if packet is server.answer else server.finish(
                    parse(bytes(wrong))
                )
    for place in range(packets.HEADER_BYTES, len(hello)):
        wrong = bytearray(hello)
        wrong[place] ^= 1
        with pytest.raises(IntegrityError):
            parties.device.finish(parse(parties.server(bytes(wrong)).answer))
    assert server.finish(parse(proof))[1].send == device_keys.receive


def test_certificates_out_of_date_and_of_no_server_are_refused(fleet: Path) -> None:
    parties = Parties(fleet)
    answer = parse(parties.server(parties.device.hello()).answer)
    late = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=ca.SERVER_DAYS + 1)
    with pytest.raises(UntrustedServer, match="not valid now"):
        parties.device.finish(answer, now=late)
    parties.certificate = ca.load_certificate(fleet / "ca" / ca.CA_NAME)
    parties.key = keys.load_private_key(fleet / "ca" / ca.CA_KEY_NAME)
    with pytest.raises(UntrustedServer):
        parties.device.finish(parse(parties.server(parties.device.hello()).answer))
    assert isinstance(parties.certificate, x509.Certificate)


def test_a_device_that_sends_more_than_its_credit_ends_the_session() -> None:
    device, server = ends()
    stream = device.streams.open([b"POST", b"/"])
    stream.may_send = 1 << 20
    device.streams.write(stream, bytes(FIRST_CREDIT + 1))
    sent = [packet for _, packet in device.outgoing(0.0)]
    server.take(parse(sent[0]), 0.0)
    with pytest.raises(Violation, match="more bytes"):
        server.take(parse(sent[1]), 0.0)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(FrameKind.DATA, 7, b"x"),
        Frame(FrameKind.OPEN, 0, bytes(4)),
        Frame(FrameKind.OPEN, 1, b""),
        Frame(FrameKind.OPEN, 1, bytes(4) + b"\x00"),
    ],
)
def test_frames_that_make_no_sense_are_refused(frame: Frame) -> None:
    with pytest.raises(IntegrityError):
        Streams(server=True).take(packets.write_frames([frame]))


def test_one_request_too_many_is_reset_alone() -> None:
    device, server = ends()
    device_streams = [device.streams.open([b"GET", b"/"]) for _ in range(MAX_STREAMS)]
    with pytest.raises(IntegrityError, match="at a time"):
        device.streams.open([b"GET", b"/"])
    device.streams.open_streams.pop(device_streams[0].id)  # a device that does not count
    extra = device.streams.open([b"GET", b"/"])
    for _, packet in device.outgoing(0.0):
        server.take(parse(packet), 0.0)
    for _, packet in server.outgoing(0.0):
        device.take(parse(packet), 0.0)
    assert extra.reason == "too many requests at a time"
    assert all(not stream.reason for stream in device_streams)


@pytest.mark.parametrize("data", [b"", bytes(25), b"\x02" + bytes(30), b"\x01\x09" + bytes(30), bytes(70_000)])
def test_what_is_no_packet_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        parse(data)
