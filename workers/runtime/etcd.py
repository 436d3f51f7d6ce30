"""A small asyncio client of etcd's HTTP/JSON gateway: keys, leases, watches, and the one user of a deployment.

The gateway is part of etcd 3 (https://etcd.io/docs/v3.5/dev-guide/api_grpc_gateway/): keys and values are base64, 64-bit
numbers are strings. Of the Python clients, one cannot attach a key to a lease, others pin a protobuf that clashes with
vLLM's, and the complete one blocks.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohappyeyeballs
import aiohttp

from launch.records import Control
from workers.runtime.trust import control_tls

CALL_TIMEOUT_S = 3.0
# Where others can be asked: a lease of 5 s has to outlive a call to a node that is gone, and the call to the next.
NEXT_AFTER_S = 1.5
# With its leader gone, a cluster answers nobody until it has elected another, which takes one to two seconds.
ELECTION_S = 3.0
PAUSE_S = 0.05
# A node that is gone says nothing: the kernel ends connections to it after this many seconds of silence, watches too.
SILENT_S = 4
FAREWELL_S = 0.1


class EtcdError(Exception):
    """etcd did not answer, or answered with an error."""


class LeaseLostError(EtcdError):
    """The lease is gone: it ran out, or etcd's data did."""


@dataclass(frozen=True, slots=True)
class Change:
    """A key that was put, or deleted (`value` None)."""

    key: str
    value: bytes | None


class Etcd:
    """A client; an async context manager that owns its connections.

    It asks one server of the cluster, and the next from then on when that one does not answer.
    """

    def __init__(self, control: Control, password: str | None = None, urls: Sequence[str] | None = None) -> None:
        """Make a client of these servers, by default of all; `password` is not the deployment's own in tests only."""
        self._urls = list(urls or control.etcd_urls)
        random.shuffle(self._urls)
        self._user = control.etcd_user
        self._password = password or control.etcd_password
        self._tls = control_tls(control)
        self._token = ""
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(ssl=self._tls, socket_factory=_watched_socket)
        self._session = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session and self._session.connector:
            await self._session.connector.close(abort_ssl=True)
            await self._session.close()
            # A watch that was cancelled says TLS's farewell, for which aiohttp does not wait: it would outlive the loop.
            await asyncio.sleep(FAREWELL_S)

    async def put(self, key: str, value: bytes, lease: int = 0) -> None:
        """Set a key, bound to a lease unless that is 0."""
        await self._call("kv/put", {"key": _b64(key.encode()), "value": _b64(value), "lease": str(lease)})

    async def create(self, key: str, value: bytes, lease: int) -> int | None:
        """Set a key that does not exist, bound to a lease; returns the revision of that, or None when it exists.

        A value that only this caller uses tells its own key, made by a call whose answer was lost, from another's.
        """
        name = _b64(key.encode())
        answer = await self._call(
            "kv/txn",
            {
                "compare": [{"key": name, "target": "CREATE", "create_revision": "0"}],
                "success": [{"request_put": {"key": name, "value": _b64(value), "lease": str(lease)}}],
                "failure": [{"request_range": {"key": name}}],
            },
        )
        if answer.get("succeeded"):
            return int(answer["header"]["revision"])
        there = answer["responses"][0]["response_range"].get("kvs", ())
        return next((int(item["create_revision"]) for item in there if item.get("value") == _b64(value)), None)

    async def get(self, key: str) -> bytes | None:
        """The value of a key, or None where there is none."""
        answer = await self._call("kv/range", {"key": _b64(key.encode())})
        return next((base64.b64decode(item.get("value", "")) for item in answer.get("kvs", ())), None)

    async def delete(self, key: str) -> None:
        """Delete a key; one that does not exist is not an error."""
        await self._call("kv/deleterange", {"key": _b64(key.encode())})

    async def prefix(self, prefix: str) -> tuple[dict[str, bytes], int]:
        """All keys below a prefix with their values, and the revision at which that was so."""
        answer = await self._call("kv/range", _range(prefix))
        found = {_text(item["key"]): base64.b64decode(item.get("value", "")) for item in answer.get("kvs", ())}
        return found, int(answer["header"]["revision"])

    async def grant(self, ttl_s: int) -> int:
        """A lease of that many seconds."""
        return int((await self._call("lease/grant", {"TTL": str(ttl_s)}))["ID"])

    async def revoke(self, lease: int) -> None:
        """End a lease, and with it the keys that are bound to it."""
        await self._call("lease/revoke", {"ID": str(lease)})

    async def keep_alive(self, lease: int) -> None:
        """Renew a lease.

        Raises:
            LeaseLostError: It is gone.
        """
        answer = await self._call("lease/keepalive", {"ID": str(lease)})
        if int(answer.get("result", {}).get("TTL", 0)) <= 0:
            raise LeaseLostError(f"lease {lease:x} is gone")

    async def watch(self, prefix: str, revision: int) -> AsyncIterator[list[Change]]:
        """Changes below a prefix from a revision on; ends only with an EtcdError.

        Raises:
            EtcdError: The connection broke, or etcd no longer has that revision: read the prefix again.
        """
        request = {"create_request": _range(prefix) | {"start_revision": str(revision), "progress_notify": True}}
        await self._authenticate()
        with self._moving_on(), _translated():
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CALL_TIMEOUT_S)
            async with self._open("watch", request, timeout) as response:
                async for line in response.content:
                    result = json.loads(line).get("result", {})
                    if result.get("canceled"):
                        raise EtcdError(f"watch of {prefix} ended: {result.get('cancel_reason', 'compacted')}")
                    changes = [_change(event) for event in result.get("events", ())]
                    if changes:
                        yield changes
        raise EtcdConnectionError(f"watch of {prefix} ended")

    async def secure(self) -> None:
        """Create the root user and switch authentication on, unless that was done before.

        Raises:
            EtcdError: etcd does not serve yet.
        """
        try:
            await self._call("maintenance/status", {}, authenticated=False)
            await self._authenticate(renew=True)
        except EtcdError as error:
            if "not enabled" not in str(error):
                raise
        else:
            return
        for path, body in (
            ("auth/user/add", {"name": self._user, "password": self._password}),
            ("auth/role/add", {"name": "root"}),
            ("auth/user/grant", {"user": self._user, "role": "root"}),
            ("auth/enable", {}),
        ):
            with contextlib.suppress(EtcdExistsError):
                await self._call(path, body, authenticated=False)

    async def _authenticate(self, renew: bool = False) -> None:
        if renew or not self._token:
            self._token = ""
            body = {"name": self._user, "password": self._password}
            self._token = (await self._post("auth/authenticate", body))["token"]

    async def _call(self, path: str, body: dict[str, Any], authenticated: bool = True) -> dict[str, Any]:
        """Ask one server, and of several the others when it does not answer: all that we ask may be asked twice."""
        until = time.monotonic() + (ELECTION_S if len(self._urls) > 1 else 0)
        while True:
            try:
                return await self._call_one(path, body, authenticated)
            except EtcdConnectionError:
                # An etcd that came back with empty data does not refuse a token from before: it waits until its log is as
                # long as that token's, which may be never (etcd 3.5). So a token does not outlive its connection.
                self._token = ""
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(PAUSE_S)

    async def _call_one(self, path: str, body: dict[str, Any], authenticated: bool) -> dict[str, Any]:
        if authenticated:
            await self._authenticate()
        try:
            return await self._post(path, body)
        except EtcdTokenError:
            await self._authenticate(renew=True)  # etcd was restarted and has forgotten the tokens it gave
            return await self._post(path, body)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=NEXT_AFTER_S if len(self._urls) > 1 else CALL_TIMEOUT_S)
        with self._moving_on(), _translated():
            async with self._open(path, body, timeout) as response:
                answer: dict[str, Any] = json.loads(await response.read())
        message = answer.get("error")
        if message is None:
            return answer
        text = message if isinstance(message, str) else json.dumps(message)
        for fragment, kind in ERRORS.items():
            if fragment in text:
                raise kind(text)
        raise EtcdError(text)

    def _open(self, path: str, body: dict[str, Any], timeout: aiohttp.ClientTimeout) -> Any:
        assert self._session, "use `async with Etcd(...)`"
        headers = {"Authorization": self._token} if self._token else {}
        # A member that is cut off from the others would keep a watch open that tells nothing any more.
        headers |= {"Grpc-Metadata-hasleader": "true"} if path == "watch" else {}
        return self._session.post(f"{self._urls[0]}/v3/{path}", data=json.dumps(body), headers=headers, timeout=timeout)

    @contextlib.contextmanager
    def _moving_on(self) -> Iterator[None]:
        """Ask the next server from now on when this one does not answer."""
        asked = self._urls[0]
        try:
            yield
        except EtcdConnectionError:
            if self._urls[0] == asked:  # nobody else has moved on meanwhile
                self._urls.append(self._urls.pop(0))
            raise


