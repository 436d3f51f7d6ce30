"""TLS of the listening socket."""

from __future__ import annotations

import ssl
from pathlib import Path

from launch.errors import ConfigError


def context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """What a server needs to speak TLS; None where the recipe names no certificate.

    Raises:
        ConfigError: The files cannot be read, or do not belong together.
    """
    if certificate is None or key is None:
        return None
    for name, path in (("frontend.tls_cert", certificate), ("frontend.tls_key", key)):
        if not Path(path).is_file():
            raise ConfigError(f"{name} names {path}, where no file is: give the path that it has on rank 0's node")
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    found.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        found.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ConfigError(f"{certificate} and {key} are no certificate and its key in PEM: {error}") from error
    return found
