"""The embedded servers, and our client of etcd, for real."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import nats
import pytest
from nats.aio.client import Client

from launch.plan import ETCD_PORT, NATS_PORT
from launch.recipe import Kind
from launch.records import Control
from slurm import children, ports
from workers.control import servers
from workers.control.certificates import issue
from workers.runtime.etcd import Change, Etcd, EtcdError, LeaseLostError
from workers.runtime.events import connect
from workers.runtime.registry import Card, Offer, follow, key, registered
from workers.runtime.trust import control_tls

CARD = Card(
    member="decode-0",
    instance="i",
    kind=Kind.DECODE,
    address="tcp://a:1",
    metrics="a:2",
    model="m",
    max_model_len=1,
    block_size=1,
    version="v",
)
CERTIFICATES = issue("127.0.0.1")


@pytest.fixture
def control(tmp_path: Path) -> Control:
    """Addresses in a free block, and credentials."""
    with ports.claim("test-control", os.getpid()) as block:
        base = block.base
    return Control(
        attempt=1,
        nats_urls=[f"nats://127.0.0.1:{base + NATS_PORT}"],
        nats_user="baton",
        nats_password="secret",
        etcd_urls=[f"https://127.0.0.1:{base + ETCD_PORT}"],
        etcd_user="root",
        etcd_password="secret",
        worker_public="",
        worker_secret="",
        authority=CERTIFICATES.authority,
        client_file=str(servers.client_file(CERTIFICATES, tmp_path)),
    )


@contextlib.asynccontextmanager
async def running(server: servers.Server, folder: Path) -> AsyncIterator[children.Child]:
    """A server that says it is ready."""
    log = folder / f"{server.name}.log"
    child = await children.start(server.name, server.argv, os.environ, log, folder=server.folder)
    try:
        async with asyncio.timeout(20):
            await server.ready()
        yield child
    finally:
        await child.stop(5)


def nats_server(control: Control, folder: Path) -> servers.Server:
    """NATS with its files in the folder."""
    return servers.nats(control, CERTIFICATES, servers.find_nats(None), folder / "nats")


def etcd_server(control: Control, folder: Path) -> servers.Server:
    """etcd with its data in the folder."""
    return servers.etcd(control, CERTIFICATES, servers.find_etcd(None), folder / "etcd")


def client(control: Control, password: str | None = None) -> Etcd:
    """A client with the deployment's credentials."""
    return Etcd(control, password)


async def test_nats_serves_who_has_the_password(control: Control, tmp_path: Path) -> None:
    """JetStream is there, and nobody else gets in."""
    async with running(nats_server(control, tmp_path), tmp_path):
        connection = await connect(control, "test")
        account = await connection.jetstream().account_info()
        await connection.close()
        known: dict[str, Any] = {"tls": control_tls(control), "tls_handshake_first": True, "allow_reconnect": False}
        stranger = Client()
        with pytest.raises(nats.errors.Error, match="Authorization"):
            await stranger.connect(control.nats_url, user="baton", password="wrong", **known)
        await stranger.close()

    assert account.streams == 0


async def test_etcd_serves_who_has_the_password(control: Control, tmp_path: Path) -> None:
    """Keys, prefixes and deletes; a wrong password is an error."""
    async with running(etcd_server(control, tmp_path), tmp_path), client(control) as etcd:
        await etcd.put("/a/1", b"one")
        await etcd.put("/a/2", b"\x00\xff")
        await etcd.put("/b/1", b"other")
        found, revision = await etcd.prefix("/a/")
        await etcd.delete("/a/1")
        async with client(control, "wrong") as stranger:
            with pytest.raises(EtcdError, match="authentication failed"):
                await stranger.prefix("/a/")

        assert found == {"/a/1": b"one", "/a/2": b"\x00\xff"}
        assert (await etcd.prefix("/a/"))[0] == {"/a/2": b"\x00\xff"}
        assert revision > 0


async def test_a_watch_tells_puts_deletes_and_expired_leases(control: Control, tmp_path: Path) -> None:
    """In their order."""
    seen: list[Change] = []

    async with running(etcd_server(control, tmp_path), tmp_path), client(control) as etcd:
        _, revision = await etcd.prefix("/a/")

        async def watch() -> None:
            async for changes in etcd.watch("/a/", revision + 1):
                seen.extend(changes)

        task = asyncio.create_task(watch())
        await etcd.put("/a/1", b"one")
        lease = await etcd.grant(2)
        await etcd.put("/a/2", b"two", lease)
        await etcd.delete("/a/1")
        async with asyncio.timeout(15):
            while len(seen) < 4:
                await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(LeaseLostError):
            await etcd.keep_alive(lease)

    assert seen == [Change("/a/1", b"one"), Change("/a/2", b"two"), Change("/a/1", None), Change("/a/2", None)]


