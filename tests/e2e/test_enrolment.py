"""Token -> approve -> working, with the real commands; rotation of the key; revocation while a device waits."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fl_clients import enrolment
from fl_clients.connection import CertificateRefused, ServerConnection, Unregistered, welcome
from fl_clients.edge.home import AgentHome
from fl_core.contracts.errors import FieldfleetError, RefusedError
from fl_core.identity import keys
from fl_core.identity.token import EnrolmentToken, certificate_sha256, read_token
from fl_server.home import ServerHome
from fl_server.superlink import SuperLink
from tests.federation import joined, new_home, new_key, running
from tests.field import Field
from tests.helpers import eventually, fieldfleet


def document(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    done = fieldfleet(*arguments, "--json")
    assert done.returncode == code, done.stderr
    return dict(json.loads(done.stdout or "{}"))


def new_token(superlink: SuperLink, *, uses: int = 1, auto: bool = True) -> EnrolmentToken:
    secret = superlink.registry.tokens.create(uses=uses, valid_s=600, group="", auto_approve=auto)[1]
    ca = superlink.home.ca_file.read_bytes()
    return EnrolmentToken(superlink.url, certificate_sha256(ca, origin="ca"), secret)


def test_token_approve_working(tmp_path: Path) -> None:
    field = Field(tmp_path)
    try:
        home = ("--home", field.home.path)
        token = document("fleet", "token", "create", "--uses", "1", "--expires", "1d", "--group", "north", *home)
        assert re.fullmatch(r"ff1\.[A-Za-z0-9_-]+", token["token"])
        assert read_token(token["token"]).url == f"https://127.0.0.1:{field.home.settings.listen.port}"
        field.agent = tmp_path / "enrolled"
        made = document("agent", "init", field.agent, "--token", token["token"], "--name", "van-1")
        assert (made["name"], made["status"]) == ("van-1", "pending")
        assert (field.agent / "ca.pem").read_bytes() == field.home.ca_file.read_bytes()
        again = fieldfleet("agent", "init", tmp_path / "second", "--token", token["token"], "--name", "van-2")
        assert again.returncode == 4
        assert "not valid" in again.stderr
        assert not (tmp_path / "second").exists(), "the whole home or nothing"
        with field.running(alive=False):
            eventually(lambda: "waits for approval" in field.log(), 60)
            assert document("fleet", "list", "--status", "pending", *home)["devices"][0]["group"] == "north"
            document("fleet", "approve", "van-1", *home)
            assert field.bridge.wait_alive(["van-1"], 90), field.log()
            shown = document("fleet", "show", "van-1", *home)
            assert (shown["status"], shown["presence"]) == ("active", "alive")
            assert shown["version"]
            assert abs(shown["state"]["clock"]["skew_s"]) < 60
            assert [h["what"] for h in shown["history"]] == ["approved", "enrolled"]
            # what a command changes reaches the server without a ring too
            field.superlink.fleet_watch.on_shut_out(field.service.end_sessions)
            document("fleet", "revoke", "van-1", *home)
            eventually(lambda: not field.device()["alive"], 60)
    finally:
        field.stop()


def test_lists_csv_and_aliases(tmp_path: Path) -> None:
    home = new_home(tmp_path / "home")
    new_key(tmp_path / "a")
    at = ("--home", home.path)
    document("server", "register", tmp_path / "a" / "device.pub", "--name", "van-a", *at)
    new_key(tmp_path / "b")
    table = tmp_path / "fleet.csv"
    table.write_text("name,public_key,group,tags\nvan-b,b/device.pub,north,diesel camera\nvan b,b/device.pub,,\n")
    wrong = fieldfleet("fleet", "import", table, *at)
    assert wrong.returncode == 2
    assert "line 3" in wrong.stderr
    assert [d["name"] for d in document("fleet", "list", *at)["devices"]] == ["van-a"]
    table.write_text("name,public_key,group,tags\nvan-b,b/device.pub,north,diesel camera\n")
    document("fleet", "import", table, *at)
    document("fleet", "group", "south", "van-a", *at)
    document("fleet", "tag", "van-a", "--add", "camera", *at)
    assert [d["name"] for d in document("fleet", "list", "--tag", "camera", *at)["devices"]] == ["van-a", "van-b"]
    assert [d["name"] for d in document("fleet", "list", "--group", "south", *at)["devices"]] == ["van-a"]
    exported = fieldfleet("fleet", "export", *at)
    other = new_home(tmp_path / "other")
    (tmp_path / "export.csv").write_text(exported.stdout)
    document("fleet", "import", tmp_path / "export.csv", "--home", other.path)
    before, after = ServerHome(home.path).registry(), ServerHome(other.path).registry()
    facts = [[(d.name, d.public_key_pem, d.group, d.tags) for d in r.devices()] for r in (before, after)]
    before.close()
    after.close()
    assert facts[0] == facts[1]
    assert fieldfleet("fleet", "revoke", "van-z", *at).returncode == 2


def test_the_authority_must_be_that_of_the_token(tmp_path: Path) -> None:
    with running(new_home(tmp_path / "one")) as one, running(new_home(tmp_path / "two")) as two:
        token = new_token(one)
        assert enrolment.fetch_authority(token) == one.home.ca_file.read_bytes()
        wrong = EnrolmentToken(two.url, token.ca_sha256, token.secret)
        with pytest.raises(RefusedError, match="authority"):
            enrolment.fetch_authority(wrong)
        # and were the fingerprint not looked at, TLS would still be
        key = new_key(tmp_path / "device")
        connection = ServerConnection(two.url, one.home.ca_file, key)
        with pytest.raises(CertificateRefused):
            enrolment.enrol(connection, token, key, "van-1")
        assert two.registry.devices() == []


def test_the_door_takes_little_and_seldom(tmp_path: Path) -> None:
    with running(new_home(tmp_path / "home")) as superlink:
        token, key = new_token(superlink), new_key(tmp_path / "device")
        connection = ServerConnection(superlink.url, superlink.home.ca_file, key)
        path = enrolment.ENROL_PATH
        assert connection.request("POST", path, b"x" * 9_000, limit=10_000).status == 413
        assert connection.request("POST", path, b"[" * 5_000, limit=10_000).status == 400
        assert connection.request("POST", path, b'{"token": 1}', limit=10_000).status == 400
        stolen = new_key(tmp_path / "other")
        body = {"token": token.secret, "name": "van-1", "public_key": keys.public_pem(stolen).decode(), "proof": "AA=="}
        assert connection.request("POST", path, json.dumps(body).encode(), limit=10_000).status == 401
        assert enrolment.enrol(connection, token, key, "van-1").status == "active"
        statuses = set[str]()
        for _ in range(40):
            try:
                enrolment.enrol(connection, EnrolmentToken(token.url, token.ca_sha256, "a.b"), key, "van-2")
            except FieldfleetError as error:
                statuses.add(
                    "many" if "too many" in error.message else "invalid" if "not valid" in error.message else ""
                )
        assert statuses == {"many", "invalid"}
        assert welcome(connection).name == "van-1", "who is known is not held up"
        connection.close()


def enrolled_home(superlink: SuperLink, folder: Path) -> AgentHome:
    made = fieldfleet("agent", "init", folder, "--token", new_token(superlink).text(), "--name", "van-1")
    assert made.returncode == 0, made.stderr
    return AgentHome(folder)


def test_rotation(tmp_path: Path) -> None:
    with running(new_home(tmp_path / "home")) as superlink:
        home = enrolled_home(superlink, tmp_path / "agent")
        old = keys.load_private_key(home.key_file)
        document("agent", "rotate-key", home.folder)
        new = keys.load_private_key(home.key_file)
        assert keys.public_pem(new) != keys.public_pem(old)
        assert home.public_key_file.read_bytes() == keys.public_pem(new)
        for key, known in ((old, False), (new, True)):
            connection = ServerConnection(superlink.url, superlink.home.ca_file, key)
            if known:
                assert welcome(connection).name == "van-1"
            else:
                with pytest.raises(Unregistered, match="replaced by a newer one"):
                    welcome(connection)
            connection.close()


def test_a_rotation_that_was_cut_off_is_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(new_home(tmp_path / "home")) as superlink:
        home = enrolled_home(superlink, tmp_path / "agent")
        old = home.key_file.read_bytes()
        connection = ServerConnection(superlink.url, home.ca_file, keys.load_private_key(home.key_file))
        with monkeypatch.context() as patch:  # the power fails after the server took the key
            patch.setattr(enrolment, "_adopt", lambda home: None)
            enrolment.rotate_key(home, connection)
        connection.close()
        assert home.key_file.read_bytes() == old
        enrolment.settle_rotation(home, home.settings())
        assert home.key_file.read_bytes() != old
        assert not enrolment.new_key_file(home).exists()
        # and before the server heard of it
        before = home.key_file.read_bytes()
        enrolment.new_key_file(home).write_bytes(before)
        keys.write_private_key(enrolment.new_key_file(home), new_key(tmp_path / "unheard"))
        enrolment.settle_rotation(home, home.settings())
        assert home.key_file.read_bytes() == before
        document("agent", "rotate-key", home.folder)
        assert home.key_file.read_bytes() != before


def test_revocation_ends_a_long_poll_at_once(tmp_path: Path) -> None:
    with running(new_home(tmp_path / "home")) as superlink:
        client = joined(superlink, tmp_path, "van-1")
        refused: list[Exception] = []
        began = threading.Event()

        def wait() -> None:
            began.set()
            try:
                client.receive(300.0, every=300.0)
            except Exception as error:
                refused.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        began.wait()
        node = superlink.directory.node(superlink.registry.devices()[0])
        eventually(lambda: node in superlink.bell._doors, 60)
        start = time.monotonic()
        document("fleet", "revoke", "van-1", "--home", superlink.home.path)
        thread.join(60)
        assert not thread.is_alive()
        assert time.monotonic() - start < 60, "not after the 300 s of its poll"
        assert isinstance(refused[0], Unregistered), refused
        assert "revoked" in str(refused[0])
        assert superlink.grid().device_names() == {}
