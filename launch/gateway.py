"""`python -m launch.gateway NAME [--port N]`: one address for a deployment or a chain, wherever it runs at the moment.

A small reverse proxy for a login node. It follows `endpoint.json`: new requests go to the endpoint that is there now, what
streams goes on where it began. A request that got no byte of an answer, because its endpoint was gone or draining, is sent
again to the one that serves, within `--wait` seconds; one that got a byte is never sent again. Bytes pass through unread, the
client's own key with them; the gateway has none.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohappyeyeballs
import aiohttp
import msgspec
import uvloop
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from launch.errors import LaunchError
from launch.records import CHAIN_FILE, STOPPING, Endpoint, Phase, RunDirectory, find
from launch.trust import trusting

log = logging.getLogger(__name__)

POLL_S = 0.25
AGAIN_S = 0.1
SETTLE_S = 5.0
CONNECT_S = 5.0
KEEP_ALIVE_S = 15.0
MOST_HEAD_BYTES = 64 << 10
# A body up to here is kept so that it can be sent again; a longer one is passed on once.
KEPT_BODY_BYTES = 64 << 20
# Tries that ended in a cut connection: what cuts it every time is the request.
MOST_CUTS = 4
# Requests that make or change something are not sent again once the endpoint may have got them; those below only compute.
MAKES = ("/v1/batches", "/v1/files", "/admin", "/sleep", "/wake_up", "/pause", "/resume")
SAFE = ("GET", "HEAD", "OPTIONS")
# A node that dies says nothing: after these seconds without an answer to the kernel's own questions a connection counts as cut.
IDLE_S, BETWEEN_S, PROBES = 4, 2, 4
# Between two hops, not between client and server (RFC 9110, 7.6.1).
HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding"),
    *("upgrade", "proxy-connection"),
}
# What aiohttp would add by itself.
SILENT = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go now: an origin, or None and the reason; `hope` while one may come."""

    origin: str | None
    reason: str = ""
    hope: bool = True


def target(endpoint: Endpoint | None, name: str, more_to_come: bool) -> Target:
    """Where requests go, by the word of `endpoint.json`.

    Args:
        endpoint: Its content; None while nothing was published.
        name: Of the deployment.
        more_to_come: Whether it is a chain that was not stopped.
    """
    if endpoint is None:
        return Target(None, f"{name} has not started yet")
    if endpoint.state.serves:
        return Target(endpoint.url.removesuffix("/v1"))
    hope = more_to_come or endpoint.state is Phase.STARTING
    return Target(None, f"{name} is {endpoint.state}", hope)


class Follower:
    """What `endpoint.json` said last; a file system that does not answer changes nothing."""

    def __init__(self, path: Path) -> None:
        self._run = RunDirectory(path)
        self.target = Target(None, f"{path.name} was not looked for yet")

    async def look(self) -> Target:
        """Read it now."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found = await asyncio.to_thread(self._read)
            if found != self.target:
                log.info("%s", f"requests go to {found.origin}" if found.origin else found.reason)
            self.target = found
        return self.target

    async def follow(self) -> None:
        """Read it again and again; for ever."""
        while True:
            await self.look()
            await asyncio.sleep(POLL_S)

    def _read(self) -> Target:
        chain = (self._run.path / CHAIN_FILE).exists() and not self._run.stop_file.exists()
        return target(self._run.endpoint(), self._run.path.name, chain)


class Gateway:
    """Answers requests with what the deployment answers.

    Args:
        follower: Says where it is.
        session: What asks it; without timeouts of its own, and not unpacking anything.
        secure: How an HTTPS endpoint is trusted.
        wait_s: Seconds that a request may wait for an endpoint.
    """

    def __init__(
        self, follower: Follower, session: aiohttp.ClientSession, secure: ssl.SSLContext | None, wait_s: float
    ) -> None:
        self._follower = follower
        self._session = session
        self._secure = secure
        self._wait_s = wait_s

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        if not request.raw_path.startswith("/"):  # a proxy's form, which would name another host
            return web.Response(status=400, text="the target of a request has to be a path")
        kept, rest = await _body(request)
        once = request.method not in SAFE and request.path.startswith(MAKES)
        deadline, cuts, why = time.monotonic() + self._wait_s, 0, ""
        while True:
            where = self._follower.target
            if where.origin is None:
                if not where.hope or time.monotonic() > deadline:
                    return unavailable(why or where.reason)
                await asyncio.sleep(AGAIN_S)
                continue
            unsent, tried_at = False, time.monotonic()
            try:
                async with self._session.request(
                    request.method,
                    URL(where.origin + request.raw_path, encoded=True),
                    headers=passed_on(request.headers),
                    data=kept if rest is None else _joined(kept, rest),
                    allow_redirects=False,
                    ssl=self._secure if self._secure is not None else True,
                ) as answer:
                    # From the first byte of the answer on there is no other try.
                    refused = await _draining(answer)
                    if refused is None:
                        kept = b""  # images may be large, and a stream long
                        return await _passed_through(request, answer)
                    why = refused
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                unsent, why = True, f"{where.origin} does not answer ({error})"
            except aiohttp.ClientError as error:
                cuts += 1
                why = f"{where.origin} ended the connection without an answer ({error})"
                if once:
                    return unavailable(why)
            if time.monotonic() - tried_at > CONNECT_S + 1:  # it was being answered: that is no waiting
                deadline = time.monotonic() + self._wait_s
            if (rest is not None and not unsent) or cuts >= MOST_CUTS or time.monotonic() > deadline:
                return unavailable(why)
            await self._moved(where, deadline)

    async def _moved(self, before: Target, deadline: float) -> None:
        """Wait a moment; return early when requests go elsewhere."""
        until = min(deadline, time.monotonic() + AGAIN_S)
        while self._follower.target == before and time.monotonic() < until:  # noqa: ASYNC110  # what changes is a file
            await asyncio.sleep(AGAIN_S / 5)


async def _body(request: web.BaseRequest) -> tuple[bytes, aiohttp.StreamReader | None]:
    """The body, and what is still to come of one that is too long to be kept."""
    kept = bytearray()
    if not request.body_exists:
        return b"", None
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    async for chunk in request.content.iter_any():
        kept += chunk
        if len(kept) > KEPT_BODY_BYTES:
            return bytes(kept), request.content
    return bytes(kept), None


async def _joined(kept: bytes, rest: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    yield kept
    async for chunk in rest.iter_any():
        yield chunk


async def _draining(answer: aiohttp.ClientResponse) -> str | None:
    """The message of a refusal because the endpoint is stopping; None for every other answer, unread if possible."""
    if answer.status != 503:
        return None
    try:
        error = msgspec.json.decode(await answer.read())["error"]
        message = str(error["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return None
    return message if message.startswith(STOPPING) else None


async def _passed_through(request: web.BaseRequest, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """The answer, byte by byte as it comes."""
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=passed_on(answer.headers))
    try:
        await response.prepare(request)
        if answer.status == 503:  # was read already
            await response.write(await answer.read())
        else:
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
        await response.write_eof()
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
        # One of the two sides is gone. The client, if it is there, has to see that this is not all: no last chunk comes.
        log.info("%s %s was cut: %s", request.method, request.path, error)
        if request.transport:
            request.transport.abort()
    return response


def passed_on(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The headers that go on to the other side."""
    items: Iterable[tuple[str, str]] = headers.items()
    said = ",".join(value for name, value in items if name.lower() == "connection")
    named = {word.strip().lower() for word in said.split(",")}
    gone = HOP_BY_HOP | named | {"host", "expect"}
    return CIMultiDict((name, value) for name, value in items if name.lower() not in gone)


