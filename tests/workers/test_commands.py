"""Commands to workers over a real NATS: who answers, and what is said when nobody does."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launch.records import Control
from tests.workers.test_control import control, nats_server, running
from workers.runtime.commands import Command, Commander, OperationError, Reply, serve_commands
from workers.runtime.events import connect

__all__ = ["control"]  # a fixture


class Plane:
    """A commander and one worker, `decode-0`, that answers with what it was asked."""

    def __init__(self, control: Control) -> None:
        self.commander = Commander(control, "my.deployment", "frontend-0")
        self.release = asyncio.Event()
        self._control = control

    async def perform(self, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the worker does."""
        if operation == "wait":
            await self.release.wait()
        if operation == "fail":
            raise OperationError(409, "not now")
        if operation == "break":
            raise ValueError("a bug")
        return {"operation": operation, **arguments}

    async def ask(self, operation: str, member: str = "decode-0", timeout_s: float = 5, **arguments: Any) -> Reply:
        """One command."""
        return await self.commander.ask(member, Command(operation=operation, arguments=arguments), timeout_s)

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """While both run."""
        async with asyncio.TaskGroup() as group:
            work = serve_commands(self._control, "my.deployment", "decode-0", self.perform)
            tasks = [group.create_task(work), group.create_task(self.commander.keep())]
            while (await self.ask("hello", timeout_s=1)).status != 200:
                await asyncio.sleep(0.05)
            yield
            for task in tasks:
                task.cancel()


@pytest.fixture
async def plane(control: Control, tmp_path: Path) -> AsyncIterator[Plane]:
    """Both, over a NATS of their own."""
    async with running(nats_server(control, tmp_path), tmp_path):
        made = Plane(control)
        async with made.up():
            yield made


async def test_a_command_comes_back_with_its_result(plane: Plane) -> None:
    """Arguments and results of any shape that JSON has."""
    reply = await plane.ask("load", name="a", level=1, more=[1, {"x": None}])

    assert reply == Reply(
        member="decode-0", result={"operation": "load", "name": "a", "level": 1, "more": [1, {"x": None}]}
    )


@pytest.mark.parametrize(
    ("operation", "status", "message"),
    [pytest.param("fail", 409, "not now", id="refused"), pytest.param("break", 500, "ValueError: a bug", id="a bug")],
)
async def test_a_failure_is_an_answer_too(plane: Plane, operation: str, status: int, message: str) -> None:
    """And the worker goes on."""
    reply = await plane.ask(operation)

    assert (reply.status, reply.message) == (status, message)
    assert (await plane.ask("hello")).status == 200


async def test_a_long_command_keeps_no_other_waiting(plane: Plane) -> None:
    """Each is served by itself."""
    long = asyncio.create_task(plane.ask("wait", timeout_s=30))
    assert (await plane.ask("hello")).status == 200
    assert not long.done()
    plane.release.set()

    assert (await long).status == 200


async def test_a_member_that_does_not_listen_is_known_soon(plane: Plane) -> None:
    """NATS says that nobody is there; the time limit of an operation is not waited for."""
    begun = time.monotonic()
    reply = await plane.ask("hello", member="decode-1", timeout_s=300)

    assert reply.status == 503
    assert "does not listen" in reply.message
    assert time.monotonic() - begun < 10


async def test_a_command_that_takes_too_long_may_have_been_done(plane: Plane) -> None:
    """The answer says how to find out."""
    reply = await plane.ask("wait", timeout_s=0.2)

    assert reply.status == 504
    assert "`status` tells" in reply.message


async def test_noise_on_the_subject_is_answered_as_such(plane: Plane, control: Control) -> None:
    """And the worker goes on."""
    client = await connect(control, "test")
    for noise in (b"", b"\xc1", b"\x93\x01", b"\x81\xa9operation\x01"):
        answer = await client.request("baton.my_deployment.control.decode-0", noise, timeout=5)
        assert b"this is not a command" in answer.data
    await client.close()

    assert (await plane.ask("hello")).status == 200


async def test_commands_survive_a_restart_of_nats(control: Control, tmp_path: Path) -> None:
    """While it is away they are refused with that reason; when it is back they work again by themselves."""
    server = nats_server(control, tmp_path)
    plane = Plane(control)
    async with contextlib.AsyncExitStack() as stack:
        async with running(server, tmp_path):
            await stack.enter_async_context(plane.up())
        away = await plane.ask("hello", timeout_s=1)
        assert away.status == 503
        assert "NATS is away" in away.message
        async with running(server, tmp_path), asyncio.timeout(15):
            while (await plane.ask("hello", timeout_s=1)).status != 200:
                await asyncio.sleep(0.05)
            await stack.aclose()


async def test_a_worker_that_stops_answers_what_it_was_doing(control: Control, tmp_path: Path) -> None:
    """Nobody waits out the time limit of an operation for a worker that ends."""
    async with running(nats_server(control, tmp_path), tmp_path):
        plane = Plane(control)
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(plane.commander.keep())
            worker = group.create_task(serve_commands(control, "my.deployment", "decode-0", plane.perform))
            while (await plane.ask("hello", timeout_s=1)).status != 200:
                await asyncio.sleep(0.05)
            asked = asyncio.create_task(plane.ask("wait", timeout_s=60))
            while (await plane.ask("hello", timeout_s=1)).status != 200:
                await asyncio.sleep(0.05)
            worker.cancel()
            reply = await asyncio.wait_for(asked, 10)
            keeper.cancel()

    assert (reply.status, reply.message) == (503, "the worker is stopping")
