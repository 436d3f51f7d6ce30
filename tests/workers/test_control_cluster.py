"""Three members of etcd and of NATS, for real: what is left when one is killed, and who leads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from nats.aio.client import Client

from launch.records import Control, RankRecord, RunDirectory
from slurm import children, control, ports
from slurm.control import Seed
from slurm.head import LEASE_S, Headship
from tests.workers.test_control import CARD
from workers.control import servers
from workers.runtime.etcd import Etcd
from workers.runtime.events import LoadEvent, connect, follow_load, publish_load
from workers.runtime.registry import Card, Offer, follow, registered
from workers.runtime.trust import control_tls


@pytest.fixture
def seed(tmp_path: Path) -> Seed:
    """What rank 0 decides for three ranks, all on this machine."""
    with contextlib.ExitStack() as held:  # all at once: one after another may be the same block
        blocks = [held.enter_context(ports.claim("test-control-cluster", 3 * os.getpid() + rank)) for rank in range(3)]
    records = [
        RankRecord(
            attempt=1, rank=rank, host="h", address="127.0.0.1", port_base=block.base, pid=0, born=0, heartbeat=0
        )
        for rank, block in enumerate(blocks)
    ]
    (tmp_path / "control").mkdir()
    return control.sow(RunDirectory(tmp_path), records)


@contextlib.asynccontextmanager
async def running(which: list[servers.Server], folder: Path) -> AsyncIterator[list[children.Child]]:
    """Servers that say they are ready."""
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for server in which:
            log = folder / f"{server.name}.log"
            child = await children.start(server.name, server.argv, os.environ, log, folder=server.folder)
            stack.push_async_callback(child.stop, 5)
            found.append(child)
        async with asyncio.timeout(60):
            await asyncio.gather(*(server.ready() for server in which))
        yield found


def etcds(seed: Seed, folder: Path) -> list[servers.Server]:
    """The three members of etcd."""
    binary = servers.find_etcd(None)
    return [servers.etcd(seed.control, seed.certificates, binary, folder / f"e{rank}", rank) for rank in range(3)]


def natses(seed: Seed, folder: Path) -> list[servers.Server]:
    """The three servers of NATS."""
    binary = servers.find_nats(None)
    return [servers.nats(seed.control, seed.certificates, binary, folder / f"n{rank}", rank) for rank in range(3)]


async def until(condition: Callable[[], bool], timeout_s: float = 30) -> float:
    """Wait for it, or fail; returns the seconds that it took."""
    begun = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)
    return time.monotonic() - begun


async def test_registrations_and_the_head_outlive_a_member_of_etcd(seed: Seed, tmp_path: Path) -> None:
    """Whichever dies: workers stay registered, changes are told, and one rank leads at any time.

    A head that was held up is not sure of it before another is elected, and is told that it no longer leads.
    """
    views: list[dict[str, Card]] = []
    headships: list[Headship] = []
    both: list[float] = []
    tasks: dict[str, asyncio.Task[None]] = {}

    async def watch_sure() -> None:
        while True:
            if sum(headship.sure for headship in headships) > 1:
                both.append(time.monotonic())
            await asyncio.sleep(0.01)

    async with (
        running(etcds(seed, tmp_path), tmp_path) as members,
        contextlib.AsyncExitStack() as stack,
        asyncio.TaskGroup() as group,
    ):
        for rank in range(3):
            etcd = await stack.enter_async_context(Etcd(seed.control))
            headships.append(Headship("d", rank, etcd))
            tasks[f"{rank}"] = group.create_task(headships[rank].keep(lambda: True))
        tasks["sure"] = group.create_task(watch_sure())
        client = await stack.enter_async_context(Etcd(seed.control))
        other = await stack.enter_async_context(Etcd(seed.control))
        tasks["follow"] = group.create_task(follow(other, "d", views.append))
        registration = await stack.enter_async_context(registered(client, "d", Offer(CARD), ttl_s=5))
        await until(lambda: views[-1:] == [{"decode-0": CARD}])
        await until(lambda: sum(headship.leads for headship in headships) == 1)
        members[0].kill()
        await asyncio.sleep(0)
        async with asyncio.timeout(15):
            await registration.update(version="w")
        await until(lambda: bool(views[-1]) and views[-1]["decode-0"].version == "w")
        await asyncio.sleep(6)  # longer than the registration's lease
        gone = [view for view in views[1:] if not view]
        first = next(headship for headship in headships if headship.leads)
        tasks[str(headships.index(first))].cancel()  # held up: it renews nothing
        term = first.term
        elected_s = await until(lambda: any(headship.leads for headship in headships if headship is not first))
        second = next(headship for headship in headships if headship.leads and headship is not first)
        was_sure = first.sure
        tasks["back"] = group.create_task(first.keep(lambda: True))
        await until(lambda: not first.leads)
        for task in tasks.values():
            task.cancel()

    assert gone == []
    assert both == []
    assert not was_sure
    assert second.term > term
    assert elected_s > LEASE_S / 3


@pytest.mark.parametrize(
    ("signum", "within_s"),
    [pytest.param(signal.SIGKILL, 5, id="dead"), pytest.param(signal.SIGSTOP, 20, id="silent")],
)
async def test_events_outlive_a_server_of_nats(seed: Seed, tmp_path: Path, signum: int, within_s: float) -> None:
    """What is published at one server is heard at the others, and clients of one that dies go to another; so they do when
    it is silent, as one on a node that is gone, without waiting for its farewell."""
    event = LoadEvent(member="decode-0", instance="i", running=1, waiting=2, kv_usage=0.5)
    heard: list[LoadEvent] = []
    at_first = nats_at(seed.control, 0)
    async with running(natses(seed, tmp_path), tmp_path) as found, asyncio.TaskGroup() as group:
        client = await connect(at_first, "listener")
        publisher = group.create_task(publish_load(nats_at(seed.control, 1), "d", lambda: event))
        follower = group.create_task(follow_load(at_first, "d", "f", heard.append))
        await until(lambda: len(heard) > 1)
        port = port_of(client)
        os.kill(found[0].pid, signum)
        before = len(heard)
        back_s = await until(lambda: client.is_connected and port_of(client) != port and len(heard) > before + 1, 60)
        await client.close()
        found[0].kill()
        publisher.cancel()
        follower.cancel()

    assert back_s < within_s


async def test_a_server_of_nats_takes_routes_from_the_others_alone(seed: Seed, tmp_path: Path) -> None:
    """Who has no certificate is told nothing, and the password of clients is not that of routes."""
    host, port = servers.host_and_port(seed.control.nats_routes[0])
    shown = {
        "user": "baton",
        "pass": seed.control.nats_password,
        "server_id": "stranger",
        "name": "s",
        "cluster": "baton",
    }
    said = f"CONNECT {json.dumps(shown)}\r\nPING\r\n".encode()
    async with running(natses(seed, tmp_path)[:1], tmp_path), asyncio.timeout(20):
        in_plain_text = await answer_to(said, host, port)
        with_a_certificate = await answer_to(said, host, port, control_tls(seed.control))

    assert in_plain_text == b""
    assert b'"auth_required":true' in with_a_certificate
    assert b"-ERR 'Authorization Violation'" in with_a_certificate


async def answer_to(said: bytes, host: str, port: int, tls: ssl.SSLContext | None = None) -> bytes:
    """All that a server answers before it ends the connection."""
    reader, writer = await asyncio.open_connection(host, port, ssl=tls)
    writer.write(said)
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.transport.abort()


def port_of(client: Client) -> int | None:
    """Where a client is connected."""
    return client.connected_url.port if client.connected_url else None


def nats_at(found: Control, first: int) -> Control:
    """The same with one server before the others; NATS' client shuffles them, unless there is one: others are told to it."""
    return Control(
        **{**{name: getattr(found, name) for name in Control.__struct_fields__}, "nats_urls": [found.nats_urls[first]]}
    )


async def test_a_member_of_etcd_talks_to_members_alone(seed: Seed, tmp_path: Path) -> None:
    """Its peer port refuses who shows no certificate of the deployment."""
    async with running(etcds(seed, tmp_path), tmp_path):
        host, port = servers.host_and_port(seed.control.etcd_peers[1])
        stranger = ssl.create_default_context(cadata=seed.control.authority)
        stranger.maximum_version = ssl.TLSVersion.TLSv1_2  # later ones refuse only after the handshake
        with pytest.raises(ssl.SSLError, match="BAD_CERTIFICATE"):
            await asyncio.open_connection(host, port, ssl=stranger)


def test_without_an_election_rank_0_leads() -> None:
    """And no other, as when a start is broken off before there is a control plane."""
    first, other = Headship("d", 0), Headship("d", 1)
    assert (first.leads, first.sure, first.contested) == (True, True, False)
    assert (other.leads, other.sure) == (False, False)
