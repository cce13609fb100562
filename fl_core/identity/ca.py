"""The fleet's own certificate authority: one root, short-lived server certificates, and a check before every start."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fl_core.contracts.errors import EnvironmentFault, InputError, IntegrityError
from fl_core.identity.keys import PrivateKey, load_private_key, write_private_key
from fl_core.storage import atomic

CA_NAME, CA_KEY_NAME = "ca.pem", "ca.key"
SERVER_NAME, SERVER_KEY_NAME = "server.pem", "server.key"
CA_DAYS, SERVER_DAYS = 3650, 397
WARNING_DAYS = 30
RENEW_COMMAND = "fieldfleet server renew --home HOME"


@dataclass(frozen=True)
class CertificateFacts:
    """Times are UTC; ``hosts`` are the names and addresses that the certificate is valid for."""

    subject: str
    not_before: datetime.datetime
    not_after: datetime.datetime
    hosts: tuple[str, ...]

    def days_left(self, now: datetime.datetime | None = None) -> float:
        return (self.not_after - (now or _now())).total_seconds() / 86_400


def create_ca(folder: Path, fleet: str) -> None:
    """ca.pem and ca.key (0600): a root that may sign server certificates and no further authorities."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name(f"{fleet} certificate authority")
    builder = _builder(name, name, key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    write_private_key(folder / CA_KEY_NAME, key)
    _write(folder / CA_NAME, builder.sign(key, hashes.SHA384()))


def issue_server_certificate(ca_folder: Path, folder: Path, hosts: Iterable[str], *, days: int = SERVER_DAYS) -> None:
    """server.pem and server.key (0600) for these host names and addresses. Raises InputError naming a wrong host."""
    alternatives = [_alternative(host) for host in dict.fromkeys(hosts)]
    if not alternatives:
        raise InputError("a server certificate needs at least one host name")
    ca_key, ca = load_private_key(ca_folder / CA_KEY_NAME), load_certificate(ca_folder / CA_NAME)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name("fieldfleet server"), ca.subject, key.public_key(), days)
    builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(_authority(ca_key), critical=False)
    certificate = builder.sign(ca_key, hashes.SHA384())
    write_private_key(folder / SERVER_KEY_NAME, key)
    _write(folder / SERVER_NAME, certificate)


def load_certificate(path: Path) -> x509.Certificate:
    if not path.is_file():
        raise InputError(f"{path}: no such certificate")
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(f"{path}: not a PEM certificate: {error}") from None


def certificate_facts(path: Path) -> CertificateFacts:
    certificate = load_certificate(path)
    hosts: tuple[str, ...] = ()
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = (
            *names.get_values_for_type(x509.DNSName),
            *(str(a) for a in names.get_values_for_type(x509.IPAddress)),
        )
    except x509.ExtensionNotFound:
        pass
    return CertificateFacts(
        certificate.subject.rfc4514_string(), certificate.not_valid_before_utc, certificate.not_valid_after_utc, hosts
    )


def check_certificate(
    path: Path, *, remedy: str = RENEW_COMMAND, now: datetime.datetime | None = None
) -> CertificateFacts:
    """Raises EnvironmentFault naming the file, the date and the remedy unless the certificate is valid now."""
    facts, moment = certificate_facts(path), now or _now()
    if moment > facts.not_after:
        raise EnvironmentFault(
            f"{path}: this certificate expired on {facts.not_after:%Y-%m-%d %H:%M} UTC", remedy=remedy
        )
    if moment < facts.not_before:
        raise EnvironmentFault(
            f"{path}: this certificate is not valid before {facts.not_before:%Y-%m-%d %H:%M} UTC, now is {moment:%Y-%m-%d %H:%M}",
            remedy="set this machine's clock",
        )
    return facts


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("ascii").decode())
    except (UnicodeError, ValueError):
        raise InputError(f"{host!r} is not a host name", remedy="use its ASCII (punycode) form") from None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    start = _now() - datetime.timedelta(hours=1)  # devices' clocks differ a little
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=days))
    )


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority(key: PrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _write(path: Path, certificate: x509.Certificate) -> None:
    atomic.write_bytes(path, certificate.public_bytes(serialization.Encoding.PEM))
