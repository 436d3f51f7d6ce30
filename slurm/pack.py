"""`python -m slurm.pack ENVIRONMENT ARCHIVE`: pack a Python environment with its manifest, for `environment.kind=archive`.

The environment has to work from any place: conda environments do after conda-pack, virtual ones when their python3 is a
copy beside its own standard library (`uv venv --relocatable`, python-build-standalone).
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from slurm.unpack import MANIFEST


def main() -> int:
    """Pack it; 1 with a message when that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m slurm.pack", description="Pack a Python environment.")
    parser.add_argument("environment", type=Path)
    parser.add_argument("archive", type=Path, help="a .tar or .tar.gz on the shared file system")
    arguments = parser.parse_args()
    try:
        count = pack(arguments.environment, arguments.archive)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{arguments.archive} holds {count} files; use it with environment.kind=archive environment.path={arguments.archive}"
    )
    return 0


def pack(environment: Path, archive: Path) -> int:
    """Write the archive, aside and then renamed; returns the number of its files."""
    listed = [(path, str(path.relative_to(environment))) for path in files(environment)]
    manifest = "".join(f"{path.stat().st_size} {name}\n" for path, name in listed).encode()
    aside = archive.with_name(f".{archive.name}")
    with tarfile.open(aside, "w:gz" if archive.name.endswith("gz") else "w") as tar:
        info = tarfile.TarInfo(MANIFEST)
        info.size = len(manifest)
        tar.addfile(info, io.BytesIO(manifest))
        for path in sorted(environment.rglob("*")):
            tar.add(path, str(path.relative_to(environment)), recursive=False)
    aside.replace(archive)
    return len(listed)


def files(environment: Path) -> Iterator[Path]:
    """The plain files of an environment."""
    return (path for path in sorted(environment.rglob("*")) if path.is_file() and not path.is_symlink())


if __name__ == "__main__":
    sys.exit(main())
