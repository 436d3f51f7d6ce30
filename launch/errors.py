"""Every error that Baton raises on purpose.

    LaunchError                 the base; `launch.__main__` prints its message and exits with 1
    ├── ConfigError             what the user wrote cannot be used (unknown key, recipe, value)
    ├── PlanError               the recipe does not fit the cluster
    ├── NameTakenError          a deployment of that name is alive
    ├── NotFoundError           no deployment of that name was ever launched here
    ├── SubmitError             Slurm, or the local executor, did not take the job
    ├── ChildError              a child process ended on its own
    └── DeploymentError         the deployment failed after it was submitted

A message says what is wrong, with the values, then what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


class LaunchError(Exception):
    """Base of every error that Baton raises on purpose."""


class ConfigError(LaunchError):
    """What the user wrote cannot be used."""


class PlanError(LaunchError):
    """The recipe does not fit the cluster."""


class NameTakenError(LaunchError):
    """A deployment of this name is alive."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(
            f"a deployment named {name!r} is running ({where}): stop it with `python -m launch.stop {name}`, "
            f"or give this one another name with name={name}2"
        )
        self.name = name


class NotFoundError(LaunchError):
    """No deployment of this name was launched from this folder."""

    def __init__(self, name: str, runs_dir: str, known: Iterable[str]) -> None:
        names = sorted(known)
        hint = f"; known here: {', '.join(names)}" if names else ""
        super().__init__(f"no deployment named {name!r} in {runs_dir}{closest(name, names)}{hint}")
        self.name = name


class SubmitError(LaunchError):
    """The job could not be submitted."""


class ChildError(LaunchError):
    """A child process ended on its own.

    Attributes:
        code: Exit code; negative is the signal that killed it.
        tail: The last lines of its log.
    """

    def __init__(self, name: str, code: int, tail: str, log_path: str) -> None:
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        super().__init__(f"{name} {how}; the end of {log_path}:\n{tail}")
        self.name = name
        self.code = code
        self.tail = tail


class DeploymentError(LaunchError):
    """The deployment failed after it was submitted."""


def closest(word: str, choices: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the choice nearest to `word`, or nothing when none is near."""
    near = difflib.get_close_matches(word, [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def only(errors: BaseExceptionGroup[BaseException], kind: type[E]) -> E | None:
    """The first error of a kind, where a group holds no other kind; else None.

    For a plain `except`, which can raise it bare: what `except*` raises is a group again in some releases of Python 3.11.
    """
    found, others = errors.split(kind)
    if found is None or others is not None:
        return None
    first = found.exceptions[0]
    return first if isinstance(first, kind) else None
