"""Who leads: a claim in etcd under a lease, which ends when its holder is silent for a few seconds.

A rank may act as head as long as it is *sure*: less than the lease's time ago etcd said that it still holds. That is counted
by this process' own clock from before the question, so a head that was stopped, or is cut off from the others, knows that it
is not sure before anybody else can have been elected. Only etcd's "it is gone" ends a term; that nobody answers does not, for
without two of the three etcd members nobody else is elected either, and what serves should go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from workers.runtime.awake import AwakeClock
from workers.runtime.etcd import Etcd, EtcdError, LeaseLostError

log = logging.getLogger(__name__)

LEASE_S = 3
RENEW_S = 0.8
LOOK_S = 0.3
FIRST_TERM = 0
FIRST_RANK = 0


class Headship:
    """Whether this rank leads. `elected` and `deposed` are set in turn; where rank 0 is alone, its first term lasts for ever."""

    def __init__(self, deployment: str, rank: int, etcd: Etcd | None = None) -> None:
        """Make it; without etcd nobody is elected, and rank 0 leads."""
        self.elected = asyncio.Event()
        self.deposed = asyncio.Event()
        self.term = FIRST_TERM
        self._etcd = etcd
        self._key = f"/baton/{deployment}/head"
        self._rank = rank
        self._lease = 0
        self._sure_until = 0.0
        if etcd is None and rank == FIRST_RANK:
            self.elected.set()

    @property
    def leads(self) -> bool:
        """Whether this rank is the head, as far as it knows."""
        return self.elected.is_set()

    @property
    def contested(self) -> bool:
        """Whether another rank could lead."""
        return self._etcd is not None

    @property
    def sure(self) -> bool:
        """Whether no other rank can be head at this moment."""
        return self.leads and (self._etcd is None or time.monotonic() < self._sure_until)

    async def keep(self, may_claim: Callable[[], bool]) -> None:
        """Renew the claim, or make it once nobody has one and `may_claim` says so; for ever."""
        if self._etcd is None:
            return
        clock = AwakeClock()
        rest_until = 0.0
        while True:
            try:
                if self.leads:
                    await self._renew(self._etcd)
                elif may_claim() and clock.now >= rest_until:
                    await self._claim(self._etcd)
            except LeaseLostError:
                self._lose()
                continue  # nobody else may have noticed: then it is ours again at once
            except EtcdError as error:
                log.debug("rank %d cannot ask who leads: %s", self._rank, error)
            clock.tick()  # what a question took is no pause of this process
            await asyncio.sleep(RENEW_S if self.leads else LOOK_S)
            if clock.tick() > LEASE_S / 2:
                # A machine that slept: all leases look old, and the head is about to renew its own.
                rest_until = clock.now + LEASE_S

    async def _renew(self, etcd: Etcd) -> None:
        asked = time.monotonic()
        await etcd.keep_alive(self._lease)
        self._sure_until = asked + LEASE_S

    async def _claim(self, etcd: Etcd) -> None:
        if await etcd.get(self._key) is not None:
            return
        asked = time.monotonic()
        lease = await etcd.grant(LEASE_S)
        term = await etcd.create(self._key, f"rank {self._rank} {lease:x}".encode(), lease)
        if term is None:
            with contextlib.suppress(EtcdError):
                await etcd.revoke(lease)
            return
        self._lease, self._sure_until, self.term = lease, asked + LEASE_S, term
        self.deposed.clear()
        self.elected.set()

    def _lose(self) -> None:
        log.warning("rank %d is no longer known to lead", self._rank)
        self.elected.clear()
        self.deposed.set()
