"""The fleet: tokens, approval, groups, tags, rotation, history; and the door that unknown devices knock at."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from fl_core.contracts.errors import InputError, RefusedError
from fl_core.identity import keys
from fl_core.identity.signature import HeaderSigner, sign_statement, verify, verify_statement
from fl_core.identity.token import EnrolmentToken, read_token
from fl_server.doorman import RateLimit
from fl_server.registry import Registry
from tests.helpers import refusal

KEYS = [ec.generate_private_key(ec.SECP384R1()) for _ in range(4)]
PEMS = [keys.public_pem(key) for key in KEYS]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry.db")


def token(registry: Registry, *, uses: int = 1, valid_s: float = 60.0, group: str = "", auto: bool = False) -> str:
    return registry.tokens.create(uses=uses, valid_s=valid_s, group=group, auto_approve=auto)[1]


def test_a_token_lets_in_as_many_as_it_says_and_they_wait(registry: Registry) -> None:
    secret = token(registry, uses=2, group="north")
    one = registry.enrol(secret, "van-1", PEMS[0])
    assert (one.status, one.group) == ("pending", "north")
    assert registry.mqtt_password("van-1") is None
    assert registry.enrol(secret, "van-1", PEMS[0]) == one, "a lost answer costs no use"
    registry.enrol(secret, "van-2", PEMS[1])
    with pytest.raises(RefusedError, match="not valid"):
        registry.enrol(secret, "van-3", PEMS[2])
    assert registry.approve(["van-1"])[0].status == "active"
    assert registry.mqtt_password("van-1")
    assert [d.status for d in registry.devices()] == ["active", "pending"]


def test_tokens_that_are_wrong_expired_or_withdrawn(registry: Registry) -> None:
    expired = token(registry, valid_s=1.0)
    registry._database.execute("UPDATE tokens SET expires=1")
    withdrawn = token(registry, uses=5, auto=True)
    registry.tokens.withdraw(withdrawn.partition(".")[0])
    for secret in (expired, withdrawn, withdrawn + "x", "", "nothing.at all"):
        with pytest.raises(RefusedError, match="not valid"):
            registry.enrol(secret, "van-1", PEMS[0])
    assert registry.devices() == []
    for wrong in ({"uses": 0}, {"valid_s": 0.0}, {"valid_s": float("nan")}):
        with pytest.raises(InputError):
            token(registry, **wrong)  # type: ignore[arg-type]


def test_a_token_never_lets_in_more_than_its_uses_at_the_same_time(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry.db")
    secret, let_in = token(registry, uses=2, auto=True), []

    def knock(number: int) -> None:
        own = Registry(tmp_path / "registry.db")
        try:
            let_in.append(own.enrol(secret, f"van-{number}", PEMS[number]).name)
        except RefusedError:
            pass
        finally:
            own.close()

    threads = [threading.Thread(target=knock, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(let_in) == 2
    assert len(registry.devices()) == 2


def test_rotation_replaces_the_key_for_good(registry: Registry) -> None:
    registry.register("van-1", PEMS[0])
    registry.register("van-2", PEMS[1])
    password = registry.mqtt_password("van-1")
    assert registry.rotate("van-1", PEMS[0], PEMS[2]).public_key_pem == PEMS[2]
    assert registry.rotate("van-1", PEMS[0], PEMS[2]).public_key_pem == PEMS[2], "a lost answer"
    assert registry.mqtt_password("van-1") == password
    assert registry.by_key(PEMS[0]) is None
    assert registry.former_owner(PEMS[0]) == "van-1"
    with pytest.raises(InputError, match="replaced"):
        registry.register("van-9", PEMS[0])
    with pytest.raises(InputError, match="in use"):
        registry.rotate("van-1", PEMS[2], PEMS[1])
    with pytest.raises(RefusedError, match="meanwhile"):
        registry.rotate("van-1", PEMS[0], PEMS[3])
    registry.revoke("van-1")
    with pytest.raises(RefusedError, match="revoked"):
        registry.rotate("van-1", PEMS[2], PEMS[3])


def test_groups_tags_and_history(registry: Registry) -> None:
    for number in range(2):
        registry.register(f"van-{number}", PEMS[number], group="north", tags=["diesel"])
    registry.set_group(["van-0"], "south")
    changed = registry.change_tags(["van-0", "van-1"], ["camera", "camera"], ["diesel"])
    assert [d.tags for d in changed] == [("camera",), ("camera",)]
    with pytest.raises(InputError, match="van-7"):
        registry.revoke_all(["van-0", "van-7"])
    assert not any(d.revoked for d in registry.devices()), "all or none"
    registry.revoke("van-0")
    registry.restore(["van-0"])
    what = [h["what"] for h in registry.happenings("van-0")]
    assert what == ["restored", "revoked", "tagged", "grouped", "registered"]
    with pytest.raises(InputError, match="group"):
        registry.set_group(["van-0"], "a/b")


def test_a_registry_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "registry.db")
    old.execute(
        "CREATE TABLE devices (name TEXT PRIMARY KEY, public_key_pem BLOB NOT NULL UNIQUE, mqtt_password TEXT NOT NULL, "
        "registered_at TEXT NOT NULL, revoked_at TEXT NOT NULL DEFAULT '') STRICT"
    )
    old.execute("INSERT INTO devices VALUES ('van-1', ?, 'secret', '2026-01-01', '')", (PEMS[0],))
    old.commit()
    old.close()
    registry = Registry(tmp_path / "registry.db")
    found = registry.by_name("van-1")
    assert found is not None
    assert (found.active, found.group, found.tags, found.mqtt_password) == (True, "", (), "secret")


def test_contacts_are_noted_and_never_go_back(registry: Registry) -> None:
    registry.register("van-1", PEMS[0])
    registry.note_seen({"van-1": 100.0, "unknown": 5.0})
    registry.note_seen({"van-1": 50.0})
    assert registry.devices()[0].seen_at == 100.0


@given(
    st.text("abcdefgh.-0123456789", min_size=1, max_size=60),
    st.text(min_size=1, max_size=40).filter(lambda t: t.isprintable()),
)
def test_a_token_is_one_line_and_reads_back(host: str, secret: str) -> None:
    made = EnrolmentToken(f"https://{host}:8433", "ab" * 32, secret)
    text = made.text()
    assert text.split() == [text]
    assert read_token(f"  {text}\n") == made


@given(st.text(max_size=80))
def test_what_is_no_token_is_refused(text: str) -> None:
    for candidate in (text, "ff1." + text, EnrolmentToken("https://x", "ab" * 32, "s").text()[:-6] + text):
        refused = refusal(InputError, lambda candidate=candidate: read_token(candidate))
        assert refused is None or "token" in refused


def test_an_address_may_knock_rarely_and_others_meanwhile() -> None:
    now = [0.0]
    limit = RateLimit(per_minute=60, burst=3, size=2, clock=lambda: now[0])
    assert [limit.allow("a") for _ in range(4)] == [True, True, True, False]
    assert limit.allow("b")
    now[0] = 1.0
    assert [limit.allow("a") for _ in range(2)] == [True, False]
    for address in "cdefg":
        assert limit.allow(address)
    assert len(limit._buckets) == 2


def test_a_statement_is_good_for_its_purpose_key_and_parts_only() -> None:
    made = sign_statement(KEYS[0], "enrol", b"a", b"bc")
    verify_statement(PEMS[0], made, "enrol", b"a", b"bc")
    for pem, purpose, parts in (
        (PEMS[1], "enrol", (b"a", b"bc")),
        (PEMS[0], "rotate-key", (b"a", b"bc")),
        (PEMS[0], "enrol", (b"ab", b"c")),
    ):
        with pytest.raises(RefusedError):
            verify_statement(pem, made, purpose, *parts)
    with pytest.raises(RefusedError):
        verify_statement(PEMS[0], "not base64!", "enrol")


def test_a_wrong_clock_is_corrected_and_a_good_one_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    real = time.time
    signer = HeaderSigner(KEYS[0])
    assert not signer.observe(real() + 20)
    assert signer.offset_s == 0.0
    monkeypatch.setattr("fl_core.identity.signature.time.time", lambda: real() - 40 * 365 * 86_400)
    behind = HeaderSigner(KEYS[0])
    with pytest.raises(RefusedError, match="ago"):
        verify(behind.headers())
    assert behind.observe(real())
    assert verify(behind.headers()) == PEMS[0]
    assert behind.clock_facts()["skew_s"] == pytest.approx(-40 * 365 * 86_400, abs=60)
    monkeypatch.undo()
    assert behind.observe(real()), "its clock was set"
    assert behind.offset_s == 0.0
