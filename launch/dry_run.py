"""Everything that a launch would do, as text; nothing is touched."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from launch.compose import Launch
from launch.plan import Member, Plan
from launch.recipe import Backend, Launcher
from launch.records import RunDirectory
from slurm import commands
from slurm.batch import Submission, script, submitted_words
from slurm.places import planned
from workers.engine.arguments import engine_arguments


def describe(asked: Launch, plan: Plan, run_dir: Path) -> str:
    """The plan, the batch script, and the command, environment and engine arguments of each member."""
    parts = [
        f"# plan: {plan.ranks} ranks, {len(plan.members)} engine members, launcher {asked.launcher}",
        plan_table(plan),
        "Ports are offsets into the block that each rank claims when it starts (20000 to 32767, from the job's id).\n",
    ]
    if asked.launcher is Launcher.SLURM:
        words = submitted_words(asked.overrides)
        submission = Submission(run_dir=run_dir, attempt=RunDirectory(run_dir).next_attempt(), overrides=words)
        text = script(asked.recipe, plan, submission)
        parts.append(f"# batch script\n{text}")
    parts.append(_members(asked, plan, run_dir))
    for served in asked.recipe.models:
        if not served.model.tiny and not (Path(served.model.path) / "config.json").is_file():
            parts.append(f"# warning: {served.model.path} is not there yet\n")
    go = [word for word in asked.overrides if word.partition("=")[0] != "dry_run"]
    parts.append(f"# to go on\n{shlex.join(['python', '-m', 'launch', *go])}")
    return "\n".join(parts)


def plan_table(plan: Plan) -> str:
    """Ranks, members, slots and ports."""
    table = Table(title=None)
    for column in ("rank", "member", "slots", "requests", "metrics", "rendezvous", "side channel", "kv events"):
        table.add_column(column)
    for member in plan.members:
        ports = member.ports
        table.add_row(
            str(member.rank),
            member.name,
            _span(member.slots),
            f"+{ports.requests}" if member.leader else "",
            f"+{ports.metrics}" if member.leader else "",
            _rendezvous(member),
            _ports(ports.side_channel, ports.ranks) if member.leader else "",
            _ports(ports.kv_events, ports.ranks) if member.leader else "",
        )
    output = io.StringIO()
    Console(file=output, width=120).print(table)
    return output.getvalue()


def _rendezvous(member: Member) -> str:
    """Where an engine of several nodes meets."""
    if member.nodes == 1 or member.node:
        return ""
    return f"+{member.ports.data_parallel if member.by_data else member.ports.rendezvous}"


def _ports(first: int, count: int) -> str:
    return f"+{first}" if count == 1 else f"+{first}..{first + count - 1}"


def _span(slots: tuple[int, ...]) -> str:
    """`0-7`, or `3`; a member's slots are consecutive."""
    return str(slots[0]) if len(slots) == 1 else f"{slots[0]}-{slots[-1]}"


def _members(asked: Launch, plan: Plan, run_dir: Path) -> str:
    places = planned(plan)
    lines = []
    for name in plan.frontends:
        lines += [f"# {name} on rank 0", shlex.join(commands.frontend(name, run_dir).argv), ""]
    for member in plan.members:
        recipe = asked.recipe.of(member.model)
        invocation = commands.engine(recipe, member, run_dir, places[member.rank])
        lines.append(f"# {member.name} on rank {member.rank}")
        lines += [f"{name}={value}" for name, value in invocation.env.items()]
        lines.append(shlex.join(invocation.argv))
        if recipe.engine.backend is Backend.VLLM:
            arguments = engine_arguments(recipe, plan, member, places)
            lines += ["# vLLM engine arguments", msgspec.yaml.encode(arguments).decode()]
    return "\n".join(lines)
