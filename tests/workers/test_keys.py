"""Who has a key, and until when."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest

from launch.compose import read
from launch.errors import ConfigError
from launch.keys import add, revoke, rotate
from launch.plan import plan
from launch.records import RunDirectory, write
from workers.runtime.keys import KeyRing, Scope, presented


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run directory as a launch leaves it."""
    found = RunDirectory(tmp_path / "run")
    recipe = read(["+recipe=tiny_agg"]).recipe
    found.prepare(recipe, plan(recipe), attempt=1)
    return found


def test_every_key_is_known_by_its_name_and_scope(run: RunDirectory) -> None:
    """The deployment's own two, and those that were given out."""
    user, operator = add(run, "alice", Scope.USER), add(run, "root", Scope.ADMIN)
    ring = KeyRing(run)
    found = {
        key.id: key.scope
        for given in (run.api_key(), run.admin_key(), user, operator)
        if (key := ring.find(given)) is not None
    }

    assert found == {"default": "user", "admin": "admin", "alice": "user", "root": "admin"}
    assert ring.find("") is ring.find(user + "x") is ring.find("\udcff") is None


async def test_keys_change_while_they_are_used(run: RunDirectory) -> None:
    """Rotated, added, revoked: by the file, without a restart; a file that is broken changes nothing."""
    ring = KeyRing(run)
    before, guest = run.api_key(), add(run, "guest", Scope.USER)
    rotate(run, Scope.USER)
    task = asyncio.create_task(ring.follow())
    async with asyncio.timeout(5):
        while ring.find(before) is not None or ring.find(guest) is None:
            await asyncio.sleep(0.02)
    assert ring.find(run.api_key()) is not None
    write(run.keys_file, b'[{"id": "half', mode=0o600)
    await asyncio.sleep(1.5)
    assert ring.find(guest) is not None
    write(run.keys_file, b"[]", mode=0o600)
    async with asyncio.timeout(5):
        while ring.find(guest) is not None:
            await asyncio.sleep(0.02)
    task.cancel()


def test_a_broken_file_leaves_the_deployments_own_keys(run: RunDirectory) -> None:
    """A worker that starts with it serves all the same."""
    write(run.keys_file, b"nonsense", mode=0o600)
    ring = KeyRing(run)

    assert ring.find(run.api_key()) is not None
    assert ring.find("nonsense") is None


def test_a_key_is_kept_as_a_hash_and_shown_once(run: RunDirectory) -> None:
    """Who reads the file later learns nothing that opens a door."""
    key = add(run, "alice", Scope.USER)

    assert key not in run.keys_file.read_text()
    assert stat.S_IMODE(run.keys_file.stat().st_mode) == 0o600


def test_keys_are_not_mistaken_for_each_other(run: RunDirectory) -> None:
    """Names are unique, the deployment's own are rotated, and what is not there is not revoked."""
    add(run, "alice", Scope.USER)
    with pytest.raises(ConfigError, match="'alice' already"):
        add(run, "alice", Scope.ADMIN)
    with pytest.raises(ConfigError, match="cannot name a key"):
        add(run, "../alice", Scope.USER)
    with pytest.raises(ConfigError, match="did you mean 'alice'"):
        revoke(run, "alic")
    with pytest.raises(ConfigError, match="rotate"):
        revoke(run, "default")


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        pytest.param({"authorization": "Bearer k"}, "k", id="OpenAI's clients"),
        pytest.param({"authorization": "bearer  k "}, "k", id="whatever its case"),
        pytest.param({"x-api-key": "k"}, "k", id="Anthropic's clients"),
        pytest.param({"authorization": "Basic k"}, "", id="another scheme"),
        pytest.param({"authorization": "k"}, "", id="no scheme"),
        pytest.param({}, "", id="nothing"),
    ],
)
def test_a_key_is_found_where_clients_put_it(headers: dict[str, str], key: str) -> None:
    """And nowhere else, as in a URL that is logged."""
    assert presented(headers) == key
