"""A packed environment is whole on the node's own disk before its Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import unpack
from slurm.pack import pack

PYTHON = """#!/bin/sh
echo "packed python with $*"
"""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A small environment, packed."""
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin/python3").write_text(PYTHON)
    (environment / "bin/python3").chmod(0o755)
    (environment / "bin/python").symlink_to("python3")
    (environment / "lib with space").mkdir()
    (environment / "lib with space/module.py").write_text("x = 1\n")
    pack(environment, tmp_path / "environment.tar.gz")
    return tmp_path / "environment.tar.gz"


def run(archive: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """As the batch script does."""
    command = [sys.executable, unpack.__file__, str(archive), str(folder), "bin/python3", "-m", "slurm.task"]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_environment_is_unpacked_once_and_becomes_the_process(archive: Path, tmp_path: Path) -> None:
    """The second run finds it there; another archive of the same name gets a folder of its own."""
    first, again = run(archive, tmp_path / "disk"), run(archive, tmp_path / "disk")
    (folder,) = (tmp_path / "disk").glob("baton-*[!k]")
    before = (folder / unpack.DONE).stat().st_mtime_ns
    pack(tmp_path / "environment/bin", archive)
    other = run(archive, tmp_path / "disk")

    assert first.stdout == again.stdout == "packed python with -m slurm.task\n"
    assert (folder / "lib with space/module.py").read_text() == "x = 1\n"
    assert (folder / unpack.DONE).stat().st_mtime_ns == before
    assert other.returncode == 1  # bin/python3 is python3 there
    assert len(list((tmp_path / "disk").glob("baton-*[!k]"))) == 2


def test_an_unpacking_that_was_cut_short_is_done_again(archive: Path, tmp_path: Path) -> None:
    """The mark that it is whole comes last."""
    run(archive, tmp_path / "disk")
    (folder,) = (tmp_path / "disk").glob("baton-*[!k]")
    (folder / unpack.DONE).unlink()
    (folder / "bin/python3").write_text("#!/bin/sh\necho half\n")

    assert run(archive, tmp_path / "disk").stdout == "packed python with -m slurm.task\n"


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("9 lib/missing.py\n", "lib/missing.py is missing"),
        ("9 bin/python3\n", "bin/python3 has .* bytes instead of 9"),
        (None, "it has no manifest: pack it with"),
    ],
)
def test_what_does_not_match_the_manifest_is_refused(manifest: str | None, message: str, tmp_path: Path) -> None:
    """With the file's name, and the archive's."""
    folder = tmp_path / "environment"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python3").write_text(PYTHON)
    if manifest is not None:
        (folder / unpack.MANIFEST).write_text(manifest)
    archive = tmp_path / "x.tar"
    subprocess.run(["tar", "-cf", str(archive), "-C", str(folder), "."], check=True)

    done = run(archive, tmp_path / "disk")

    assert done.returncode == 1
    assert f"error: {archive} cannot be unpacked" in done.stderr
    assert re.search(message, done.stderr)
    assert not list((tmp_path / "disk").glob("*/.unpacked"))
