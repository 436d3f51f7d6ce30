"""The LoRA adapters of one worker: loaded and unloaded while it serves.

An adapter is served from the moment that the worker's card names it, and no longer than that: the engine has it before the
card says so, and the card has forgotten it, and no request uses it, before the engine loses it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.engine import adapter_files
from workers.engine.base import Adapter, Operable, RefusedError
from workers.runtime.commands import LoadLora, Operation, OperationError, UnloadLora

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
POLL_S = 0.02
# A frontend that has not yet heard that an adapter leaves may still send requests for it.
QUIET_S = 0.3

Turn = Callable[[Operation], Any]
Publish = Callable[[tuple[str, ...]], Awaitable[None]]
Keep = Callable[[Mapping[str, str]], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter that the engine has."""

    adapter: Adapter
    folder: Path
    rank: int


class Adapters:
    """What is loaded, and how it changes.

    `turn(operation)` is an async context manager that waits for this worker's other operations and refuses what its state
    forbids; `publish(names)` makes the names known to the frontends, and raises if it cannot. `keep(folders)` is told after
    each change, by name, what there is.
    """

    def __init__(
        self,
        operable: Operable,
        uses: Counter[str],
        folders: Sequence[str],
        turn: Turn,
        publish: Publish,
        drain_s: float,
        keep: Keep = lambda folders: None,
    ) -> None:
        self._keep = keep
        self._operable = operable
        self._uses = uses
        self._folders = folders
        self._turn = turn
        self._publish = publish
        self._drain_s = drain_s
        self._loaded: dict[str, Loaded] = {}
        self._digests: dict[tuple[str, Path], tuple[str, int]] = {}
        self._shown: tuple[str, ...] = ()
        self._publishing = asyncio.Lock()
        # One after the other for each name: twenty loads of one adapter are one load and nineteen findings.
        self._names: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def list(self) -> list[dict[str, Any]]:
        """The adapters that are loaded, with what runs on them."""
        return [
            {"name": name, "path": str(item.folder), "rank": item.rank, "running": self._uses[name]}
            for name, item in self._loaded.items()
        ]

    async def forget(self, names: Iterable[str]) -> None:
        """The engine has lost these."""
        for name in names:
            self._loaded.pop(name, None)
            await self._show(name, shown=False)
        await self._keep_all()

    async def restore(self, folders: Mapping[str, str]) -> None:
        """Load what a worker in this place had before; what cannot be loaded any more is left out, and the log says why."""
        for name, folder in folders.items():
            try:
                if self._operable.limits is None:
                    raise OperationError(501, "this engine takes no adapters")
                await self.load(LoadLora(name=name, path=folder))
            except OperationError as error:
                log.error("the adapter %r could not be loaded again: %s", name, error)
            else:
                log.info("the adapter %r is loaded again", name)

    async def load(self, asked: LoadLora) -> dict[str, Any]:
        """Load an adapter, or find that it is loaded.

        Raises:
            OperationError: 400, 403 or 404, the adapter cannot be served; 409, there is no room for it, or its name is
                taken.
        """
        if not NAME.fullmatch(asked.name):
            raise OperationError(400, f"name={asked.name!r}: use up to 128 letters, digits and . _ : / -")
        limits = self._operable.limits
        assert limits, "an engine without adapters refuses this before"
        if asked.name in limits.models[:1]:
            raise OperationError(409, f"{asked.name!r} is the name of the base model")
        async with self._names[asked.name]:
            folder = await asyncio.to_thread(adapter_files.folder_of, asked.path, asked.uri, self._folders)
            before = self._loaded.get(asked.name)
            if before is not None:
                if before.folder != folder:
                    raise OperationError(409, f"{asked.name!r} is loaded from {before.folder}: unload it first")
                return {"loaded": False, "rank": before.rank}
            checked = await asyncio.to_thread(adapter_files.check, folder, limits, self._folders)
            async with self._turn(Operation.LOAD_LORA), _undoing() as undo:
                self._refuse_full(limits.loaded)
                adapter = Adapter(
                    name=asked.name, ident=self._ident(asked.name), path=self._spelled(asked.name, folder, checked)
                )
                undo.push_async_callback(self._operable.remove_adapter, asked.name)
                try:
                    await self._operable.add_adapter(adapter)
                except RefusedError as error:
                    raise OperationError(400, f"the engine refused {asked.name!r}: {error}") from error
                await self._show(asked.name)
                self._loaded[asked.name] = Loaded(adapter, folder, checked.rank)
            await self._keep_all()
        return {"loaded": True, "rank": checked.rank}

    async def unload(self, asked: UnloadLora) -> dict[str, Any]:
        """Take an adapter back once no request uses it.

        Raises:
            OperationError: 404, it is not loaded; 409, it is still in use, and stays.
        """
        timeout_s = self._drain_s if asked.timeout_s is None else asked.timeout_s
        async with self._names[asked.name], _undoing() as undo:
            async with self._turn(Operation.UNLOAD_LORA):
                if asked.name not in self._loaded:
                    loaded = ", ".join(self._loaded) or "none"
                    raise OperationError(404, f"no adapter {asked.name!r} is loaded (loaded: {loaded})")
                undo.push_async_callback(self._show, asked.name)
                await self._show(asked.name, shown=False)
            if not await self._unused(asked.name, timeout_s):
                running = self._uses[asked.name]
                raise OperationError(
                    409, f"{running} requests still use {asked.name!r} after {timeout_s:g} s; it stays"
                )
            async with self._turn(Operation.UNLOAD_LORA):
                await self._operable.remove_adapter(asked.name)
                del self._loaded[asked.name]
            await self._keep_all()
        return {}

    async def _keep_all(self) -> None:
        await asyncio.to_thread(self._keep, {name: str(item.folder) for name, item in self._loaded.items()})

    async def _show(self, name: str, shown: bool = True) -> None:
        """Put a name on the card, or take it off."""
        async with self._publishing:
            names = tuple(other for other in self._shown if other != name) + ((name,) if shown else ())
            await self._publish(names)
            self._shown = names

    def _refuse_full(self, most: int) -> None:
        if len(self._loaded) >= most:
            raise OperationError(
                409,
                f"{len(self._loaded)} adapters are loaded ({', '.join(self._loaded)}) and the engine takes {most}: "
                "unload one, or launch with a larger engine.args.max_cpu_loras",
            )

    def _ident(self, name: str) -> int:
        """The same for a name everywhere and always, so that logs of different workers can be compared."""
        ident = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % (2**31 - 1) + 1
        taken = [item.adapter.name for item in self._loaded.values() if item.adapter.ident == ident]
        if taken:
            raise OperationError(409, f"{name!r} and {taken[0]!r} cannot be loaded together: take another name")
        return ident

    def _spelled(self, name: str, folder: Path, checked: adapter_files.Checked) -> str:
        """The path for the engine: spelled anew whenever its files have changed since it was last loaded.

        vLLM keeps KV blocks of an unloaded adapter in its prefix cache, under the adapter's name and path: with changed
        weights in the same folder it would answer from them.
        """
        digest, number = self._digests.get((name, folder), (checked.digest, 0))
        if digest != checked.digest:
            number += 1
        self._digests[name, folder] = (checked.digest, number)
        return f"{folder}{'/.' * number}"

    async def _unused(self, name: str, timeout_s: float) -> bool:
        """Wait until no request has used the adapter for a moment; False when that does not happen in time."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + max(timeout_s, QUIET_S)
        quiet_since = loop.time()
        while loop.time() - quiet_since < QUIET_S:
            await asyncio.sleep(POLL_S)
            if self._uses[name] > 0:
                if loop.time() > give_up:
                    return False
                quiet_since = loop.time()
        return True


@asynccontextmanager
async def _undoing() -> AsyncIterator[AsyncExitStack]:
    """A stack of what takes the block's steps back; it is emptied, newest first, when the block fails."""
    async with AsyncExitStack() as undo:
        yield undo
        undo.pop_all()
