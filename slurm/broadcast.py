"""The model's pieces to all nodes of a group, each read from the shared file system once.

The nodes form a ring. Every piece has one reader, which sends it to the next node; each node checks it, writes it to its
own disk and passes it on, and the last one before the reader sends back an empty *receipt*. So each node sends and
receives about the size of the model once, however many there are, while it reads its own share and writes. A reader has
at most `WINDOW` pieces on their way, which bounds what nodes hold in memory, and keeps a ring of full queues from
standing still.
"""

from __future__ import annotations

import contextlib
import queue
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from slurm.weights import Copy, Piece, StagingError, digest, read_piece

WINDOW = 4
# Number of the piece, place of its reader in the ring, bytes that follow (0 is a receipt), checksum.
HEADER = struct.Struct("!IIQ16s")


class Channel(Protocol):
    """The way to the next node of the ring and from the one before."""

    def send(self, header: bytes, payload: bytes | bytearray) -> None:
        """Send to the next; returns once both may be used again."""
        ...

    def receive_header(self) -> bytes:
        """Wait for the next header from the one before."""
        ...

    def receive_payload(self, into: bytearray) -> None:
        """Fill the buffer with what follows the header."""
        ...

    def abort(self) -> None:
        """End every wait, here and at the neighbours, with an error."""
        ...


@dataclass(frozen=True, slots=True)
class Share:
    """What one piece's way is: its reader, by place in the ring, and whether that one has it on its own disk."""

    piece: Piece
    reader: int
    local: bool


def share_out(pieces: Sequence[Piece], have: Sequence[frozenset[int]]) -> tuple[Share, ...]:
    """Who reads which of the pieces that somebody lacks: whoever has it on its own disk, else all in equal parts. Pure.

    Args:
        pieces: All pieces of the model.
        have: For each place in the ring the numbers of the pieces that are there.
    """
    load = [0] * len(have)
    found = []
    for piece in pieces:
        owners = [place for place, numbers in enumerate(have) if piece.number in numbers]
        if len(owners) == len(have):
            continue
        reader = min(owners or range(len(have)), key=lambda place: (load[place], place))
        load[reader] += piece.size
        found.append(Share(piece, reader, bool(owners)))
    return tuple(found)


class Ring:
    """One node's part in a broadcast."""

    def __init__(
        self,
        copy: Copy,
        source: Callable[[Piece], bytearray],
        shares: Sequence[Share],
        place: int,
        size: int,
        channel: Channel,
        progress: Callable[[int], None],
    ) -> None:
        self._copy = copy
        self._source = source
        self._mine = [share for share in shares if share.reader == place]
        self._shares: Mapping[int, Share] = {share.piece.number: share for share in shares}
        self._place = place
        self._next = (place + 1) % size
        self._channel = channel
        self._progress = progress
        self._out: queue.SimpleQueue[tuple[bytes, bytes | bytearray] | None] = queue.SimpleQueue()
        self._credit = threading.Semaphore(WINDOW)
        self._disk: queue.Queue[tuple[Piece, bytes | bytearray, str] | None] = queue.Queue(WINDOW)
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Take part until every node of the ring has every piece.

        Raises:
            StagingError: The source, this node's disk or a neighbour failed.
        """
        threads = [
            threading.Thread(target=self._guarded, args=(work,), name=work.__name__, daemon=True)
            for work in (self._read, self._write, self._send)
        ]
        for thread in threads:
            thread.start()
        self._guarded(self._receive)
        if self._failure is None:
            threads[0].join()
            self._keep(None)
            self._out.put(None)
            threads[1].join()
            threads[2].join()
        if self._failure is not None:
            raise StagingError(
                f"the broadcast ended early: {self._failure or type(self._failure).__name__}"
            ) from self._failure

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # of a thread: raised again by `run`
            self._failure = self._failure or error
            self._channel.abort()
            self._credit.release()
            self._out.put(None)

    def _read(self) -> None:
        for share in self._mine:
            self._credit.acquire()
            if self._failure is not None:
                return
            piece = share.piece
            content = read_piece(self._copy.folder, piece) if share.local else self._source(piece)
            told = digest(content)
            if share.local and told != self._copy.noted[piece.number]:
                raise StagingError(f"{self._copy.folder / piece.name} is not as it was written at {piece.offset} bytes")
            self._out.put((HEADER.pack(piece.number, self._place, piece.size, bytes.fromhex(told)), content))
            self._keep((piece, content, told))

    def _send(self) -> None:
        while (item := self._out.get()) is not None:
            self._channel.send(*item)

    def _receive(self) -> None:
        """Until all pieces of others have come, and the receipts of all of ours."""
        for _ in self._shares:
            number, reader, size, told = HEADER.unpack(self._channel.receive_header())
            if number not in self._shares or self._shares[number].reader != reader:
                raise StagingError(
                    f"piece {number} of reader {reader} was not expected: the nodes disagree on the model"
                )
            if reader == self._place:
                self._credit.release()
                continue
            piece = self._shares[number].piece
            if size != piece.size:
                raise StagingError(f"{piece.name} came with {size} bytes at {piece.offset} and not {piece.size}")
            content = bytearray(size)
            self._channel.receive_payload(content)
            if digest(content) != told.hex():
                raise StagingError(f"{piece.name} came wrong at {piece.offset} bytes: its checksum differs")
            ends = self._next == reader
            self._out.put((HEADER.pack(number, reader, 0 if ends else size, told), b"" if ends else content))
            self._keep((piece, content, told.hex()))

    def _keep(self, item: tuple[Piece, bytes | bytearray, str] | None) -> None:
        """Hand a piece to the thread that writes, which may be some pieces behind; None ends it."""
        while self._failure is None:
            with contextlib.suppress(queue.Full):
                self._disk.put(item, timeout=1)
                return

    def _write(self) -> None:
        while self._failure is None:
            with contextlib.suppress(queue.Empty):
                item = self._disk.get(timeout=1)
                if item is None:
                    return
                piece, content, told = item
                if piece.number not in self._copy.noted:
                    self._copy.put(piece, content, told)
                    self._progress(piece.size)


def copy_alone(copy: Copy, source: Callable[[Piece], bytearray], progress: Callable[[int], None]) -> None:
    """Bring what is missing to this node by itself, one piece read while the one before is written.

    Raises:
        StagingError: A file is not as it was listed.
        OSError: The source or the disk failed.
    """
    missing = copy.missing()
    with ThreadPoolExecutor(1, "read") as pool:
        coming = [pool.submit(source, piece) for piece in missing[:1]]
        for index, piece in enumerate(missing):
            content = coming.pop().result()
            coming = [pool.submit(source, after) for after in missing[index + 1 : index + 2]]
            copy.put(piece, content, digest(content))
            progress(piece.size)


def from_folder(folder: Path) -> Callable[[Piece], bytearray]:
    """A source that reads a folder."""
    return lambda piece: read_piece(folder, piece)
