"""Adapters on a worker that serves: loaded once, shown when they are there, gone when nobody uses them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import make_adapter
from workers.engine.base import Adapter, RefusedError
from workers.engine.echo_operations import EchoOperations
from workers.engine.lora import Adapters
from workers.runtime.commands import LoadLora, Operation, OperationError, UnloadLora


class Worker:
    """Adapters over an echo engine; `shown` is what the frontends were told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = EchoOperations({})
        self.uses: Counter[str] = Counter()
        self.shown: list[tuple[str, ...]] = []
        self.unreachable = False
        self.lock = asyncio.Lock()
        self.adapters = Adapters(self.engine, self.uses, [str(folder)], self._turn, self._publish, drain_s=5)

    @contextlib.asynccontextmanager
    async def _turn(self, operation: Operation) -> AsyncIterator[bool]:
        async with self.lock:
            yield True

    async def _publish(self, names: tuple[str, ...]) -> None:
        await asyncio.sleep(0)
        if self.unreachable:
            raise OSError("etcd is away")
        self.shown.append(names)

    async def load(self, name: str, folder: str | None = None) -> dict[str, Any]:
        """Load an adapter from a folder of its own."""
        path = self.folder / (folder or name)
        return await self.adapters.load(LoadLora(name=name, path=str(path)))


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    """A worker that may load a, b and c, two at a time."""
    for number, name in enumerate("abc"):
        make_adapter(tmp_path / name, seed=number)
    return Worker(tmp_path)


async def test_twenty_loads_of_one_adapter_are_one_load(worker: Worker) -> None:
    """And twenty successes."""
    answers = await asyncio.gather(*(worker.load("a") for _ in range(20)))

    assert sorted(answer["loaded"] for answer in answers) == [False] * 19 + [True]
    assert worker.engine.loads == 1
    assert worker.shown == [("a",)]


async def test_a_full_engine_refuses_one_more(worker: Worker) -> None:
    """vLLM would forget another adapter in silence, also with all three asked at once."""
    answers = await asyncio.gather(*(worker.load(name) for name in "abc"), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, OperationError)]

    assert [error.status for error in refused] == [409]
    assert "max_cpu_loras" in str(refused[0])
    assert len(worker.engine.adapters) == 2
    assert worker.engine.loads == 2


async def test_a_name_is_taken_until_it_is_unloaded(worker: Worker) -> None:
    """From another folder it is another adapter."""
    await worker.load("a")
    with pytest.raises(OperationError, match="unload it first") as error:
        await worker.load("a", "b")
    assert error.value.status == 409
    await worker.adapters.unload(UnloadLora(name="a"))
    await worker.load("a", "b")

    assert worker.engine.adapters["a"].path == str(worker.folder / "b")


@pytest.mark.parametrize("name", ["", "a b", "-a", "a" * 129, "a\n", "ä", "../a"])
async def test_a_name_that_cannot_be_a_model_is_refused(worker: Worker, name: str) -> None:
    """Clients send it as "model", and logs show it."""
    with pytest.raises(OperationError, match="letters, digits") as error:
        await worker.load(name, "a")
    assert error.value.status == 400


async def test_the_base_models_name_is_taken(worker: Worker) -> None:
    """It would hide the model."""
    with pytest.raises(OperationError, match="name of the base model"):
        await worker.load("echo", "a")


async def test_an_adapter_that_cannot_be_shown_is_not_kept(worker: Worker) -> None:
    """Nobody would find it, and it would take its place for good."""
    worker.unreachable = True
    with pytest.raises(OSError, match="etcd is away"):
        await worker.load("a")
    assert worker.engine.adapters == {}
    worker.unreachable = False
    await worker.load("a")

    assert worker.shown == [("a",)]


async def test_an_adapter_that_the_engine_refuses_is_a_clients_error(worker: Worker) -> None:
    """And leaves nothing behind."""

    async def refuse(adapter: Adapter) -> None:
        raise RefusedError("too strange")

    worker.engine.add_adapter = refuse  # type: ignore[method-assign]
    with pytest.raises(OperationError, match="the engine refused 'a': too strange") as error:
        await worker.load("a")

    assert error.value.status == 400
    assert worker.adapters.list() == []
    assert worker.shown == []


async def test_an_adapter_goes_when_its_last_request_has_ended(worker: Worker) -> None:
    """The frontends are told first; the engine keeps it until then, and other adapters come and go meanwhile."""
    await worker.load("a")
    worker.uses["a"] = 2
    task = asyncio.create_task(worker.adapters.unload(UnloadLora(name="a")))
    while worker.shown[-1] != ():
        await asyncio.sleep(0)
    await worker.load("b")
    assert "a" in worker.engine.adapters
    worker.uses["a"] = 0
    await task

    assert list(worker.engine.adapters) == ["b"]
    assert worker.shown == [("a",), (), ("b",)]


async def test_an_adapter_that_stays_in_use_stays(worker: Worker) -> None:
    """And the frontends are told so, also of what was loaded meanwhile."""
    await worker.load("a")
    worker.uses["a"] = 1
    task = asyncio.create_task(worker.adapters.unload(UnloadLora(name="a", timeout_s=0.0)))
    while worker.shown[-1] != ():
        await asyncio.sleep(0)
    await worker.load("b")
    with pytest.raises(OperationError, match="1 requests still use 'a'") as error:
        await task

    assert error.value.status == 409
    assert set(worker.shown[-1]) == {"a", "b"}
    assert set(worker.engine.adapters) == {"a", "b"}


async def test_what_is_not_loaded_cannot_be_unloaded(worker: Worker) -> None:
    """404, with what is."""
    await worker.load("b")
    with pytest.raises(OperationError, match=r"no adapter 'a' is loaded \(loaded: b\)") as error:
        await worker.adapters.unload(UnloadLora(name="a"))

    assert error.value.status == 404


async def test_changed_files_get_another_path(worker: Worker) -> None:
    """vLLM's prefix cache knows adapters by name and path; the same files keep theirs, and what was cached for them."""
    paths = []
    for seed in (None, 5, None):
        if seed is not None:
            make_adapter(worker.folder / "a", seed=seed)
        await worker.load("a")
        paths.append(worker.engine.adapters["a"].path)
        await worker.adapters.unload(UnloadLora(name="a"))

    assert paths[0] != paths[1] == paths[2]
    assert len({Path(path).resolve() for path in paths}) == 1


async def test_an_adapters_number_follows_from_its_name(worker: Worker) -> None:
    """The same on every worker, and after every start."""
    await worker.load("a")
    await worker.load("b")
    first = {name: adapter.ident for name, adapter in worker.engine.adapters.items()}
    other = Worker(worker.folder)
    await other.load("b")

    assert other.engine.adapters["b"].ident == first["b"]
    assert len(set(first.values())) == 2
    assert all(0 < ident < 2**31 for ident in first.values())