async def test_a_registration_survives_the_loss_of_etcd_and_of_its_data(control: Control, tmp_path: Path) -> None:
    """A worker registers again by itself; a frontend that follows keeps what it knew and then sees it again."""
    views: list[dict[str, Card]] = []
    async with client(control) as etcd:
        async with running(etcd_server(control, tmp_path / "first"), tmp_path):
            follower = asyncio.create_task(follow(etcd, "d", views.append))
            registration = registered(etcd, "d", Offer(CARD), ttl_s=2)
            await registration.__aenter__()
            async with asyncio.timeout(10):
                while not views or not views[-1]:
                    await asyncio.sleep(0.05)
        known = len(views)
        async with running(etcd_server(control, tmp_path / "second"), tmp_path):
            async with asyncio.timeout(10):
                while len(views) == known or views[-1] != {"decode-0": CARD}:
                    await asyncio.sleep(0.05)
            assert (await etcd.prefix(key("d", "")))[0][key("d", "decode-0")] == msgspec.json.encode(CARD)
            await registration.__aexit__(None, None, None)
            async with asyncio.timeout(10):
                while views[-1]:
                    await asyncio.sleep(0.05)
        follower.cancel()


async def test_a_client_that_has_left_holds_no_connection(control: Control, tmp_path: Path) -> None:
    """Not even that of a watch that was cancelled, which has a farewell to say over TLS."""
    async with running(etcd_server(control, tmp_path), tmp_path):
        before = _sockets()
        async with client(control) as etcd, asyncio.TaskGroup() as group:
            follower = group.create_task(follow(etcd, "d", lambda cards: None))
            await asyncio.sleep(0.3)
            assert _sockets() > before
            follower.cancel()
        assert _sockets() == before


def _sockets() -> int:
    return sum("socket:" in os.readlink(f"/proc/self/fd/{name}") for name in _descriptors())


def _descriptors() -> list[str]:
    return [name for name in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{name}")]


async def test_what_is_no_card_is_left_out(control: Control, tmp_path: Path) -> None:
    """Found at the start or later, and whoever follows goes on."""
    views: list[dict[str, Card]] = []
    async with running(etcd_server(control, tmp_path), tmp_path), client(control) as etcd:
        await etcd.put(key("d", "decode-7"), b"{")
        await etcd.put(key("d", "decode-0"), msgspec.json.encode(CARD))
        follower = asyncio.create_task(follow(etcd, "d", views.append))
        async with asyncio.timeout(10):
            while views[-1:] != [{"decode-0": CARD}]:
                await asyncio.sleep(0.02)
            await etcd.put(key("d", "decode-0"), b"\xff")
            while views[-1:] != [{}]:
                await asyncio.sleep(0.02)
        assert not follower.done()
        follower.cancel()


async def test_a_changed_card_is_what_is_kept(control: Control, tmp_path: Path) -> None:
    """Under the same lease, and registered again as it was last when etcd loses its data; a change that etcd did not take
    is not kept.
    """
    changed = msgspec.structs.replace(CARD, adapters=("a",))

    async def stored() -> bytes | None:
        return (await etcd.prefix(key("d", "")))[0].get(key("d", "decode-0"))

    async with client(control) as etcd, contextlib.AsyncExitStack() as stack:
        async with running(etcd_server(control, tmp_path / "first"), tmp_path):
            registration = await stack.enter_async_context(registered(etcd, "d", Offer(CARD), ttl_s=2))
            await registration.update(adapters=("a",))
            assert await stored() == msgspec.json.encode(changed)
            await asyncio.sleep(3)  # longer than the lease: it is still the one that is renewed
            assert await stored() == msgspec.json.encode(changed)
        with pytest.raises(EtcdError):
            await registration.update(adapters=("a", "b"))
        assert registration.card == changed
        async with running(etcd_server(control, tmp_path / "second"), tmp_path):
            async with asyncio.timeout(10):
                while await stored() != msgspec.json.encode(changed):
                    await asyncio.sleep(0.05)
            await registration.update(adapters=("b",))
            assert registration.card.adapters == ("b",)
            await stack.aclose()
            assert await stored() is None
