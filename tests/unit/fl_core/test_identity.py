"""Keys, certificates and signed headers."""

from __future__ import annotations

import base64
import datetime
import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fl_core.contracts.errors import EnvironmentFault, InputError, IntegrityError, RefusedError
from fl_core.identity import ca, keys, signature

HOUR = datetime.timedelta(hours=1)


def test_device_key_is_private_and_made_once(tmp_path: Path) -> None:
    key = keys.create_device_key(tmp_path / "device.key")
    assert (tmp_path / "device.key").stat().st_mode & 0o777 == 0o600
    assert keys.public_pem(keys.load_private_key(tmp_path / "device.key")) == keys.public_pem(key)
    assert keys.read_public_key(tmp_path / "device.pub") == keys.public_pem(key)
    with pytest.raises(InputError, match="already"):
        keys.create_device_key(tmp_path / "device.key")


def test_key_readable_by_others_is_refused(tmp_path: Path) -> None:
    keys.create_device_key(tmp_path / "device.key")
    (tmp_path / "device.key").chmod(0o644)
    with pytest.raises(EnvironmentFault, match="chmod 600"):
        keys.load_private_key(tmp_path / "device.key")


def test_openssh_and_pem_spell_one_key() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    ssh = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    assert keys.canonical_public_pem(ssh + b" someone@host\n", origin="x") == keys.public_pem(key)
    crlf = keys.public_pem(key).replace(b"\n", b"\r\n")
    assert keys.canonical_public_pem(crlf, origin="x") == keys.public_pem(key)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_what_is_no_key_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"device\.pub"):
        keys.canonical_public_pem(data, origin="device.pub")


def test_other_curves_and_private_keys_are_refused(tmp_path: Path) -> None:
    other = keys.public_pem(ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(IntegrityError, match="P-384"):
        keys.canonical_public_pem(other, origin="device.pub")
    keys.create_device_key(tmp_path / "device.key")
    with pytest.raises(IntegrityError, match="private key"):
        keys.read_public_key(tmp_path / "device.key")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    ca.create_ca(folder, "test fleet")
    ca.issue_server_certificate(folder, folder, ["localhost", "127.0.0.1", "::1", "field.example"])
    return folder


def test_server_certificate_names_its_hosts_and_is_trusted(authority: Path) -> None:
    facts = ca.check_certificate(authority / ca.SERVER_NAME)
    assert facts.hosts == ("localhost", "field.example", "127.0.0.1", "::1")
    assert 390 < facts.days_left() < 398
    context = ssl.create_default_context(cafile=str(authority / ca.CA_NAME))
    assert context.cert_store_stats()["x509_ca"] == 1
    assert (authority / ca.SERVER_KEY_NAME).stat().st_mode & 0o777 == 0o600


def test_expired_and_future_certificates_name_file_date_and_remedy(authority: Path) -> None:
    facts = ca.certificate_facts(authority / ca.SERVER_NAME)
    with pytest.raises(EnvironmentFault) as late:
        ca.check_certificate(authority / ca.SERVER_NAME, now=facts.not_after + HOUR)
    assert "server.pem" in str(late.value)
    assert f"{facts.not_after:%Y-%m-%d}" in str(late.value)
    assert "server renew" in str(late.value)
    with pytest.raises(EnvironmentFault, match="clock"):
        ca.check_certificate(authority / ca.SERVER_NAME, now=facts.not_before - HOUR)


def test_damaged_certificate_and_wrong_host(authority: Path, tmp_path: Path) -> None:
    (tmp_path / "server.pem").write_text("-----BEGIN CERTIFICATE-----\nnope\n-----END CERTIFICATE-----\n")
    with pytest.raises(IntegrityError, match=r"server\.pem"):
        ca.check_certificate(tmp_path / "server.pem")
    with pytest.raises(InputError, match="host name"):
        ca.issue_server_certificate(authority, tmp_path, ["bücher.example"])


def test_headers_prove_the_key_for_five_minutes() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    now = datetime.datetime.now(datetime.UTC)
    headers = signature.sign(key, now=now)
    assert signature.verify(headers, now=now) == keys.public_pem(key)
    assert signature.verify(headers, now=now + datetime.timedelta(seconds=299)) == keys.public_pem(key)
    for shift in (306, -6):
        with pytest.raises(RefusedError, match="clock"):
            signature.verify(headers, now=now + datetime.timedelta(seconds=shift))


@pytest.mark.parametrize("name", [signature.PUBLIC_KEY, signature.TIMESTAMP, signature.SIGNATURE])
@pytest.mark.parametrize("value", [None, "", "?", "x" * 5000, base64.b64encode(b"junk").decode()])
def test_altered_headers_are_refused(name: str, value: str | None) -> None:
    headers = signature.sign(ec.generate_private_key(ec.SECP384R1()))
    if value is None:
        del headers[name]
    else:
        headers[name] = value
    with pytest.raises(RefusedError):
        signature.verify(headers)
    with pytest.raises(RefusedError):
        signature.Verifier().verify(headers)


def test_signature_of_another_key_is_refused() -> None:
    one, two = (signature.sign(ec.generate_private_key(ec.SECP384R1())) for _ in range(2))
    with pytest.raises(RefusedError, match="signature"):
        signature.verify({**one, signature.PUBLIC_KEY: two[signature.PUBLIC_KEY]})


def test_verifier_remembers_and_signer_repeats() -> None:
    signer = signature.HeaderSigner(ec.generate_private_key(ec.SECP384R1()))
    verifier = signature.Verifier(size=1)
    assert signer.headers() == signer.headers()
    assert verifier.verify(signer.headers()) == verifier.verify(signer.headers()) == signer.public_pem
