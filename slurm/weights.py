"""A copy of the model's files on a node's own disk: what belongs to it, how much of it is there, and that it is whole.

Files are handled in *pieces* of `PIECE` bytes. What was written is noted in a journal beside the copy, one line for each
piece with its checksum, so that a copy that was cut short goes on where it ended; what the journal says is read again
first, as a node that crashed may have lost pages. A whole copy has a manifest with all checksums, and costs one look at
the sizes from then on. The folder's name depends on the names, sizes and times of the source's files: another
revision is another folder. Whoever writes holds the lock beside the folder; the kernel drops it with its owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import xxhash

from launch.errors import LaunchError
from launch.records import read_bytes, write

PIECE = 8 << 20
MANIFEST = ".baton-manifest.json"
JOURNAL = ".baton-journal"
# Left free on the node's disk: it may be the memory that engines need, and is what their caches are written to.
SPARE_BYTES = 256 << 20


class StagingError(LaunchError):
    """The model cannot be brought to this node."""


class File(msgspec.Struct, frozen=True):
    """A file of the model, by its name below the folder; size in bytes."""

    name: str
    size: int


class Piece(msgspec.Struct, frozen=True):
    """A part of a file: its number among all pieces of the model, and where it lies."""

    number: int
    name: str
    offset: int
    size: int


class Listing(msgspec.Struct, frozen=True):
    """The files of a model, in the order of their names; `identity` tells this state of them from any other."""

    source: str
    files: tuple[File, ...]
    identity: str

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class Noted(msgspec.Struct, frozen=True):
    """A line of the journal: this piece was written, and had this checksum."""

    number: int
    digest: str


class Manifest(msgspec.Struct, frozen=True):
    """What a whole copy holds: its files, and the checksum of each of their pieces, in order."""

    identity: str
    files: tuple[File, ...]
    digests: list[str]


def listing(source: Path) -> Listing:
    """The files of a model's folder; links of a Hugging Face snapshot are followed, hidden files left out.

    Raises:
        StagingError: There is nothing to read.
    """
    files: list[File] = []
    told = xxhash.xxh3_128()
    try:
        found = sorted(path for path in source.rglob("*") if path.is_file())
        for path in found:
            name = path.relative_to(source)
            if any(part.startswith(".") for part in name.parts):
                continue
            status = path.stat()
            files.append(File(str(name), status.st_size))
            told.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    except OSError as error:
        raise StagingError(
            f"the model cannot be listed ({error}): model.path must be readable on every node"
        ) from error
    if not files:
        raise StagingError(f"{source} holds no files: download the model there, or set model.path")
    return Listing(str(source), tuple(files), told.hexdigest())


def pieces(asked: Listing) -> tuple[Piece, ...]:
    """All pieces, in the order of the files; an empty file has none. Pure."""
    found: list[Piece] = []
    for file in asked.files:
        for offset in range(0, file.size, PIECE):
            found.append(Piece(len(found), file.name, offset, min(PIECE, file.size - offset)))
    return tuple(found)


def digest(content: bytes | bytearray | memoryview) -> str:
    """The checksum of a piece (xxh3, 128 bits): against disks and networks that err, not against people."""
    return xxhash.xxh3_128_hexdigest(content)


def read_piece(folder: Path, piece: Piece) -> bytearray:
    """The bytes of a piece.

    Raises:
        StagingError: The file is shorter than it was.
    """
    content = bytearray(piece.size)
    view, done = memoryview(content), 0
    with (folder / piece.name).open("rb", buffering=0) as file:
        file.seek(piece.offset)
        while done < piece.size:
            count = file.readinto(view[done:])
            if not count:
                raise StagingError(
                    f"{folder / piece.name} ends at {piece.offset + done} bytes: it was changed meanwhile"
                )
            done += count
    return content


class Copy:
    """The copy of a model below `scratch`; not safe for two threads that write the same piece."""

    def __init__(self, scratch: Path, asked: Listing) -> None:
        self.folder = scratch / f"baton-weights-{os.getuid()}-{asked.identity[:16]}"
        """Where engines find the model."""
        self.asked = asked
        self.pieces = pieces(asked)
        self.noted: dict[int, str] = {}
        self._lock: int | None = None

    # --- whose it is ------------------------------------------------------------------------------------------------

    def try_claim(self) -> bool:
        """Make this process the one that writes; False while another one is.

        Raises:
            StagingError: The folder cannot be made, or belongs to somebody else.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            if self.folder.lstat().st_uid != os.getuid() or self.folder.is_symlink():
                raise StagingError(
                    f"{self.folder} belongs to somebody else: set cluster.local_scratch to a folder of yours"
                )
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.open(self.folder.with_name(f"{self.folder.name}.lock"), flags, 0o600)
        except OSError as error:
            raise StagingError(
                f"no room for the model at {self.folder} ({error}): set cluster.local_scratch"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._lock = lock
        return True

    def release(self) -> None:
        """Let others write."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- what is there ----------------------------------------------------------------------------------------------

    def whole(self) -> bool:
        """Whether it was finished, and every file still has its size; then all pieces are noted."""
        try:
            content = read_bytes(self.folder / MANIFEST)
            if content is None:
                return False
            manifest = msgspec.json.decode(content, type=Manifest)
            sizes = all((self.folder / file.name).stat().st_size == file.size for file in self.asked.files)
        except (OSError, msgspec.DecodeError):
            return False
        if not sizes or (manifest.identity, manifest.files) != (self.asked.identity, self.asked.files):
            return False
        self.noted = dict(enumerate(manifest.digests))
        return True

    def trust(self) -> None:
        """Take what was noted for what is there: `recover` has just looked, or a process of ours has written it."""
        if not self.whole():
            self.noted = {line.number: line.digest for line in self._journal() if line.number < len(self.pieces)}

    def recover(self) -> None:
        """Read what an earlier copy left, and keep the pieces that are as it wrote them."""
        kept: dict[int, str] = {}
        for line in self._journal():
            if line.number < len(self.pieces):
                with contextlib.suppress(OSError, StagingError):  # not there after all: it is copied again
                    if digest(read_piece(self.folder, self.pieces[line.number])) == line.digest:
                        kept[line.number] = line.digest
        self.noted = kept
        (self.folder / MANIFEST).unlink(missing_ok=True)
        lines = (msgspec.json.encode(Noted(number, told)) for number, told in kept.items())
        write(self.folder / JOURNAL, b"".join(line + b"\n" for line in lines))

    def missing(self) -> list[Piece]:
        """The pieces that are not there."""
        return [piece for piece in self.pieces if piece.number not in self.noted]

    def check_room(self) -> None:
        """Refuse a disk that is too small.

        Raises:
            StagingError: It is; brings the sizes.
        """
        need = sum(piece.size for piece in self.missing())
        free = shutil.disk_usage(self.folder).free
        if need + SPARE_BYTES > free:
            raise StagingError(
                f"{self.folder.parent} of {os.uname().nodename} has {free / 1e9:.1f} GB free and the model needs "
                f"{need / 1e9:.1f} GB more: set cluster.local_scratch to a larger disk, remove baton-weights-* of models "
                "that are not used any more, or use weights.stage=none"
            )

    # --- writing ----------------------------------------------------------------------------------------------------

    def put(self, piece: Piece, content: bytes | bytearray | memoryview, told: str) -> None:
        """Write a piece, and note it."""
        path = self.folder / piece.name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            view, done = memoryview(content), 0
            while done < piece.size:
                done += os.pwrite(descriptor, view[done:], piece.offset + done)
        finally:
            os.close(descriptor)
        with (self.folder / JOURNAL).open("ab", buffering=0) as journal:
            journal.write(msgspec.json.encode(Noted(piece.number, told)) + b"\n")
        self.noted[piece.number] = told

    def finish(self) -> None:
        """Write the manifest once all pieces are there and on the disk.

        Raises:
            StagingError: Some are not.
        """
        missing = self.missing()
        if missing:
            raise StagingError(f"{len(missing)} of {len(self.pieces)} pieces of the model are missing in {self.folder}")
        for file in self.asked.files:
            path = self.folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                os.ftruncate(descriptor, file.size)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        digests = [self.noted[piece.number] for piece in self.pieces]
        manifest = Manifest(self.asked.identity, self.asked.files, digests)
        write(self.folder / MANIFEST, msgspec.json.encode(manifest), mode=0o600)
        (self.folder / JOURNAL).unlink(missing_ok=True)

    def _journal(self) -> Iterator[Noted]:
        try:
            content = read_bytes(self.folder / JOURNAL) or b""
        except OSError:
            return
        for line in content.splitlines():
            with contextlib.suppress(msgspec.DecodeError):  # the last line may be half a line
                yield msgspec.json.decode(line, type=Noted)
