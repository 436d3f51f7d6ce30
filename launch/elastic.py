"""Who joined a live deployment and who left it, as files of the run directory.

    extensions/<n>.json         engines that join with a job of their own: written before the job is submitted
    departures/<engine>.json    an engine that leaves, or that was lost; written by whoever wants it, obeyed by its agents
    replacement.json            why the head could not submit a job in place of lost engines, where it could not

Both belong to an attempt and stay until the next one, so that no name is used twice. `plan_of` is the deployment's plan with
all of that; everybody who needs to know it as it is now asks there, or follows with `Following`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from launch.plan import Extension, Plan, extend, plan
from launch.recipe import Recipe
from launch.records import RunDirectory, read_bytes, write

T = TypeVar("T")
TRIES = 100


class Joining(msgspec.Struct, kw_only=True):
    """An extension and its job: `job` is the id that it was given, empty until the submission was answered.

    `in_place_of` are the engines that were lost and that it replaces.
    """

    extension: Extension
    attempt: int
    asked_by: str
    asked_at: float
    job: str = ""
    in_place_of: list[str] = []


class Departure(msgspec.Struct, kw_only=True):
    """An engine that leaves. `lost` says that nobody wanted it to: the deployment is degraded until another is there."""

    engine: str
    attempt: int
    reason: str
    asked_at: float
    lost: bool = False


class Trouble(msgspec.Struct, kw_only=True):
    """Why no job could be submitted in place of lost engines."""

    attempt: int
    what: str


def joinings(run: RunDirectory, attempt: int) -> list[Joining]:
    """The extensions of an attempt, in their order."""
    found = _read_all(_extensions(run), Joining)
    return sorted((each for each in found if each.attempt == attempt), key=lambda each: each.extension.number)


def joining(run: RunDirectory, attempt: int, number: int) -> Joining | None:
    """One extension of an attempt."""
    content = read_bytes(_extensions(run) / f"{number}.json")
    found = None if content is None else msgspec.json.decode(content, type=Joining)
    return found if found and found.attempt == attempt else None


def departures(run: RunDirectory, attempt: int) -> dict[str, Departure]:
    """The engines that have left or are to leave, by name."""
    found = _read_all(_departures(run), Departure)
    return {each.engine: each for each in found if each.attempt == attempt}


def add(
    run: RunDirectory,
    recipe: Recipe,
    attempt: int,
    wanted: Mapping[str, int],
    by: str,
    in_place_of: Iterable[str] = (),
) -> Joining:
    """Write down the next extension; of two at the same moment the later one comes after the earlier.

    Raises:
        PlanError: It cannot be planned.
    """
    folder = _extensions(run)
    folder.mkdir(exist_ok=True)
    for _ in range(TRIES):
        extension = extend(recipe, [each.extension for each in joinings(run, attempt)], wanted)
        found = Joining(
            extension=extension, attempt=attempt, asked_by=by, asked_at=time.time(), in_place_of=list(in_place_of)
        )
        plan(recipe, [extension])
        if _create(folder / f"{extension.number}.json", _json(found)):
            return found
    raise FileExistsError(f"{folder} changes all the time")


def put(run: RunDirectory, changed: Joining) -> None:
    """Write an extension again."""
    write(_extensions(run) / f"{changed.extension.number}.json", _json(changed))


def drop(run: RunDirectory, number: int) -> None:
    """Forget an extension whose job was never submitted."""
    (_extensions(run) / f"{number}.json").unlink(missing_ok=True)


def leave(run: RunDirectory, attempt: int, engine: str, reason: str, lost: bool = False) -> None:
    """Ask an engine to leave; the first reason stays."""
    folder = _departures(run)
    folder.mkdir(exist_ok=True)
    departure = Departure(engine=engine, attempt=attempt, reason=reason, asked_at=time.time(), lost=lost)
    _create(folder / f"{engine}.json", _json(departure))


def put_trouble(run: RunDirectory, attempt: int, what: str) -> None:
    """Tell why what was lost is not replaced; nothing for the end of the trouble."""
    write(run.path / "replacement.json", msgspec.json.encode(Trouble(attempt=attempt, what=what)))


def give_up(run: RunDirectory, attempt: int, waited_for: Joining, state: str) -> None:
    """Wait no longer for an extension whose job ended before it joined; `state` is Slurm's last word of it."""
    for name in waited_for.extension.engines:
        leave(run, attempt, name, f"job {waited_for.job} ended before it joined ({state or 'unknown'})")


