"""Operations on a live worker: what is allowed when, what follows what, and what becomes of a step that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer

from workers.engine.echo import EchoEngine
from workers.engine.echo_operations import EchoOperations
from workers.engine.operations import ALLOWED, LEADS_TO, Operations, State, check
from workers.engine.server import RequestServer
from workers.runtime.commands import Operation as O
from workers.runtime.commands import OperationError, arguments, operation, patience_s

OPEN = {O.STATUS, O.LIST_LORA, O.CLEAR, O.LOAD_LORA, O.UNLOAD_LORA, O.START_PROFILE, O.STOP_PROFILE}
# Each operation in each state: + it is done, = there is nothing to do, - it is refused.
TABLE = {
    State.SERVING: {**dict.fromkeys(OPEN, "+"), O.DRAIN: "+", O.PAUSE: "+", O.SLEEP: "+", O.SCALE_EP: "+"}
    | {O.SERVE: "=", O.RESUME: "=", O.WAKE: "="},
    State.DRAINING: {**dict.fromkeys(OPEN, "+"), O.SERVE: "+", O.PAUSE: "+", O.SLEEP: "+", O.SCALE_EP: "+"}
    | {O.DRAIN: "=", O.RESUME: "-", O.WAKE: "-"},
    State.PAUSED: {**dict.fromkeys(OPEN, "+"), O.RESUME: "+", O.SLEEP: "+", O.PAUSE: "="}
    | {O.SERVE: "-", O.WAKE: "-", O.DRAIN: "-", O.SCALE_EP: "-"},
    State.ASLEEP: {**dict.fromkeys(OPEN, "-"), O.STATUS: "+", O.LIST_LORA: "+", O.WAKE: "+", O.SLEEP: "="}
    | {O.SERVE: "-", O.RESUME: "-", O.DRAIN: "-", O.PAUSE: "-", O.SCALE_EP: "-"},
    State.BROKEN: {**dict.fromkeys(O, "-"), O.STATUS: "+", O.LIST_LORA: "+", O.WAKE: "+"},
}


@pytest.mark.parametrize(
    ("state", "wanted", "mark"),
    [pytest.param(s, w, mark, id=f"{s}-{w}") for s, row in TABLE.items() for w, mark in row.items()],
)
def test_a_state_allows_what_makes_sense_in_it(state: State, wanted: O, mark: str) -> None:
    """What is refused says what the worker does and, but for one that is broken, what leads back."""
    assert set(TABLE[state]) == set(O)
    if mark == "-":
        with pytest.raises(OperationError, match=f"while the worker is {state}: `") as error:
            check(state, wanted)
        assert error.value.status == 409
    else:
        assert check(state, wanted) is (mark == "+")


def test_every_state_has_a_way_back_to_serving() -> None:
    """Nothing that an operation does leaves a worker for good."""
    for state in State:
        ways = {LEADS_TO[wanted] for wanted in ALLOWED[state] if wanted in LEADS_TO}
        assert state is State.SERVING or State.SERVING in ways


@pytest.mark.parametrize(
    ("name", "given", "status", "message"),
    [
        pytest.param("dance", {}, 404, "one of status, clear", id="no such operation"),
        pytest.param("clear", {"level": 1}, 400, "unknown field `level`.*arguments: none", id="no arguments"),
        pytest.param("sleep", {"level": 3}, 400, "Invalid enum value 3.*level, timeout_s", id="no such level"),
        pytest.param("sleep", {"timeout_s": -1}, 400, ">= 0", id="negative time"),
        pytest.param("load_lora", {"path": "/a"}, 400, "missing required field `name`", id="nameless adapter"),
        pytest.param("scale_ep", {"size": "many"}, 400, "size", id="no number"),
    ],
)
def test_what_is_not_understood_is_refused(name: str, given: dict[str, Any], status: int, message: str) -> None:
    """With the field, and those that there are."""
    with pytest.raises(OperationError, match=message) as error:
        arguments(operation(name), given)
    assert error.value.status == status


def test_numbers_may_come_as_text() -> None:
    """A command line and a query have nothing else."""
    asked = arguments(O.SLEEP, {"level": "2", "timeout_s": "1.5"})

    assert asked == arguments(O.SLEEP, {"level": 2, "timeout_s": 1.5})


def test_whoever_waits_is_more_patient_than_the_worker() -> None:
    """An answer is given up only after everything that the worker may wait for."""
    slow = patience_s(O.SLEEP, arguments(O.SLEEP, {"timeout_s": 500}), drain_s=30)
    usual = patience_s(O.SLEEP, arguments(O.SLEEP, {}), drain_s=30)

    assert slow - usual == 470
    assert patience_s(O.STATUS, arguments(O.STATUS, {}), drain_s=30) < 10


class Failing(EchoOperations):
    """An engine that fails at the steps of `fails`."""

    def __init__(self) -> None:
        super().__init__({})
        self.fails: set[str] = set()
        self.calls: list[str] = []

    def _step(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise RuntimeError(f"{name} is broken")

    async def pause(self) -> None:
        self._step("pause")
        await super().pause()

    async def resume(self) -> None:
        self._step("resume")
        await super().resume()

    async def sleep(self, level: int) -> None:
        self._step("sleep")
        await super().sleep(level)

    async def wake(self) -> tuple[str, ...]:
        self._step("wake")
        await super().wake()
        return ()


class Worker:
    """An echo engine behind its request server, and the operations on it."""

    def __init__(self, model: Path) -> None:
        self.engine = EchoEngine(Tokenizer.from_file(str(model / "tokenizer.json")), 0.0)
        self.operable = self.engine.operable = Failing()
        self.server = RequestServer(self.engine, "w", CollectorRegistry())
        self.cards: list[dict[str, Any]] = []
        self.operations = Operations(self.engine, self.server, self._publish, drain_s=0.5)

    async def _publish(self, **fields: Any) -> None:
        self.cards.append(fields)

    async def do(self, name: str, **given: Any) -> dict[str, Any]:
        """Perform one operation."""
        return await self.operations.perform(name, given)

    @property
    def told(self) -> tuple[State, bool]:
        """State, and whether requests get in."""
        return self.operations.state, self.server.serving


@pytest.fixture
def worker(tiny_model: Path) -> Worker:
    """A worker that serves."""
    return Worker(tiny_model)


async def test_sleep_and_wake_take_their_steps_in_order(worker: Worker) -> None:
    """Withdrawn before the engine is touched; let in again only once it is back."""
    seen: list[tuple[str, bool]] = []

    def look(step: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def looking(*values: Any) -> Any:
            seen.append((step.__name__, worker.server.serving))
            return await step(*values)

        return looking

    for name in ("pause", "sleep", "wake", "resume"):
        setattr(worker.operable, name, look(getattr(worker.operable, name)))
    assert (await worker.do("sleep", level=2))["level"] == 2
    assert worker.told == (State.ASLEEP, False)
    assert worker.operable.level == 2
    assert (await worker.do("status"))["level"] == 2
    await worker.do("wake")

    assert worker.told == (State.SERVING, True)
    assert worker.operable.level == 0
    assert seen == [("pause", False), ("sleep", False), ("wake", False), ("resume", False)]


async def test_sleep_of_level_0_is_a_pause(worker: Worker) -> None:
    """As in vLLM; `resume` ends it."""
    await worker.do("sleep", level="0")
    assert worker.told == (State.PAUSED, False)
    assert worker.operable.paused
    await worker.do("resume")

    assert worker.told == (State.SERVING, True)
    assert worker.operable.calls == ["pause", "resume"]


async def test_what_is_so_already_is_a_success_and_does_nothing(worker: Worker) -> None:
    """An operator who lost an answer may ask again."""
    await worker.do("sleep")
    again = await worker.do("sleep")
    with pytest.raises(OperationError, match="sleeps at level 1"):
        await worker.do("sleep", level=2)

    assert again["note"] == "it was asleep already"
    assert worker.operable.calls == ["pause", "sleep"]


@pytest.mark.parametrize(
    ("before", "wanted", "fails", "calls"),
    [
        pytest.param([], "pause", "pause", ["pause", "resume"], id="pause"),
        pytest.param([], "sleep", "pause", ["pause", "resume"], id="pause before sleep"),
        pytest.param([], "sleep", "sleep", ["pause", "sleep", "wake", "resume"], id="sleep"),
        pytest.param(["drain"], "sleep", "sleep", ["pause", "sleep", "wake", "resume"], id="sleep of a drained one"),
        pytest.param(["pause"], "sleep", "sleep", ["pause", "sleep", "wake"], id="sleep of a paused one"),
        pytest.param(["pause"], "resume", "resume", ["pause", "resume", "pause"], id="resume"),
        pytest.param(["sleep"], "wake", "wake", ["pause", "sleep", "wake", "sleep"], id="wake"),
    ],
)
async def test_a_failed_step_is_undone(
    worker: Worker, before: list[str], wanted: str, fails: str, calls: list[str]
) -> None:
    """The steps before it too, newest first; the worker is as it was."""
    for name in before:
        await worker.do(name)
    was = worker.told
    worker.operable.fails = {fails}
    with pytest.raises(OperationError, match=f"{fails} is broken; undone: the worker is {was[0]} as before") as error:
        await worker.do(wanted)

    assert error.value.status == 500
    assert worker.told == was
    assert worker.operable.calls == calls


async def test_a_worker_that_cannot_be_put_back_says_that_it_does_not_serve(worker: Worker) -> None:
    """It stays withdrawn, tells why, and can be mended."""
    worker.operable.fails = {"sleep", "wake"}
    with pytest.raises(OperationError, match=r"sleep is broken; and undoing it failed: .*the worker does not serve"):
        await worker.do("sleep")
    assert worker.told == (State.BROKEN, False)
    assert "wake is broken" in (await worker.do("status"))["why"]
    with pytest.raises(OperationError, match="while the worker is broken"):
        await worker.do("pause")
    worker.operable.fails = set()
    await worker.do("wake")

    assert worker.told == (State.SERVING, True)


async def test_operations_take_turns(worker: Worker) -> None:
    """However many are asked at once, one runs; the others find what it left."""
    inside = 0
    most = 0

    async def slow() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.01)
        inside -= 1

    worker.operable.pause = slow  # type: ignore[method-assign]
    worker.operable.resume = slow  # type: ignore[method-assign]
    answers = await asyncio.gather(*(worker.do(name) for name in ("pause", "resume") * 10), return_exceptions=True)

    assert most == 1
    assert not [answer for answer in answers if isinstance(answer, BaseException)]
    assert worker.told == (State.SERVING, True)


async def test_status_answers_while_an_operation_runs(worker: Worker) -> None:
    """And says which."""
    asleep = asyncio.Event()

    async def slow(level: int) -> None:
        await asleep.wait()

    worker.operable.sleep = slow  # type: ignore[method-assign]
    task = asyncio.create_task(worker.do("sleep"))
    while (await worker.do("status"))["doing"] is None:
        await asyncio.sleep(0)
    assert (await worker.do("status"))["doing"] == "sleep"
    asleep.set()
    await task


async def test_an_engine_says_what_it_can_never_do(worker: Worker) -> None:
    """With its own reason; nothing is touched."""
    worker.operable.refusals = {"sleep": "it never sleeps"}
    with pytest.raises(OperationError, match="sleep: it never sleeps") as error:
        await worker.do("sleep")

    assert error.value.status == 501
    assert worker.told == (State.SERVING, True)
    assert (await worker.do("sleep", level=0))["state"] == "paused"


async def test_a_cache_that_is_in_use_is_not_said_to_be_cleared(worker: Worker) -> None:
    """The engine's False is an error for the operator."""
    assert await worker.do("clear") == {"cleared": True}

    async def held() -> bool:
        return False

    worker.operable.clear_cache = held  # type: ignore[method-assign]
    with pytest.raises(OperationError, match="blocks are in use") as error:
        await worker.do("clear")

    assert error.value.status == 409


async def test_profiles_begin_once_and_end_once(worker: Worker) -> None:
    """A second begin, and an end without a begin, are errors."""
    await worker.do("start_profile", prefix="p")
    assert worker.operable.profile == "p"
    with pytest.raises(OperationError, match="stop_profile"):
        await worker.do("start_profile")
    await worker.do("stop_profile")
    with pytest.raises(OperationError, match="start_profile"):
        await worker.do("stop_profile")


async def test_a_scaled_engine_tells_its_new_size(worker: Worker) -> None:
    """On its card, where the router finds its data-parallel ranks."""
    worker.operable.refusals = {}
    await worker.do("scale_ep", size="4")

    assert worker.cards == [{"dp_count": 4}]
