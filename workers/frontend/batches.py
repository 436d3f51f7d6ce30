"""Batches: the requests of a file, answered when there is room, into other files (OpenAI's batch API).

A batch is a folder of the run directory: `batch.json` says how far it is, `output.jsonl` and `errors.jsonl` grow with each
answer, `cancel` asks for its end. The deployment's first frontend process works on them, one at a time in the order of
their making; the others only write down what is asked. What a process leaves undone the next one goes on with: a request
is done when its line is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from launch.records import write
from workers.frontend.errors import ApiError
from workers.frontend.files import OUTPUT, PURPOSE, Drawer, page
from workers.frontend.http import Request
from workers.frontend.openai import parse
from workers.frontend.reply import Kept, Reply, told

log = logging.getLogger(__name__)

NAME = re.compile(r"batch_[0-9a-f]{24}")
WINDOW_S = 24 * 3600
MAX_REQUESTS = 50_000
LOW_PRIORITY = 1000
"""Lower is earlier; engines heed it where they schedule by priority."""
LOOK_S = 1.0
AGAIN_S = 1.0
TOLD_ERRORS = 100
PRIORITIZED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
ENDED = ("completed", "failed", "expired", "cancelled")
Ask = Callable[[Request, Kept], Awaitable[None]]


class BatchRequest(msgspec.Struct, kw_only=True):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None


class Line(msgspec.Struct, kw_only=True):
    """One request of an input file."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


