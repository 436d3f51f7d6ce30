"""Commands to live workers over NATS: one request to one member, one reply.

Subject `baton.<deployment>.control.<member>`; msgpack of the typed messages below, behind the deployment's credentials. A
command that no worker listens for is known at once. One whose reply is lost, because NATS went away meanwhile, may have
been done: operations are such that asking again is harmless, and `status` tells.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from launch.records import Control
from workers.runtime.events import connect, token

log = logging.getLogger(__name__)

# A worker answers within: its turn among operations, the time that running requests were given, and the engine's own.
TURN_S = 60.0
ENGINE_S = 120.0
ANSWER_S = 5.0
# A worker listens again within this time of NATS' return (workers.runtime.events.connect tries every 0.5 s).
RETURN_S = 2.0


class Operation(StrEnum):
    """What may be asked of a worker."""

    STATUS = "status"
    CLEAR = "clear"
    DRAIN = "drain"
    SERVE = "serve"
    PAUSE = "pause"
    RESUME = "resume"
    SLEEP = "sleep"
    WAKE = "wake"
    LOAD_LORA = "load_lora"
    UNLOAD_LORA = "unload_lora"
    LIST_LORA = "list_lora"
    START_PROFILE = "start_profile"
    STOP_PROFILE = "stop_profile"
    SCALE_EP = "scale_ep"


class OperationError(Exception):
    """The operation was not done; `status` is HTTP's word for why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Nothing(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An operation without arguments."""


Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]


