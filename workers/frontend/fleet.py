"""What the frontends of a deployment share: how many of them serve, and the limits that operators have set while they do.

Both are in etcd: `/baton/<deployment>/frontends/live/<name>` under a lease for each one, and `.../frontends/limits` for good, by
model. Each frontend enforces its part of them (`admission.Thresholds.part`), so that all together keep what the recipe or an operator says.
While etcd is away what was known last holds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from workers.frontend.admission import Gate
from workers.frontend.errors import ApiError
from workers.runtime.etcd import Etcd, EtcdError, LeaseLostError

log = logging.getLogger(__name__)

TTL_S = 5
RETRY_S = 0.3


class Fleet:
    """One frontend among the others; `follow` must run all the time, and `keep` while it serves."""

    def __init__(self, etcd: Etcd, deployment: str, name: str, gates: Mapping[str, Gate]) -> None:
        """Make it; `gates` by model."""
        self._etcd = etcd
        self._root = f"/baton/{deployment}/frontends/"
        self._name = name
        self._gates = gates
        self._changes: dict[str, dict[str, Any]] = {}
        self._others: set[str] = set()

    async def change(self, models: Sequence[str], values: dict[str, Any]) -> None:
        """Change limits of these models, for as long as the deployment runs.

        Raises:
            ApiError: 400, naming what is wrong, and nothing was changed; 503, etcd does not answer, and the limits of the model
                that it names and of those after it stay as they are.
        """
        wanted = {}
        for model in models:
            now = self._gates[model].whole.changed(values)
            wanted[model] = self._changes.get(model, {}) | {name: getattr(now, name) for name in values}
        for model, changes in wanted.items():
            try:
                await self._etcd.put(f"{self._limits}{model}", msgspec.json.encode(changes))
            except EtcdError as error:
                raise ApiError(
                    503, f"etcd does not answer ({error}): limits of {model} stay as they are", retry_after_s=1
                ) from error
            self._set(model, changes)

    async def keep(self) -> None:
        """Be counted as one that serves; for ever, and not after it was cancelled."""
        lease = 0
        try:
            while True:
                try:
                    if not lease:
                        granted = await self._etcd.grant(TTL_S)
                        await self._etcd.put(self._own, b"", granted)
                        lease = granted
                    await asyncio.sleep(TTL_S / 3)
                    await self._etcd.keep_alive(lease)
                except LeaseLostError:
                    lease = 0
                except EtcdError:
                    await asyncio.sleep(RETRY_S)
        finally:
            if lease:
                try:
                    async with asyncio.timeout(1):
                        await self._etcd.revoke(lease)
                except (EtcdError, TimeoutError) as error:
                    log.debug("the lease ends by itself: %s", error)

    async def follow(self) -> None:
        """Take part in the limits as frontends come and go and operators change them; for ever."""
        while True:
            try:
                found, revision = await self._etcd.prefix(self._root)
                self._others = {key for key in found if self._is_other(key)}
                for model in self._gates:
                    key = f"{self._limits}{model}"
                    if key in found:
                        self._read(key, found[key])
                    elif (
                        model in self._changes
                    ):  # etcd came back without its data: operators' words are not lost with it
                        await self._etcd.put(key, msgspec.json.encode(self._changes[model]))
                self._divide()
                async for changes in self._etcd.watch(self._root, revision + 1):
                    for change in changes:
                        if change.key.startswith(self._limits) and change.value is not None:
                            self._read(change.key, change.value)
                        elif self._is_other(change.key):
                            (self._others.discard if change.value is None else self._others.add)(change.key)
                    self._divide()
            except EtcdError as error:
                log.debug("etcd is away (%s): the limits stay as they are", error)
            await asyncio.sleep(RETRY_S)

    @property
    def _limits(self) -> str:
        return f"{self._root}limits/"

    @property
    def _own(self) -> str:
        return f"{self._root}live/{self._name}"

    def _is_other(self, key: str) -> bool:
        """Whether it is another frontend of the same rank: those of a rank that stands by get no requests."""
        own_rank = key.rpartition("/")[2].partition(".")[2] == self._name.partition(".")[2]
        return key.startswith(f"{self._root}live/") and key != self._own and own_rank

    def _divide(self) -> None:
        """This frontend counts itself from the first: in the second before it is told of, all together allow a little more."""
        names = sorted(self._others | {self._own})
        for gate in self._gates.values():
            gate.divide(names.index(self._own), len(names))

    def _read(self, key: str, value: bytes) -> None:
        model = key.removeprefix(self._limits)
        try:
            self._set(model, msgspec.json.decode(value, type=dict[str, Any]))
        except (msgspec.DecodeError, ApiError, KeyError) as error:
            log.error("%s in etcd is not understood (%r); left as it was", key, error)

    def _set(self, model: str, changes: dict[str, Any]) -> None:
        gate, before = self._gates[model], self._changes.get(model, {})
        if changes != before:
            gate.change({name: value for name, value in changes.items() if before.get(name) != value})
            self._changes[model] = changes
            log.info("limits of all frontends together for the model %s are now %s", model, gate.whole)
