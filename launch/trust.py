"""How our own programs speak to a deployment's frontends where these speak TLS."""

from __future__ import annotations

import ssl

from launch.errors import ConfigError


def trusting(certificate: str | None) -> ssl.SSLContext | None:
    """A client's context that trusts this certificate and no other authority; None where there is none.

    The name in it is not compared: frontends are called by their address, and it is the deployment's own certificate.

    Raises:
        ConfigError: It cannot be read.
    """
    if certificate is None:
        return None
    try:
        context = ssl.create_default_context(cafile=certificate)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"frontend.tls_cert: {certificate} cannot be read here ({error})") from error
    context.check_hostname = False
    # A certificate that a site's authority has signed is trusted as it is, without the authority's own.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
