"""Where the ranks are: their addresses and port blocks, as they said themselves, or as symbols in a dry run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launch.plan import Plan
from launch.records import RankRecord


@dataclass(frozen=True, slots=True)
class Place:
    """A running rank."""

    address: str
    base: int

    def port(self, offset: int) -> str:
        """A port of the rank's block."""
        return str(self.base + offset)


@dataclass(frozen=True, slots=True)
class PlannedPlace:
    """A rank that does not run yet; its address and ports are shown as `<rank 1>` and `<rank 1 port 19>`."""

    rank: int

    @property
    def address(self) -> str:
        """A symbol for the address."""
        return f"<rank {self.rank}>"

    def port(self, offset: int) -> str:
        """A symbol for a port of the rank's block."""
        return f"<rank {self.rank} port {offset}>"


def places(ranks: Mapping[int, RankRecord]) -> dict[int, Place]:
    """The places of the ranks that have reported."""
    return {rank: Place(record.address, record.port_base) for rank, record in ranks.items()}


def planned(plan: Plan) -> dict[int, PlannedPlace]:
    """The places of a plan that does not run."""
    return {rank: PlannedPlace(rank) for rank in range(plan.ranks)}
