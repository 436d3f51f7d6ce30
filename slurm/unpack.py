"""Unpack a packed environment to this node's own disk, once, and become its Python.

    python3 unpack.py ARCHIVE FOLDER PYTHON [ARGUMENT ...]

Run by the node's own python3, which may be as old as 3.6: standard library only, and no newer syntax. The archive is a tar file
(.tar, .tar.gz, .tar.zst where tar knows it) or a squashfs image (.sqsh, .squashfs), with a file `manifest` in its root: one
line of `SIZE PATH` for each file, as slurm/pack.py writes it. An unpacking that was cut short, or lacks a file, is done again.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys

MANIFEST = "manifest"
DONE = ".unpacked"


def main() -> int:
    """Unpack unless that was done before, then exec."""
    archive, folder, python, arguments = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
    try:
        target = unpacked(archive, folder)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"error: {archive} cannot be unpacked to {folder} on {os.uname()[1]}: {error}\n")
        return 1
    program = os.path.join(target, python)
    os.environ["PATH"] = os.path.dirname(program) + os.pathsep + os.environ.get("PATH", os.defpath)
    os.execv(program, [program, *arguments])


def unpacked(archive: str, folder: str) -> str:
    """The folder with the whole content of the archive; whoever comes second waits for the first."""
    status = os.stat(archive)
    # Another archive of the same name must not be taken for this one, nor one of another user.
    identity = f"{os.path.abspath(archive)} {status.st_size} {int(status.st_mtime)} {os.getuid()}"
    name = "baton-" + hashlib.sha256(identity.encode()).hexdigest()[:16]
    target = os.path.join(folder, name)
    os.makedirs(folder, exist_ok=True)
    lock = os.open(target + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if os.path.exists(target) and os.stat(target).st_uid != os.getuid():
            raise ValueError(f"{target} belongs to somebody else")
        if not os.path.exists(os.path.join(target, DONE)):
            shutil.rmtree(target, ignore_errors=True)
            unpack(archive, target)
            check(target)
            open(os.path.join(target, DONE), "w").close()
    finally:
        os.close(lock)
    return target


def unpack(archive: str, target: str) -> None:
    """Have tar or unsquashfs do it: both use all that the format offers and keep links and modes."""
    if archive.endswith((".sqsh", ".squashfs", ".sqfs")):
        command = ["unsquashfs", "-no-progress", "-dest", target, archive]
    else:
        os.mkdir(target, 0o700)
        command = ["tar", "-xf", archive, "-C", target]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise ValueError(f"{command[0]} failed: {done.stdout.decode(errors='replace').strip()[-300:]}")


def check(target: str) -> None:
    """Compare with the manifest: partial copies happen, and look like missing modules much later."""
    path = os.path.join(target, MANIFEST)
    if not os.path.exists(path):
        raise ValueError(f"it has no {MANIFEST}: pack it with `python -m slurm.pack ENVIRONMENT ARCHIVE`")
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            size, _, name = line.rstrip("\n").partition(" ")
            try:
                found = os.path.getsize(os.path.join(target, name))
            except OSError:
                raise ValueError(f"{name} is missing") from None
            if found != int(size):
                raise ValueError(f"{name} has {found} bytes instead of {size}")


if __name__ == "__main__":
    sys.exit(main())
