"""The event plane: NATS subjects of a deployment. Losing it costs freshness, never a request."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from urllib.parse import ParseResult

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport

from launch.records import Control
from workers.runtime.trust import control_tls

log = logging.getLogger(__name__)

LOAD_S = 0.5
PING_S = 2
FAREWELL_S = 0.2


class LoadEvent(msgspec.Struct, kw_only=True):
    """How busy a worker is; `kv_usage` is the share of its KV blocks in use, 0 to 1."""

    member: str
    instance: str
    running: int
    waiting: int
    kv_usage: float


class _TlsTransport(TcpTransport):
    """Connections that are TLS from their first byte on, and end within a moment.

    nats-py's own would wait half a minute for the farewell of a node that is gone, before it turns to another.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nats-py's
        self._context = context

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        async with asyncio.timeout(connect_timeout):
            reader, writer = await asyncio.open_connection(
                uri.hostname, uri.port, limit=buffer_size, ssl=self._context, ssl_shutdown_timeout=FAREWELL_S
            )
        self._bare_io_reader = self._io_reader = reader
        self._bare_io_writer = self._io_writer = writer

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        """It is there already."""

    def __bool__(self) -> bool:
        """Ready to connect: nats-py makes one of its own where it finds none."""
        return True


async def connect(control: Control, name: str) -> Client:
    """A connection that comes back by itself; waits for the server to be there at all."""

    async def quiet(error: Exception) -> None:
        log.debug("NATS: %s", error)

    tls = control_tls(control)
    while True:
        try:
            client = Client()
            client._transport = _TlsTransport(tls)
            await client.connect(
                control.nats_urls,
                user=control.nats_user,
                password=control.nats_password,
                tls=tls,
                tls_handshake_first=True,
                name=name,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.5,  # type: ignore[arg-type]  # seconds, and not only whole ones
                # A node that is gone closes no connection: it is its silence that shows.
                ping_interval=PING_S,
                max_outstanding_pings=2,
                error_cb=quiet,
            )
            return client
        except (OSError, nats.errors.Error) as error:
            log.warning("NATS is away (%s)", error)
            await asyncio.sleep(0.5)


async def publish_load(control: Control, deployment: str, read: Callable[[], LoadEvent]) -> None:
    """Publish what `read` returns, twice a second, for ever."""
    client = await connect(control, read().member)
    try:
        while True:
            event = read()
            # While the server is away nats-py buffers; an old load is worth nothing, so it is dropped instead.
            if client.is_connected:
                await client.publish(_load_subject(deployment, event.member), msgspec.msgpack.encode(event))
            await asyncio.sleep(LOAD_S)
    finally:
        await client.close()


async def follow_load(control: Control, deployment: str, name: str, on_load: Callable[[LoadEvent], None]) -> None:
    """Call `on_load` with every load report of the deployment's workers, for ever."""
    client = await connect(control, name)

    async def handle(message: Msg) -> None:
        on_load(msgspec.msgpack.decode(message.data, type=LoadEvent))

    try:
        await client.subscribe(_load_subject(deployment, "*"), cb=handle)
        await asyncio.Event().wait()
    finally:
        await client.close()


def token(name: str) -> str:
    """A name as one token of a subject: a dot would split it into more than a wildcard matches."""
    return name.replace(".", "_")


def _load_subject(deployment: str, member: str) -> str:
    return f"baton.{token(deployment)}.load.{token(member)}"
