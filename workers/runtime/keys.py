"""The keys of a deployment: who may ask the model, and who may operate its workers.

They are read from the run directory, again whenever a file of them changes, so that a key is given out or taken back while
the deployment serves. What a client presents is hashed and compared with every known hash, so that the time it takes tells
nothing. A key itself is only in the files `api_key` and `admin_key` and with its owner: never in a log, nor on a command
line.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec

from launch.records import RunDirectory, read_bytes

log = logging.getLogger(__name__)

POLL_S = 1.0
DEFAULT, ADMIN = "default", "admin"


class Scope(StrEnum):
    """What a key is for. The two do not overlap: an operator who asks the model uses a user's key."""

    USER = "user"
    ADMIN = "admin"


class Key(msgspec.Struct, kw_only=True, frozen=True):
    """A key as it is kept: `sha256` (hex) of what its owner sends; `id` is what metrics and limits call him."""

    id: str
    scope: Scope
    sha256: str


@dataclass(frozen=True, slots=True)
class Held:
    """What the files held when they were last read, and what they looked like."""

    keys: tuple[Key, ...]
    looks: tuple[object, ...]


class KeyRing:
    """The keys that are valid now. `find` may be called from any thread."""

    def __init__(self, run: RunDirectory) -> None:
        """Read them. A `keys.json` that cannot be read must not keep a worker down: then only the deployment's own are valid.

        Raises:
            OSError: The deployment's own keys cannot be read.
        """
        self._run = run
        try:
            self._held = self._read()
        except ValueError as error:
            log.error("%s cannot be read (%s); only the deployment's own keys are valid", run.keys_file, error)
            self._held = Held(self._own(), self._looks())

    def find(self, key: str) -> Key | None:
        """The key that was presented, if it is one; compares with all of them, whichever it is."""
        digest = sha256(key)
        found = [known for known in self._held.keys if hmac.compare_digest(known.sha256, digest)]
        return found[0] if found else None

    async def follow(self) -> None:
        """Read the files again whenever they change; for ever. One that cannot be read changes nothing."""
        complained = False
        while True:
            await asyncio.sleep(POLL_S)
            try:
                if await asyncio.to_thread(self._looks) != self._held.looks:
                    self._held = await asyncio.to_thread(self._read)
                    log.info("the keys have changed: %s", ", ".join(key.id for key in self._held.keys))
                complained = False
            except (OSError, ValueError) as error:
                if not complained:
                    log.error("the keys cannot be read (%s); those from before stay valid", error)
                complained = True

    def _read(self) -> Held:
        looks = self._looks()  # before the files: a change in between is then seen the next time
        return Held((*self._own(), *more_keys(self._run)), looks)

    def _own(self) -> tuple[Key, ...]:
        return (
            Key(id=DEFAULT, scope=Scope.USER, sha256=sha256(self._run.api_key())),
            Key(id=ADMIN, scope=Scope.ADMIN, sha256=sha256(self._run.admin_key())),
        )

    def _looks(self) -> tuple[object, ...]:
        return tuple(_look(path) for path in (self._run.api_key_file, self._run.admin_key_file, self._run.keys_file))


def more_keys(run: RunDirectory) -> list[Key]:
    """The keys beside the deployment's own two.

    Raises:
        ValueError: `keys.json` is not what `launch.keys` writes.
    """
    return msgspec.json.decode(read_bytes(run.keys_file) or b"[]", type=list[Key])


def sha256(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def presented(headers: dict[str, str]) -> str:
    """The key that a request carries: `Authorization: Bearer`, as OpenAI's clients send it, or Anthropic's `x-api-key`."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _look(path: Path) -> object:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
