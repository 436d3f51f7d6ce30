"""Certificates of one deployment: NATS and etcd talk to those alone that hold the deployment's own.

etcd's passwords guard its keys but not all it does: without one a stranger may raise an alarm that makes it read-only, take
leases without end, or read its command line (seen in etcd 3.5.1). So nobody gets to ask who has no certificate. The
authority's key is forgotten as soon as it has signed: nobody can be added later.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# A deployment ends long before; that the clocks of nodes differ must not matter.
EARLIER, LATER = datetime.timedelta(days=2), datetime.timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM text: the authority's certificate, and certificate and key of the server and of its clients."""

    authority: str
    server: str
    server_key: str = field(repr=False)
    client: str
    client_key: str = field(repr=False)


def issue(*addresses: str) -> Certificates:
    """New certificates for the servers at these IP addresses, which share one, and for their clients."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "baton")])
    authority = (
        _begun(name, name, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_signs_only(), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )

    def signed(*purposes: x509.ObjectIdentifier, at: Sequence[str] = ()) -> tuple[str, str]:
        key = ec.generate_private_key(ec.SECP256R1())
        # No name of its own: etcd would take it for the name of a user.
        builder = _begun(x509.Name([]), name, key).add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        # Python 3.13 refuses certificates that do not say whose key signed them.
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        if at:
            unique = dict.fromkeys(at)
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(item)) for item in unique])
            builder = builder.add_extension(names, critical=True)
        return _pem(builder.sign(authority_key, hashes.SHA256())), _key_pem(key)

    # etcd's HTTP gateway is a client of its own server, and members of one another, with the server's certificate.
    server = signed(ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH, at=addresses)
    return Certificates(_pem(authority), *server, *signed(ExtendedKeyUsageOID.CLIENT_AUTH))


def _signs_only() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _begun(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + LATER)
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
