"""Operations on a live worker: which are allowed when, in what order their steps are taken, and how a failed one is undone.

A worker that is not `serving` is withdrawn: its frontends know, and its card stays, for etcd says *where* a worker is and
the request plane whether it serves. Operations take turns. When a step fails, those before it are taken back, so that the
worker is as before; when even that fails it is `broken`: it does not serve, and says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from launch.recipe import Recipe
from launch.records import Control
from workers.engine.base import Engine
from workers.engine.kept_adapters import KeptAdapters
from workers.engine.lora import Adapters, Keep
from workers.runtime import commands
from workers.runtime.commands import Operation, OperationError
from workers.runtime.etcd import EtcdError

log = logging.getLogger(__name__)

T = TypeVar("T")
O = Operation  # the tables below are read by their words


class State(StrEnum):
    """What a worker does; only a serving one gets requests."""

    SERVING = "serving"
    DRAINING = "draining"
    PAUSED = "paused"
    ASLEEP = "asleep"
    BROKEN = "broken"


ALWAYS = frozenset((O.STATUS, O.LIST_LORA))
AWAKE = frozenset((O.CLEAR, O.LOAD_LORA, O.UNLOAD_LORA, O.START_PROFILE, O.STOP_PROFILE))
ALLOWED: Mapping[State, frozenset[Operation]] = {
    State.SERVING: ALWAYS | AWAKE | {O.DRAIN, O.PAUSE, O.SLEEP, O.SCALE_EP},
    State.DRAINING: ALWAYS | AWAKE | {O.SERVE, O.PAUSE, O.SLEEP, O.SCALE_EP},
    State.PAUSED: ALWAYS | AWAKE | {O.RESUME, O.SLEEP},
    State.ASLEEP: ALWAYS | {O.WAKE},
    State.BROKEN: ALWAYS | {O.WAKE},
}
# Where an operation leads; asked for there, it has nothing to do.
LEADS_TO: Mapping[Operation, State] = {
    O.SERVE: State.SERVING,
    O.RESUME: State.SERVING,
    O.WAKE: State.SERVING,
    O.DRAIN: State.DRAINING,
    O.PAUSE: State.PAUSED,
    O.SLEEP: State.ASLEEP,
}
WAY_BACK: Mapping[State, str] = {
    State.SERVING: "",
    State.DRAINING: ": `serve` first",
    State.PAUSED: ": `resume` first",
    State.ASLEEP: ": `wake` first",
    State.BROKEN: ": `wake` tries to mend it; if that fails, end the process and its agent starts another",
}


def check(state: State, operation: Operation) -> bool:
    """Whether the operation has anything to do in a state.

    Raises:
        OperationError: 409, it is not possible there; says what leads back.
    """
    if LEADS_TO.get(operation) is state:
        return False
    if operation not in ALLOWED[state]:
        raise OperationError(409, f"{operation} is not possible while the worker is {state}{WAY_BACK[state]}")
    return True


class Gate(Protocol):
    """Whether requests get to the engine (`workers.engine.server.RequestServer`)."""

    @property
    def streams(self) -> int:
        """Requests that are being served."""
        ...

    def withdraw(self) -> None:
        """Let no more in."""
        ...

    def admit(self) -> None:
        """Let them in again."""
        ...

    async def finish(self, timeout_s: float) -> int:
        """Wait for those that are in; returns how many had to be given back."""
        ...


Publish = Callable[..., Awaitable[None]]


class Operations:
    """The operations of one worker. `publish(**fields)` changes its card, or raises; `on_cleared` is told that the engine has
    dropped its KV cache.
    """

    def __init__(
        self,
        engine: Engine,
        gate: Gate,
        publish: Publish,
        drain_s: float,
        lora_dirs: Sequence[str] = (),
        keep: Keep = lambda folders: None,
        on_cleared: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._operable = engine.operable
        self._gate = gate
        self._publish = publish
        self._on_cleared = on_cleared
        self._drain_s = drain_s
        self._lock = asyncio.Lock()
        self._now: Operation | None = None
        self._profiling = False
        self._level = 0
        self._why = ""
        self.state = State.SERVING
        self.adapters = Adapters(
            self._operable, engine.adapter_uses, lora_dirs, self._turn, self._publish_adapters, drain_s, keep
        )

    async def perform(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Do one operation; returns what it tells.

        Raises:
            OperationError: It was not done; the worker is as before unless the message says otherwise.
        """
        operation = commands.operation(name)
        asked = commands.arguments(operation, given)
        if isinstance(asked, commands.Sleep) and asked.level == 0:
            operation, asked = O.PAUSE, commands.Withdraw(timeout_s=asked.timeout_s)
        refusal = self._operable.refusals.get(operation)
        if refusal:
            raise OperationError(501, f"{operation}: {refusal}")
        match asked:
            case commands.LoadLora():
                return await self.adapters.load(asked)
            case commands.UnloadLora():
                return await self.adapters.unload(asked)
        if operation is O.STATUS:
            return self.status()
        if operation is O.LIST_LORA:
            return {"adapters": self.adapters.list()}
        async with self._turn(operation) as something:
            if not something:
                self._refuse_other_level(asked)
                return {"state": self.state, "note": f"it was {self.state} already"}
            return await self._do(operation, asked)

    def status(self) -> dict[str, Any]:
        """What the worker says of itself."""
        load = self._engine.load
        told: dict[str, Any] = {
            "state": self.state,
            "doing": self._now,
            "streams": self._gate.streams,
            "running": load.running,
            "waiting": load.waiting,
            "kv_usage": round(load.kv_usage, 4),
            "adapters": [item["name"] for item in self.adapters.list()],
            "profiling": self._profiling,
        }
        if self.state is State.ASLEEP:
            told["level"] = self._level
        if self.state is State.BROKEN:
            told["why"] = self._why
        return told

    async def _do(self, operation: Operation, asked: commands.Arguments) -> dict[str, Any]:
        match operation, asked:
            case O.CLEAR, _:
                return await self._clear()
            case O.DRAIN, commands.Withdraw():
                return await self._drain(asked)
            case O.PAUSE, commands.Withdraw():
                return await self._pause(asked)
            case O.SLEEP, commands.Sleep():
                return await self._sleep(asked)
            case O.SERVE, _:
                self._gate.admit()
                self.state = State.SERVING
                return {"state": self.state}
            case O.RESUME, _:
                return await self._resume()
            case O.WAKE, _:
                return await self._wake()
            case O.START_PROFILE, commands.Profile():
                return await self._start_profile(asked)
            case O.STOP_PROFILE, _:
                return await self._stop_profile()
            case O.SCALE_EP, commands.Scale():
                return await self._scale(asked)
        raise AssertionError(f"{operation} with {asked}")

    async def _clear(self) -> dict[str, Any]:
        async with self._steps():
            if not await self._engine_does(self._operable.clear_cache()):
                raise OperationError(
                    409,
                    "the cache was not cleared: some of its blocks are in use by requests that run, or by prefills whose "
                    "decode has not pulled them; try again, or `drain` first",
                )
        self._on_cleared()
        return {"cleared": True}

    async def _drain(self, asked: commands.Withdraw) -> dict[str, Any]:
        self.state = State.DRAINING
        self._gate.withdraw()
        return {"given_back": await self._gate.finish(self._finish_s(asked)), "state": self.state}

    async def _pause(self, asked: commands.Withdraw) -> dict[str, Any]:
        async with self._steps() as undo:
            given_back = await self._withdraw(undo, asked)
            undo.push_async_callback(self._operable.resume)
            await self._engine_does(self._operable.pause())
        self.state = State.PAUSED
        return {"given_back": given_back, "state": self.state}

    async def _sleep(self, asked: commands.Sleep) -> dict[str, Any]:
        async with self._steps() as undo:
            given_back = await self._withdraw(undo, asked)
            if self.state is not State.PAUSED:
                undo.push_async_callback(self._operable.resume)
                await self._engine_does(self._operable.pause())
            undo.push_async_callback(self._rouse)
            await self._engine_does(self._operable.sleep(asked.level))
        self._on_cleared()
        self.state, self._level = State.ASLEEP, asked.level
        return {"given_back": given_back, "state": self.state, "level": asked.level}

    async def _resume(self) -> dict[str, Any]:
        async with self._steps() as undo:
            undo.push_async_callback(self._operable.pause)
            await self._engine_does(self._operable.resume())
        self.state = State.SERVING
        self._gate.admit()
        return {"state": self.state}

    async def _wake(self) -> dict[str, Any]:
        async with self._steps() as undo:
            if self.state is State.ASLEEP:
                undo.push_async_callback(self._operable.sleep, self._level)
            lost = await self._rouse()
            await self._engine_does(self._operable.resume())
        self.state = State.SERVING
        self._gate.admit()
        return {"state": self.state, **({"adapters_lost": lost} if lost else {})}

    async def _start_profile(self, asked: commands.Profile) -> dict[str, Any]:
        if self._profiling:
            raise OperationError(409, "a profile is being recorded: `stop_profile` first")
        async with self._steps() as undo:
            undo.push_async_callback(self._operable.stop_profile)
            folder = await self._engine_does(self._operable.start_profile(asked.prefix))
        self._profiling = True
        return {"folder": folder}

    async def _stop_profile(self) -> dict[str, Any]:
        if not self._profiling:
            raise OperationError(409, "no profile is being recorded: `start_profile` first")
        async with self._steps():
            await self._engine_does(self._operable.stop_profile())
        self._profiling = False
        return {}

    async def _scale(self, asked: commands.Scale) -> dict[str, Any]:
        async with self._steps():
            await self._operable.scale_ep(asked.size)  # takes minutes, and has a time limit of its own
            try:
                await self._announce(dp_count=asked.size)
            except OperationError as error:
                told = f"the engine has size {asked.size} now, but its frontends do not know: {error}; ask again"
                raise OperationError(error.status, told) from error
        return {"size": asked.size}

    # --- steps ----------------------------------------------------------------------------------------------------

    async def _withdraw(self, undo: AsyncExitStack, asked: commands.Withdraw | commands.Sleep) -> int:
        if self.state is State.SERVING:
            undo.callback(self._gate.admit)
        self._gate.withdraw()
        return await self._gate.finish(self._finish_s(asked))

    async def _rouse(self) -> list[str]:
        lost = list(await self._engine_does(self._operable.wake()))
        if lost:
            log.warning("adapters were lost in the sleep and could not be loaded again: %s", ", ".join(lost))
            await self.adapters.forget(lost)
        return lost

    async def _engine_does(self, work: Awaitable[T]) -> T:
        async with asyncio.timeout(commands.ENGINE_S):
            return await work

    def _finish_s(self, asked: commands.Withdraw | commands.Sleep) -> float:
        return self._drain_s if asked.timeout_s is None else asked.timeout_s

    def _refuse_other_level(self, asked: commands.Arguments) -> None:
        if isinstance(asked, commands.Sleep) and asked.level != self._level:
            raise OperationError(409, f"the worker sleeps at level {self._level}: `wake` it first")

    async def _publish_adapters(self, names: tuple[str, ...]) -> None:
        await self._announce(adapters=names)

    async def _announce(self, **fields: Any) -> None:
        try:
            await self._publish(**fields)
        except EtcdError as error:
            raise OperationError(503, f"etcd did not take the worker's new card ({error}); try again") from error

    @asynccontextmanager
    async def _turn(self, operation: Operation) -> AsyncIterator[bool]:
        """This operation's turn; yields whether there is anything to do.

        Raises:
            OperationError: 503, others take too long; 409, the state forbids it.
        """
        try:
            async with asyncio.timeout(commands.TURN_S):
                await self._lock.acquire()
        except TimeoutError:
            raise OperationError(
                503, f"the worker has been busy with {self._now} for {commands.TURN_S:.0f} s: try again later"
            ) from None
        try:
            something = check(self.state, operation)
            self._now = operation
            yield something
        finally:
            self._now = None
            self._lock.release()

    @asynccontextmanager
    async def _steps(self) -> AsyncIterator[AsyncExitStack]:
        """Steps whose undoing is pushed before each; when one fails, all are taken back, newest first."""
        undo = AsyncExitStack()
        try:
            yield undo
        except Exception as error:
            why = str(error) or ("it took too long" if isinstance(error, TimeoutError) else type(error).__name__)
            status = error.status if isinstance(error, OperationError) else 500
            try:
                async with asyncio.timeout(commands.ENGINE_S):
                    await undo.aclose()
            except Exception as second:
                log.exception("a failed operation could not be undone")
                self._gate.withdraw()
                self.state = State.BROKEN
                self._why = f"{why}; and undoing it failed: {type(second).__name__}: {second}"
                raise OperationError(500, f"{self._why}; the worker does not serve") from error
            if isinstance(error, OperationError):
                raise
            raise OperationError(status, f"{why}; undone: the worker is {self.state} as before") from error


@asynccontextmanager
async def operated(
    control: Control,
    recipe: Recipe,
    member: str,
    engine: Engine,
    gate: Gate,
    publish: Publish,
    kept: KeptAdapters,
    on_cleared: Callable[[], None] = lambda: None,
) -> AsyncIterator[Operations]:
    """Take commands for as long as the block runs; those that come meanwhile are answered, the rest find nobody.

    Entered, the adapters are loaded that a worker in this place had before.
    """
    operations = Operations(
        engine, gate, publish, recipe.engine.drain_s, recipe.engine.lora_dirs, kept.write, on_cleared
    )
    await operations.adapters.restore(await asyncio.to_thread(kept.read))
    async with asyncio.TaskGroup() as group:
        work = commands.serve_commands(control, recipe.name, member, operations.perform)
        task = group.create_task(work, name="commands")
        yield operations
        task.cancel()
