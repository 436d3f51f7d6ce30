"""Frontends share the limits of their deployment, through a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.records import Control
from tests.workers.test_control import client, control, etcd_server, running
from workers.frontend.admission import DIVIDED, Gate, Thresholds
from workers.frontend.errors import ApiError
from workers.frontend.fleet import Fleet

__all__ = ["control"]  # the fixture


@contextlib.asynccontextmanager
async def frontend(control: Control, name: str, serves: bool = True) -> AsyncIterator[tuple[Gate, Fleet]]:
    """One frontend's limits for as long as it lives."""
    gate = Gate(Thresholds(requests_per_minute=60, queue_requests=9), lambda limits: True)
    async with client(control) as etcd:
        fleet = Fleet(etcd, "d", name, {"m": gate})
        tasks = [asyncio.create_task(fleet.follow())]
        if serves:
            tasks.append(asyncio.create_task(fleet.keep()))
        try:
            yield gate, fleet
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


async def test_frontends_divide_the_limits_as_they_come_and_go(control: Control, tmp_path: Path) -> None:
    """Together they allow what the recipe says; one that leaves passes its part on."""
    async with running(etcd_server(control, tmp_path), tmp_path), frontend(control, "frontend-0") as (first, _):
        async with frontend(control, "frontend-1") as (second, _):
            await until(lambda: first.frontends == second.frontends == 2)
            both = [first.thresholds, second.thresholds]
        await until(lambda: first.frontends == 1)

        assert [limits.requests_per_minute for limits in both] == [30, 30]
        assert sorted(limits.queue_requests for limits in both) == [4, 5]
        assert first.thresholds == first.whole == Thresholds(requests_per_minute=60, queue_requests=9)


async def test_frontends_of_ranks_that_stand_by_take_no_part(control: Control, tmp_path: Path) -> None:
    """They get no requests: the head's own have the whole limits, and so have those of another rank once it leads."""
    async with (
        running(etcd_server(control, tmp_path), tmp_path),
        frontend(control, "frontend-0") as (first, _),
        frontend(control, "frontend-1") as (second, _),
        frontend(control, "frontend-0.1") as (standby, _),
    ):
        await until(lambda: first.frontends == second.frontends == 2)
        await asyncio.sleep(0.5)

        assert (first.frontends, second.frontends, standby.frontends) == (2, 2, 1)
        assert standby.thresholds == standby.whole


async def test_a_change_reaches_all_frontends_and_those_that_come_later(control: Control, tmp_path: Path) -> None:
    """Also when etcd loses its data meanwhile; while it is away a change is refused and nothing is changed."""
    async with frontend(control, "frontend-0") as (first, fleet):
        async with running(etcd_server(control, tmp_path), tmp_path), frontend(control, "frontend-1") as (second, _):
            await until(lambda: first.frontends == second.frontends == 2)
            await fleet.change(["m"], {"requests_per_minute": "100"})
            await until(lambda: second.whole.requests_per_minute == 100)
            assert second.thresholds.requests_per_minute == 50
            with pytest.raises(ApiError, match="queue_request"):
                await fleet.change(["m"], {"queue_request": 1})
        with pytest.raises(ApiError, match="limits of m stay as they are"):
            await fleet.change(["m"], {"requests_per_minute": 7})
        assert first.whole.requests_per_minute == 100

        shutil.rmtree(tmp_path / "etcd")
        async with running(etcd_server(control, tmp_path), tmp_path), frontend(control, "frontend-2") as (late, _):
            await until(lambda: late.whole.requests_per_minute == 100)
            await until(lambda: late.frontends == first.frontends == 2)


@given(st.fixed_dictionaries({name: st.integers(0, 1000) for name in DIVIDED}), st.integers(1, 8))
def test_parts_sum_up_to_the_whole(sizes: dict[str, int], of: int) -> None:
    """No limit stays none, and a limit is never divided down to none."""
    whole = Thresholds(**sizes)
    parts = [whole.part(number, of) for number in range(of)]
    for name, size in sizes.items():
        each = [getattr(part, name) for part in parts]
        assert sum(each) == (max(size, of) if size else 0)
        assert max(each) - min(each) <= 1
    assert all(part.busy_kv_usage == whole.busy_kv_usage for part in parts)