def _watched_socket(address: aiohappyeyeballs.AddrInfoType) -> socket.socket:
    """A socket whose connection ends when the other side is silent, which a dead node is."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENT_S - 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENT_S)
    return made


class EtcdConnectionError(EtcdError):
    """etcd did not answer, not in time, or not for itself: it knows no leader."""


class EtcdTokenError(EtcdError):
    """The token is not, or no longer, known."""


class EtcdExistsError(EtcdError):
    """The user or role was there before."""


ERRORS: dict[str, type[EtcdError]] = {
    "invalid auth token": EtcdTokenError,
    "user name is empty": EtcdTokenError,
    "already exists": EtcdExistsError,
    "lease not found": LeaseLostError,
    "leader changed": EtcdConnectionError,
    "no leader": EtcdConnectionError,
    "request timed out": EtcdConnectionError,
}


class _translated(contextlib.AbstractContextManager[None]):
    """Turn what the transport raises into EtcdError."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, aiohttp.ClientError | TimeoutError | OSError | ValueError):
            raise EtcdConnectionError(f"{type(error).__name__}: {error}") from error


def _range(prefix: str) -> dict[str, str]:
    start = prefix.encode()
    return {"key": _b64(start), "range_end": _b64(start[:-1] + bytes([start[-1] + 1]))}


def _change(event: dict[str, Any]) -> Change:
    pair = event["kv"]
    deleted = event.get("type") == "DELETE"
    return Change(_text(pair["key"]), None if deleted else base64.b64decode(pair.get("value", "")))


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode()
