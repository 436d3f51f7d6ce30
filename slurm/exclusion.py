"""Which nodes a deployment goes on without, after the preflight. Pure, so that every rank comes to the same result.

A node is bad for what it found on itself. What two nodes found between each other is the fault of whoever has more such
complaints; of two with as many, of the later rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch.plan import Plan
from launch.recipe import Recipe
from slurm.preflight import Grade, Report, judge_links

BETWEEN = {"peer", "nixl", "rate", "clock"}
MOST_RESUBMISSIONS = 2


def bad_ranks(reports: Sequence[Report], recipe: Recipe) -> dict[int, str]:
    """The ranks that are not fit, each with its node and the reason."""
    found: dict[int, list[str]] = {}
    for report in reports:
        own = [f"{item.name}: {item.what}" for item in report.failed if item.name not in BETWEEN]
        if own:
            found[report.rank] = own
    complaints = _complaints(reports, recipe)
    while open_ := {pair: what for pair, what in complaints.items() if not found.keys() & set(pair)}:
        counts = {rank: sum(rank in pair for pair in open_) for pair in open_ for rank in pair}
        worst = max(counts, key=lambda rank: (counts[rank], rank))
        found[worst] = [what for pair, what in open_.items() if worst in pair]
    nodes = {report.rank: node_of(report) for report in reports}
    return {rank: f"node {nodes.get(rank, '?')} is not fit: {'; '.join(found[rank])}" for rank in sorted(found)}


def cannot_go_on(bad: Mapping[int, str], plan: Plan) -> str | None:
    """Why there is no deployment without these ranks, or None when there is one."""
    if 0 in bad:
        return "rank 0 carries the control plane"
    broken = {member.engine for member in plan.members if member.rank in bad}
    for group in dict.fromkeys(member.group for member in plan.members):
        if all(engine in broken for engine in plan.engines(group)):
            return f"no {group} engine would be left"
    return None


def node_of(report: Report) -> str:
    """The node as Slurm calls it."""
    return report.node or report.host


def excluding(given: object, nodes: Sequence[str]) -> str:
    """sbatch's --exclude with more nodes in it."""
    return ",".join(dict.fromkeys([*(str(given).split(",") if given else []), *nodes]))


def _complaints(reports: Sequence[Report], recipe: Recipe) -> dict[tuple[int, int], str]:
    """What ranks said of their peers, by the two of them."""
    found = {}
    for report in reports:
        for link in report.links:
            failed = [item for item in judge_links([link], recipe) if item.grade is Grade.FAILED]
            if failed:
                found[report.rank, link.peer] = f"{failed[0].name}: rank {report.rank} says: {failed[0].what}"
    return found
