"""What a person sees while a deployment starts, runs and ends; also the table of `launch.status`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch.plan import Plan
from launch.records import Endpoint, MemberRecord, RankRecord, State

STYLES = {
    State.READY: "green",
    State.FAILED: "red",
    State.RESTARTING: "yellow",
    State.QUEUED: "dim",
    State.STOPPED: "dim",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One member as shown."""

    name: str
    rank: int
    host: str
    slots: str
    record: MemberRecord


def rows(plan: Plan, ranks: Mapping[int, RankRecord]) -> list[Row]:
    """Every member of the plan, those of ranks that have not started as queued."""
    names = [(member.name, member.rank, ",".join(map(str, member.slots))) for member in plan.members]
    leading = (*plan.frontends, "nats", "etcd")
    names += [(name, 0, "") for name in leading]
    # The same on other ranks that may lead, as they say themselves; engines that have left are no longer shown.
    found_there = [(name, rank) for rank in sorted(ranks) for name in ranks[rank].members if name not in leading]
    names += [(name, rank, "") for name, rank in found_there if name.partition(".")[0] in leading]
    found = []
    for name, rank, slots in names:
        record = ranks.get(rank)
        state = State.QUEUED if record is None else State.STARTING
        member = record.members.get(name) if record else None
        found.append(
            Row(name, rank, record.host if record else "", slots, member or MemberRecord(state=state, since=0))
        )
    return found


def table(title: str, found: list[Row]) -> Table:
    """The rows as a table."""
    shown = Table(title=title, title_justify="left", header_style="bold")
    for column in ("member", "rank", "host", "slots", "state", "for", "restarts", ""):
        shown.add_column(column)
    for row in found:
        age = f"{max(0.0, time.time() - row.record.since):.0f} s" if row.record.since else ""
        restarts = str(row.record.restarts) if row.record.restarts else ""
        detail = row.record.detail.splitlines()[0][:80] if row.record.detail else ""
        style = STYLES.get(row.record.state, "")
        shown.add_row(
            row.name,
            str(row.rank),
            row.host,
            row.slots,
            f"[{style}]{row.record.state}[/]" if style else str(row.record.state),
            age,
            restarts,
            detail,
        )
    return shown


class Display:
    """Progress on a terminal as a live table, elsewhere as one line for each change."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._told: dict[str, State] = {}
        self._note = ""

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, found: list[Row], note: str = "") -> None:
        """Show how it is now; `note` says more of the whole (why a job is pending)."""
        if self._live:
            self._live.update(table(f"{self._name} {note}", found))
            return
        if note and note != self._note:
            self._note = note
            self._console.print(f"{self._name}: {note}", highlight=False, soft_wrap=True)
        for row in found:
            if self._told.get(row.name) is not row.record.state:
                self._told[row.name] = row.record.state
                where = f" on {row.host}" if row.host else ""
                self._console.print(f"{row.name}: {row.record.state}{where}", highlight=False, soft_wrap=True)


def endpoint_text(endpoint: Endpoint) -> str:
    """Where to send requests, and a command that does."""
    model = endpoint.models[0]
    return (
        f"endpoint   {endpoint.url}\n"
        f"models     {', '.join(endpoint.models)}\n"
        f"API key    {endpoint.api_key_file}\n"
        f"try        curl -s {endpoint.url}/chat/completions -H \"Authorization: Bearer $(cat '{endpoint.api_key_file}')\" "
        f'-H \'Content-Type: application/json\' -d \'{{"model": "{model}", "max_tokens": 32, '
        '"messages": [{"role": "user", "content": "Hello!"}]}\''
    )
