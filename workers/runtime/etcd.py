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
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp

from launch.records import Control

CALL_TIMEOUT_S = 3.0
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
    """A client; an async context manager that owns its connections."""

    def __init__(self, control: Control, password: str | None = None) -> None:
        """Make a client; `password` is not the deployment's own in tests only."""
        self._url = control.etcd_url
        self._user = control.etcd_user
        self._password = password or control.etcd_password
        self._tls = _tls(control)
        self._token = ""
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._tls))
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
        with _translated():
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
            self._token = (await self._call("auth/authenticate", body, authenticated=False))["token"]

    async def _call(self, path: str, body: dict[str, Any], authenticated: bool = True) -> dict[str, Any]:
        if authenticated:
            await self._authenticate()
        try:
            return await self._post(path, body)
        except EtcdTokenError:
            await self._authenticate(renew=True)  # etcd was restarted and has forgotten the tokens it gave
            return await self._post(path, body)
        except EtcdConnectionError:
            # An etcd that came back with empty data does not refuse a token from before: it waits until its log is as
            # long as that token's, which may be never (etcd 3.5). So a token does not outlive its connection.
            self._token = ""
            raise

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with _translated():
            async with self._open(path, body, aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)) as response:
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
        return self._session.post(f"{self._url}/v3/{path}", data=json.dumps(body), headers=headers, timeout=timeout)


def _tls(control: Control) -> ssl.SSLContext:
    """Trust nobody but the deployment's own etcd, and show it our certificate."""
    context = ssl.create_default_context(cadata=control.etcd_authority)
    context.load_cert_chain(control.etcd_client_file)
    return context


class EtcdConnectionError(EtcdError):
    """etcd did not answer, or not in time."""


class EtcdTokenError(EtcdError):
    """The token is not, or no longer, known."""


class EtcdExistsError(EtcdError):
    """The user or role was there before."""


ERRORS: dict[str, type[EtcdError]] = {
    "invalid auth token": EtcdTokenError,
    "user name is empty": EtcdTokenError,
    "already exists": EtcdExistsError,
    "lease not found": LeaseLostError,
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