def unavailable(reason: str) -> web.Response:
    """503 in OpenAI's shape."""
    error = {"message": f"{reason}: try again later", "type": "service_unavailable_error", "param": None, "code": 503}
    body = msgspec.json.encode({"error": error})
    return web.Response(status=503, body=body, content_type="application/json", headers={"Retry-After": "5"})


@contextlib.asynccontextmanager
async def opened(path: Path, secure: ssl.SSLContext | None, host: str, port: int, wait_s: float) -> AsyncIterator[str]:
    """A gateway that serves within the block; yields its URL. What streams at the end is given `SETTLE_S`."""
    follower = Follower(path)
    await follower.look()
    # No limit of connections, nor of time: an answer takes as long as it takes, and the endpoint bounds both.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, socket_factory=_watched)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
    async with (
        aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            auto_decompress=False,
            skip_auto_headers=SILENT,
            read_bufsize=1 << 18,
            cookie_jar=aiohttp.DummyCookieJar(),  # clients share nothing
        ) as session,
        asyncio.TaskGroup() as group,
    ):
        following = group.create_task(follower.follow(), name="endpoint")
        server = web.Server(
            Gateway(follower, session, secure, wait_s),
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            max_line_size=MOST_HEAD_BYTES,
            max_field_size=MOST_HEAD_BYTES,
        )
        runner = web.ServerRunner(server, shutdown_timeout=SETTLE_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, backlog=1024).start()
            yield f"http://{host}:{runner.addresses[0][1]}/v1"
        finally:
            following.cancel()
            await runner.cleanup()


def _watched(address: aiohappyeyeballs.AddrInfoType) -> socket.socket:
    """A socket that notices a peer which died without a word."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {socket.TCP_KEEPIDLE: IDLE_S, socket.TCP_KEEPINTVL: BETWEEN_S, socket.TCP_KEEPCNT: PROBES}
    options[socket.TCP_USER_TIMEOUT] = 1000 * (IDLE_S + BETWEEN_S * PROBES)
    for option, value in options.items():
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


async def serve(path: Path, secure: ssl.SSLContext | None, host: str, port: int, wait_s: float) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    async with opened(path, secure, host, port, wait_s) as url:
        print(url, flush=True)
        await stop.wait()


def main() -> int:
    """Serve; 0 when asked to end, 1 with the reason when it cannot."""
    parser = argparse.ArgumentParser(prog="python -m launch.gateway", description="One address for a deployment.")
    parser.add_argument("name")
    parser.add_argument("--port", type=int, default=0, help="port to listen at; default a free one, which is printed")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; others than loopback are open to all"
    )
    parser.add_argument("--wait", type=float, default=30.0, help="seconds that a request may wait while nothing serves")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run directories are")
    arguments = parser.parse_args()
    # Standard output has the address alone, for scripts.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s gateway: %(message)s")
    runs_dir = arguments.runs_dir.absolute()
    try:
        secure = trusting(find(runs_dir, arguments.name).recipe().frontend.tls_cert)
        uvloop.run(serve(runs_dir / arguments.name, secure, arguments.host, arguments.port, arguments.wait))
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: nothing can listen at {arguments.host}:{arguments.port} ({error.strerror or error}): choose another --port",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
