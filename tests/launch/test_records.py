"""The run directory keeps what is written, whole, and secrets from others."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

import pytest

from launch import records
from launch.compose import read
from launch.errors import NotFoundError
from launch.plan import plan
from launch.recipe import Launcher
from launch.records import Endpoint, Job, Phase, RankRecord, RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A prepared run directory."""
    recipe = read(["+recipe=tiny_2p2d"]).recipe
    directory = RunDirectory(tmp_path / "runs" / "mine")
    directory.prepare(recipe, plan(recipe), attempt=1)
    return directory


def test_the_recipe_comes_back_as_it_was(run: RunDirectory) -> None:
    """Every rank reads the same frozen value, so that every rank computes the same plan."""
    recipe = read(["+recipe=tiny_2p2d"]).recipe

    assert run.recipe() == recipe
    assert plan(run.recipe()) == plan(recipe)


def test_secrets_are_readable_by_their_owner_alone(run: RunDirectory) -> None:
    """The endpoint's file and the keys, which differ, are 0600."""
    run.put_endpoint(Endpoint(url="u", urls=["u"], models=["m"], state=Phase.READY, api_key_file="k"))
    modes = [
        stat.S_IMODE(path.stat().st_mode) for path in (run.api_key_file, run.admin_key_file, run.path / "endpoint.json")
    ]

    assert modes == [0o600] * 3
    assert run.api_key() != run.admin_key()


def test_what_an_earlier_attempt_said_is_not_believed(run: RunDirectory) -> None:
    """A new attempt starts without ranks, endpoint or stop request; the API key stays for the clients that have it."""
    record = RankRecord(attempt=1, rank=0, host="h", address="a", port_base=1, pid=1, born=1, heartbeat=0.0)
    run.put_rank(record)
    key = run.api_key()
    run.stop_file.touch()
    assert run.ranks(1)
    assert not run.ranks(2)

    run.prepare(run.recipe(), plan(run.recipe()), attempt=2)

    assert not run.ranks(1)
    assert not run.stop_file.exists()
    assert run.api_key() == key
    assert (run.path / "logs" / "latest").resolve().name == "attempt_2"


def test_a_stale_file_handle_is_tried_again(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS answers ESTALE when a file was replaced under its reader; the next read finds the new one."""
    run.put_job(Job(launcher=Launcher.LOCAL, attempt=1, id="7", host="h", submitted_at=0.0))
    answers = [OSError(errno.ESTALE, "stale"), OSError(errno.ESTALE, "stale")]
    original = Path.read_bytes

    def sometimes_stale(path: Path) -> bytes:
        if answers:
            raise answers.pop()
        return original(path)

    # The file system is what we cannot have here; the function under test is ours and whole.
    monkeypatch.setattr(Path, "read_bytes", sometimes_stale)
    job = run.job()

    assert job is not None
    assert job.id == "7"


def test_an_unknown_name_lists_the_known_ones(run: RunDirectory) -> None:
    """And offers the nearest."""
    run.put_job(Job(launcher=Launcher.LOCAL, attempt=1, id="7", host="h", submitted_at=0.0))
    with pytest.raises(NotFoundError, match="did you mean 'mine'"):
        records.find(run.path.parent, "mime")