def plan_of(run: RunDirectory, recipe: Recipe, attempt: int) -> Plan:
    """The deployment's plan as it is now."""
    return plan(recipe, [each.extension for each in joinings(run, attempt)], departures(run, attempt))


def told(run: RunDirectory, attempt: int) -> list[str]:
    """What became of the deployment since it was launched, in sentences."""
    lines = []
    for each in joinings(run, attempt):
        where = f"job {each.job}" if each.job else "not submitted yet"
        instead = f" in place of {', '.join(each.in_place_of)}" if each.in_place_of else ""
        lines.append(
            f"extension {each.extension.number} ({where}): {', '.join(each.extension.engines)}{instead}, asked for by {each.asked_by}"
        )
    for gone in sorted(departures(run, attempt).values(), key=lambda gone: gone.asked_at):
        lines.append(f"{gone.engine} {'was lost' if gone.lost else 'left'}: {gone.reason}")
    content = read_bytes(run.path / "replacement.json")
    trouble = None if content is None else msgspec.json.decode(content, type=Trouble)
    return [*lines, trouble.what] if trouble and trouble.attempt == attempt and trouble.what else lines


def short_of(gone: Collection[Departure], joined: Iterable[Joining], serving: Collection[str]) -> list[Departure]:
    """The engines that were lost and in whose place no other serves. Pure.

    Args:
        gone: All departures.
        joined: All extensions.
        serving: Names of the engines that serve.
    """
    replaced: set[str] = set()
    for each in joined:
        # A replacement may be lost too: what counts is how many of those that it brought are there.
        replaced.update(each.in_place_of[: sum(name in serving for name in each.extension.engines)])
    return [each for each in gone if each.lost and each.engine not in replaced and not _was_replacement(each, joined)]


def not_begun(where: Plan, joined: Iterable[Joining], gone: Collection[str], ranks: Collection[int]) -> list[Joining]:
    """The extensions that are waited for: their job was submitted, and none of its ranks has begun. Pure.

    Args:
        where: The plan with all extensions.
        joined: All extensions.
        gone: Names of the engines that have left.
        ranks: The ranks that have begun.
    """
    begun = {span.number for span in where.joined if any(rank in span for rank in ranks)}
    waiting = (each for each in joined if each.job and each.extension.number not in begun)
    return [each for each in waiting if any(name not in gone for name in each.extension.engines)]


def _was_replacement(gone: Departure, joined: Iterable[Joining]) -> bool:
    """Whether a lost engine stood in another's place: that one is missed already."""
    return any(each.in_place_of and gone.engine in each.extension.engines for each in joined)


class Following:
    """The plan of a running deployment, read again when a file was added or is gone."""

    def __init__(self, run: RunDirectory, recipe: Recipe, attempt: int) -> None:
        self._run = run
        self._recipe = recipe
        self._attempt = attempt
        self._seen: frozenset[str] | None = None
        self.joined: list[Joining] = []
        self.gone: dict[str, Departure] = {}
        self.plan = self.whole = plan(recipe)
        """`plan` is without the engines that have left, `whole` with them."""

    def look(self) -> Plan:
        """The plan now; as it was while the shared file system has a bad moment."""
        with contextlib.suppress(OSError):
            seen = frozenset(str(path) for folder in (_extensions, _departures) for path in _files(folder(self._run)))
            if seen != self._seen:
                self.joined = joinings(self._run, self._attempt)
                self.gone = departures(self._run, self._attempt)
                extensions = [each.extension for each in self.joined]
                self.whole = plan(self._recipe, extensions)
                self.plan = plan(self._recipe, extensions, self.gone)
                self._seen = seen
        return self.plan


def _extensions(run: RunDirectory) -> Path:
    return run.path / "extensions"


def _departures(run: RunDirectory) -> Path:
    return run.path / "departures"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def _read_all(folder: Path, kind: type[T]) -> list[T]:
    contents = (read_bytes(path) for path in _files(folder))
    return [msgspec.json.decode(content, type=kind) for content in contents if content is not None]


def _create(path: Path, content: bytes) -> bool:
    """Write a file whole unless there is one; whether it was ours. A link is exclusive on network file systems too."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    write(aside, content)
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink(missing_ok=True)
    return True


def _json(record: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=2)
