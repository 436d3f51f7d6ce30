"""How our own programs speak to the servers of the control plane: TLS on both sides, by the deployment's own certificates."""

from __future__ import annotations

import ssl

from launch.records import Control


def control_tls(control: Control) -> ssl.SSLContext:
    """A client's context that trusts nobody but the deployment's own servers, and shows them its certificate.

    Servers are called by their address, which is what their certificate names.
    """
    context = ssl.create_default_context(cadata=control.authority)
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    context.load_cert_chain(control.client_file)
    return context
