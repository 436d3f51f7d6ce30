"""Who may use a ZMQ socket: CURVE keys on both sides, each of which the other checks.

CURVE alone proves the server to the client and encrypts. That the client is one of ours is asked by libzmq of a handler in
the server's own process (ZAP, https://rfc.zeromq.org/spec/27/); `Door` is that handler. A socket of `ServerKeys` without a
door lets nobody in.
"""

from __future__ import annotations

import hmac
import logging
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import z85

from launch.records import Control
from workers.runtime.sockets import LoopSocket

log = logging.getLogger(__name__)

ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_VERSION = b"1.0"
DOMAIN = b"baton"


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """A server's key pair, and the public keys of those who may connect; Z85 text."""

    public: str
    secret: str = field(repr=False)
    clients: tuple[str, ...]

    @classmethod
    def of_workers(cls, control: Control) -> ServerKeys:
        """What the workers of a deployment listen with."""
        return cls(control.worker_public, control.worker_secret, (control.frontend_public,))

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket a server of these keys; before it is bound."""
        socket.curve_publickey, socket.curve_secretkey = self.public.encode(), self.secret.encode()
        socket.curve_server = True
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a door nobody comes in, and not everybody


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """A client's key pair, and the public key of the server that it wants to talk to; Z85 text."""

    server: str
    public: str
    secret: str = field(repr=False)

    @classmethod
    def of_frontends(cls, control: Control) -> ClientKeys:
        """What the frontends of a deployment connect to its workers with."""
        return cls(control.worker_public, control.frontend_public, control.frontend_secret)

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket a client of these keys; before it is connected."""
        socket.curve_publickey, socket.curve_secretkey = self.public.encode(), self.secret.encode()
        socket.curve_serverkey = self.server.encode()


class Door:
    """Lets the clients of `ServerKeys` in to every socket of a context; open it before the sockets are bound."""

    def __init__(self, context: zmq.Context[Any], clients: tuple[str, ...]) -> None:
        self._known = [z85.decode(key.encode()) for key in clients if key]
        self._socket = LoopSocket(context, zmq.REP, self._on_request)
        self._socket.raw.bind(ZAP_ADDRESS)

    def close(self) -> None:
        """Let nobody else in."""
        self._socket.close()

    def _on_request(self, parts: list[bytes]) -> None:
        """A question of libzmq: version, number, domain, address, identity, mechanism, and CURVE's public key."""
        if len(parts) < 6:
            number, address, admitted = b"", b"", False
        else:
            _, number, domain, address, _, mechanism, *credentials = parts
            admitted = domain == DOMAIN and mechanism == b"CURVE" and self._knows(credentials)
        if not admitted:
            log.warning(
                "refused a connection from %s: its key is none of ours", address.decode("latin-1") or "somebody"
            )
        status = (b"200", b"OK") if admitted else (b"400", b"unknown key")
        self._socket.send([ZAP_VERSION, number, *status, b"", b""])

    def _knows(self, credentials: list[bytes]) -> bool:
        return len(credentials) == 1 and any(hmac.compare_digest(credentials[0], key) for key in self._known)