class Withdraw(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`timeout_s`: how long running requests may take to finish, by default the recipe's engine.drain_s."""

    timeout_s: Seconds | None = None


class Sleep(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Level 1 keeps the weights in the host's memory, 2 drops them too, 0 is a pause. `timeout_s` as of `Withdraw`."""

    level: Literal[0, 1, 2] = 1
    timeout_s: Seconds | None = None


class LoadLora(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An adapter's name, and the folder it is in: an absolute `path`, or a `uri`."""

    name: str
    path: str | None = None
    uri: str | None = None


class UnloadLora(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`timeout_s`: how long the requests that use the adapter may take, by default the recipe's engine.drain_s."""

    name: str
    timeout_s: Seconds | None = None


class Profile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`prefix` is put before the names of the trace files."""

    prefix: str | None = None


class Scale(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`size` is the new data-parallel size of the engine."""

    size: Annotated[int, msgspec.Meta(ge=1)]


Arguments = Nothing | Withdraw | Sleep | LoadLora | UnloadLora | Profile | Scale

ARGUMENTS: Mapping[Operation, type[Arguments]] = {
    **dict.fromkeys(Operation, Nothing),
    Operation.DRAIN: Withdraw,
    Operation.PAUSE: Withdraw,
    Operation.SLEEP: Sleep,
    Operation.LOAD_LORA: LoadLora,
    Operation.UNLOAD_LORA: UnloadLora,
    Operation.START_PROFILE: Profile,
    Operation.SCALE_EP: Scale,
}


class Command(msgspec.Struct, kw_only=True):
    """What a worker is asked; the arguments are checked by `arguments`."""

    operation: str
    arguments: dict[str, Any] = {}


class Reply(msgspec.Struct, kw_only=True):
    """What came of it: HTTP's status, a message where it is not 200, and what the operation returned."""

    member: str
    status: int = 200
    message: str = ""
    result: dict[str, Any] = {}


def operation(name: str) -> Operation:
    """The operation of that name.

    Raises:
        OperationError: 404, there is none; names those there are.
    """
    try:
        return Operation(name)
    except ValueError:
        raise OperationError(404, f"there is no operation {name!r}: it is one of {', '.join(Operation)}") from None


def arguments(wanted: Operation, given: Mapping[str, Any]) -> Arguments:
    """The typed arguments; numbers may come as text, as a command line has them.

    Raises:
        OperationError: 400, says which one is wrong and how.
    """
    try:
        return msgspec.convert(dict(given), ARGUMENTS[wanted], strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(ARGUMENTS[wanted].__struct_fields__) or "none"
        raise OperationError(400, f"{wanted}: {error}; its arguments: {known}") from error


def patience_s(wanted: Operation, asked: Arguments, drain_s: float) -> float:
    """How long to wait for the reply before taking it for lost."""
    if wanted in (Operation.STATUS, Operation.LIST_LORA):
        return ANSWER_S
    finish_s = getattr(asked, "timeout_s", None)
    return TURN_S + (drain_s if finish_s is None else finish_s) + 2 * ENGINE_S


Perform = Callable[[str, Mapping[str, Any]], Awaitable[dict[str, Any]]]


async def serve_commands(control: Control, deployment: str, member: str, perform: Perform) -> None:
    """Answer commands with what `perform` returns or raises (OperationError), each in a task of its own; for ever."""
    client = await connect(control, f"{member}-control")
    try:
        async with asyncio.TaskGroup() as group:

            async def handle(message: Msg) -> None:
                group.create_task(_answer(message, member, perform), name="command")

            await client.subscribe(_subject(deployment, member), cb=handle)
            await asyncio.Event().wait()
    finally:
        await client.close()


async def _answer(message: Msg, member: str, perform: Perform) -> None:
    reply = Reply(member=member)
    try:
        command = msgspec.msgpack.decode(message.data, type=Command)
        log.info("asked to %s %s", command.operation, command.arguments or "")
        reply.result = await perform(command.operation, command.arguments)
    except OperationError as error:
        reply.status, reply.message = error.status, str(error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reply.status, reply.message = 400, f"this is not a command: {error}"
    except asyncio.CancelledError:
        reply.status, reply.message = 503, "the worker is stopping"
        await _respond(message, reply)
        raise
    except Exception as error:
        log.exception("a command failed")
        reply.status, reply.message = 500, f"{type(error).__name__}: {error}"
    if reply.message:
        log.warning("answered with %d: %s", reply.status, reply.message)
    await _respond(message, reply)


async def _respond(message: Msg, reply: Reply) -> None:
    try:
        await message.respond(msgspec.msgpack.encode(reply))
    except nats.errors.Error as error:
        log.warning("the answer to a command could not be sent: %s", error)


class Commander:
    """Sends commands; `keep` must run meanwhile."""

    def __init__(self, control: Control, deployment: str, name: str) -> None:
        self._control = control
        self._deployment = deployment
        self._name = name
        self._client: Client | None = None

    async def keep(self) -> None:
        """Hold the connection; for ever."""
        self._client = await connect(self._control, f"{self._name}-control")
        try:
            await asyncio.Event().wait()
        finally:
            await self._client.close()

    async def ask(self, member: str, command: Command, timeout_s: float) -> Reply:
        """The member's reply; a status of 503 or 504 stands for a member that did not answer."""
        loop = asyncio.get_running_loop()
        returned_by = loop.time() + RETURN_S
        while True:
            if self._client is None or not self._client.is_connected:
                message = "NATS is away, and commands with it: ask again in a moment"
            else:
                try:
                    answer = await self._client.request(
                        _subject(self._deployment, member), msgspec.msgpack.encode(command), timeout=timeout_s
                    )
                    return msgspec.msgpack.decode(answer.data, type=Reply)
                except nats.errors.NoRespondersError:
                    message = f"{member} does not listen: it is starting, or lost"
                except nats.errors.TimeoutError:
                    lost = f"{member} did not answer within {timeout_s:.0f} s; `status` tells whether it was done"
                    return Reply(member=member, status=504, message=lost)
                except (nats.errors.Error, msgspec.DecodeError) as error:
                    return Reply(member=member, status=502, message=f"{type(error).__name__}: {error}")
            if loop.time() > returned_by:
                return Reply(member=member, status=503, message=message)
            await asyncio.sleep(0.1)


def _subject(deployment: str, member: str) -> str:
    return f"baton.{token(deployment)}.control.{token(member)}"