class Counts(msgspec.Struct, kw_only=True):
    """Requests of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, kw_only=True):
    """How far a batch is; times are in seconds since the epoch."""

    id: str
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    completion_window: str = "24h"
    object: str = "batch"
    status: str = "validating"
    metadata: dict[str, str] | None = None
    errors: dict[str, Any] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = msgspec.field(default_factory=Counts)


class Batches:
    """The routes of this API, and the work.

    Args:
        folder: Where batches are.
        drawer: Where files are.
        at_once: Requests of a batch that are answered at a time.
        room: Whether the workers of a model, as a request calls it, could do with more requests than they have.
    """

    def __init__(self, folder: Path, drawer: Drawer, at_once: int, room: Callable[[Any], bool]) -> None:
        self._folder = folder
        self._drawer = drawer
        self._at_once = at_once
        self._room = room

    async def create(self, request: Request, reply: Reply) -> None:
        """POST /v1/batches."""
        ask, _ = parse(request.body, BatchRequest)
        file = await asyncio.to_thread(self._drawer.get, ask.input_file_id)
        if file.purpose != PURPOSE:
            raise ApiError(400, f"the file {ask.input_file_id!r} was not uploaded for batches", "input_file_id")
        now = int(time.time())
        batch = Batch(
            id=f"batch_{secrets.token_hex(12)}",
            endpoint=ask.endpoint,
            input_file_id=ask.input_file_id,
            created_at=now,
            expires_at=now + WINDOW_S,
            metadata=ask.metadata,
        )
        await asyncio.to_thread(self._write, batch)
        reply.respond(200, msgspec.json.encode(batch), told(request))

    async def get(self, request: Request, reply: Reply, name: str) -> None:
        """GET /v1/batches/{batch_id}."""
        reply.respond(200, msgspec.json.encode(await asyncio.to_thread(self._read, name)), told(request))

    async def listing(self, request: Request, reply: Reply) -> None:
        """GET /v1/batches."""
        found = await asyncio.to_thread(self._all)
        reply.respond(200, page(request.query, found), told(request))

    async def cancel(self, request: Request, reply: Reply, name: str) -> None:
        """POST /v1/batches/{batch_id}/cancel: the process that works on it sees it within a second."""
        batch = await asyncio.to_thread(self._read, name)
        if batch.status not in ENDED:
            await asyncio.to_thread(write, self._folder / name / "cancel", b"", 0o600)
            batch.status, batch.cancelling_at = "cancelling", int(time.time())
        reply.respond(200, msgspec.json.encode(batch), told(request))

    # --- the work -----------------------------------------------------------------------------------------------------

    async def work(self, ask: Ask) -> None:
        """Answer batches, for ever. Only one process of a deployment may do this."""
        ended: set[str] = set()  # nobody works on these again, so they are not read again either
        while True:
            found: list[Batch] = []
            try:
                found = await asyncio.to_thread(self._all, frozenset(ended))
            except (OSError, ValueError, ApiError) as error:
                log.warning("batches cannot be listed: %s", error)
            for batch in reversed(found):
                if batch.status in ENDED:
                    ended.add(batch.id)
                    continue
                try:
                    await self._run(batch, ask)
                except* (OSError, ValueError, ApiError) as errors:
                    # Another batch may fare better; this one is tried again.
                    log.warning("batch %s: %s", batch.id, errors.exceptions[0])
            await asyncio.sleep(LOOK_S)

    async def _run(self, batch: Batch, ask: Ask) -> None:
        try:
            lines, wrong = await asyncio.to_thread(self._lines, batch)
        except ApiError as error:  # the file was deleted
            lines, wrong = [], [{"code": "missing_file", "line": None, "message": str(error), "param": None}]
        if wrong:
            batch.errors = {"object": "list", "data": wrong[:TOLD_ERRORS]}
            batch.status, batch.failed_at = "failed", int(time.time())
            await asyncio.to_thread(self._write, batch)
            return
        log.info("batch %s: %d requests to %s", batch.id, len(lines), batch.endpoint)
        answers = await asyncio.to_thread(Answers, self._folder / batch.id)
        with contextlib.closing(answers):
            todo = iter([line for line in lines if line.custom_id not in answers.done])
            batch.status, batch.in_progress_at = "in_progress", batch.in_progress_at or int(time.time())
            batch.request_counts = Counts(total=len(lines), completed=answers.completed, failed=answers.failed)
            await asyncio.to_thread(self._write, batch)
            async with asyncio.TaskGroup() as group:
                workers = [
                    group.create_task(self._answer(batch, todo, answers, ask), name=f"batch-{number}")
                    for number in range(self._at_once)
                ]
                watch = group.create_task(self._watch(batch, answers, workers), name="batch-watch")
                await asyncio.wait(workers)
                watch.cancel()
            await asyncio.to_thread(self._finish, batch, answers)

    async def _answer(self, batch: Batch, todo: Iterator[Line], answers: Answers, ask: Ask) -> None:
        """Answer one request after the other, while any is left."""
        for line in todo:
            while not self._room(line.body.get("model")):  # noqa: ASYNC110 - how busy the workers are comes as reports, not as an event
                await asyncio.sleep(0.1)
            await self._one(batch, line, answers, ask)

    async def _one(self, batch: Batch, line: Line, answers: Answers, ask: Ask) -> None:
        """Answer one request; where nothing is there to answer it, try again."""
        body = line.body
        if batch.endpoint in PRIORITIZED:
            body = {"priority": LOW_PRIORITY, **body}
        while True:
            request_id = f"{batch.id}-{secrets.token_hex(6)}"
            reply = Kept()
            try:
                await ask(_request(batch.endpoint, body, request_id), reply)
            except Exception:  # as in http.Connection: a bug ends this request, not the batch
                log.exception("batch %s: request %s failed", batch.id, line.custom_id)
                reply.respond(500, ApiError(500, "internal error").body())
            if reply.status not in (429, 503):  # later it may be answered
                await _to_its_end(answers.add(line.custom_id, request_id, reply))
                return
            await asyncio.sleep(AGAIN_S)

    async def _watch(self, batch: Batch, answers: Answers, workers: list[asyncio.Task[None]]) -> None:
        """Write down how far the batch is, and end its work when that was asked for or its time is over."""
        for _ in itertools.count():
            await asyncio.sleep(LOOK_S)
            cancelled = await asyncio.to_thread((self._folder / batch.id / "cancel").exists)
            if cancelled or time.time() > batch.expires_at:
                for worker in workers:
                    worker.cancel()
            counts = Counts(total=batch.request_counts.total, completed=answers.completed, failed=answers.failed)
            if counts != batch.request_counts:
                batch.request_counts = counts
                await _to_its_end(asyncio.to_thread(self._write, batch))

    def _finish(self, batch: Batch, answers: Answers) -> None:
        """Make files of the answers. Killed within, the next process does it again, from what is still there."""
        now = int(time.time())
        counts = Counts(total=batch.request_counts.total, completed=answers.completed, failed=answers.failed)
        batch.request_counts = counts
        batch.status, batch.finalizing_at = "finalizing", now
        self._write(batch)
        answers.close()
        for path, name in ((answers.output, "output_file_id"), (answers.errors, "error_file_id")):
            if path.exists() and path.stat().st_size:
                # A copy: until batch.json names the new file, this one is what a restart goes on from.
                record = self._drawer.put(path.read_bytes(), f"{batch.id}_{path.name}", OUTPUT)
                setattr(batch, name, record.id)
        whole = counts.completed + counts.failed == counts.total
        cancelled = (self._folder / batch.id / "cancel").exists()
        if whole:
            batch.status, batch.completed_at = "completed", now
        elif cancelled:
            batch.status, batch.cancelled_at = "cancelled", now
        else:
            batch.status, batch.expired_at = "expired", now
        self._write(batch)
        for path in (answers.output, answers.errors):
            path.unlink(missing_ok=True)
        log.info("batch %s %s: %d completed, %d failed", batch.id, batch.status, counts.completed, counts.failed)

    def _lines(self, batch: Batch) -> tuple[list[Line], list[dict[str, Any]]]:
        """The requests of a batch, and what is wrong with them."""
        lines: list[Line] = []
        wrong: list[dict[str, Any]] = []
        seen: set[str] = set()
        for number, text in enumerate(self._drawer.content(batch.input_file_id).splitlines(), 1):
            if not text.strip():
                continue
            try:
                line = msgspec.json.decode(text, type=Line)
                _check(line, batch.endpoint, seen)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
                wrong.append({"code": "invalid_request", "line": number, "message": str(error), "param": None})
                continue
            seen.add(line.custom_id)
            lines.append(line)
        if not 0 < len(lines) <= MAX_REQUESTS and not wrong:
            said = f"a batch has 1 to {MAX_REQUESTS} requests, this one {len(lines)}"
            wrong.append({"code": "invalid_request", "line": None, "message": said, "param": None})
        return lines, wrong

    # --- the folder ---------------------------------------------------------------------------------------------------

    def _read(self, name: str) -> Batch:
        if NAME.fullmatch(name):
            try:
                return msgspec.json.decode((self._folder / name / "batch.json").read_bytes(), type=Batch)
            except FileNotFoundError:
                pass
        raise ApiError(404, f"there is no batch {name!r}")

    def _write(self, batch: Batch) -> None:
        folder = self._folder / batch.id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write(folder / "batch.json", msgspec.json.encode(batch), mode=0o600)

    def _all(self, but: frozenset[str] = frozenset()) -> list[Batch]:
        """All batches but those named, the newest first."""
        found = []
        for entry in self._folder.iterdir() if self._folder.exists() else ():
            if entry.name in but:
                continue
            with contextlib.suppress(ApiError):
                found.append(self._read(entry.name))
        return sorted(found, key=lambda batch: (batch.created_at, batch.id), reverse=True)


class Answers:
    """The answers of a batch so far: two files that lines are added to. A line that was cut off is no answer.

    Attributes:
        done: Requests that were answered.
        completed: Of those, with success.
        failed: The others.
    """

    def __init__(self, folder: Path) -> None:
        self.output, self.errors = folder / "output.jsonl", folder / "errors.jsonl"
        self.done: set[str] = set()
        self.completed, self.failed = self._recover(self.output), self._recover(self.errors)
        self._files = {path: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for path in self._both}
        self._lock = asyncio.Lock()

    async def add(self, custom_id: str, request_id: str, reply: Kept) -> None:
        """Write down an answer."""
        good = reply.status == 200
        response = {"status_code": reply.status, "request_id": request_id, "body": msgspec.Raw(reply.body)}
        line = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response, "error": None}
        async with self._lock:
            await asyncio.to_thread(_append, self._files[self.output if good else self.errors], line)
            self.done.add(custom_id)
            self.completed, self.failed = self.completed + good, self.failed + (not good)

    def close(self) -> None:
        """Nothing is added any more."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    @property
    def _both(self) -> tuple[Path, Path]:
        return self.output, self.errors

    def _recover(self, path: Path) -> int:
        """Take note of the answers in a file, and cut off what is no whole line; returns how many they are."""
        if not path.exists():
            return 0
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
        names = [msgspec.json.decode(line)["custom_id"] for line in content[:whole].splitlines()]
        self.done.update(names)
        return len(names)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await something that is not to be left half done: whoever cancels waits for it."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _append(file: int, line: dict[str, Any]) -> None:
    rest = msgspec.json.encode(line) + b"\n"
    while rest:
        rest = rest[os.write(file, rest) :]


def _check(line: Line, endpoint: str, seen: set[str]) -> None:
    """Refuse a request that cannot be a part of this batch.

    Raises:
        ValueError: Says why.
    """
    if line.custom_id in seen:
        raise ValueError(f"custom_id {line.custom_id!r} is there twice")
    if line.url != endpoint:
        raise ValueError(f"url is {line.url!r} but the batch's endpoint is {endpoint!r}")
    if line.body.get("stream"):
        raise ValueError("an answer in a batch cannot be streamed: leave stream out")


def _request(path: str, body: dict[str, Any], request_id: str) -> Request:
    return Request(
        method="POST",
        path=path,
        headers={"x-request-id": request_id, "content-type": "application/json"},
        body=msgspec.json.encode(body),
        chunked=True,
        keep_alive=True,
    )
