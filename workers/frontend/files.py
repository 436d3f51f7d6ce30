"""Files that clients upload and batches write: OpenAI's files API over a folder of the run directory.

Each file is a folder of its own with `record.json` and `content`, readable by the owner alone. It is made aside and renamed,
so that every frontend sees it whole or not at all.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import msgspec

from launch.records import write
from workers.frontend.errors import ApiError
from workers.frontend.forms import read_form
from workers.frontend.http import Request
from workers.frontend.reply import Reply, told

NAME = re.compile(r"file-[0-9a-f]{24}")
PURPOSE, OUTPUT = "batch", "batch_output"
MAX_PAGE = 10_000
UPLOAD: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": [PURPOSE]}},
}


class FileRecord(msgspec.Struct, kw_only=True):
    """What a file is."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    object: str = "file"
    status: str = "processed"


class Drawer:
    """The folder of all files, which together have at most `max_bytes`. Methods block."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def put(self, content: bytes | Path, filename: str, purpose: str) -> FileRecord:
        """Keep bytes, or the content of a file on the same file system, which is moved.

        Raises:
            ApiError: 413, there is no room for it.
        """
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        used = sum(record.bytes for record in self.all())
        if purpose == PURPOSE and used + size > self._max_bytes:
            raise ApiError(
                413, f"files have {used} bytes of {self._max_bytes}, and this one {size}: delete some", param="file"
            )
        record = FileRecord(
            id=f"file-{secrets.token_hex(12)}",
            bytes=size,
            created_at=int(time.time()),
            filename=filename,
            purpose=purpose,
        )
        aside = self._folder / f".{record.id}"
        aside.mkdir(mode=0o700, parents=True)
        if isinstance(content, bytes):
            write(aside / "content", content, mode=0o600)
        else:
            content.rename(aside / "content")
        write(aside / "record.json", msgspec.json.encode(record), mode=0o600)
        aside.rename(self._folder / record.id)
        return record

    def get(self, name: str) -> FileRecord:
        """What a file is.

        Raises:
            ApiError: 404.
        """
        if NAME.fullmatch(name):
            try:
                return msgspec.json.decode((self._folder / name / "record.json").read_bytes(), type=FileRecord)
            except (FileNotFoundError, NotADirectoryError):
                pass
        raise ApiError(404, f"there is no file {name!r}")

    def content(self, name: str) -> bytes:
        """What is in a file.

        Raises:
            ApiError: 404.
        """
        self.get(name)
        try:
            return (self._folder / name / "content").read_bytes()
        except FileNotFoundError as error:  # deleted meanwhile
            raise ApiError(404, f"there is no file {name!r}") from error

    def delete(self, name: str) -> None:
        """Delete a file.

        Raises:
            ApiError: 404.
        """
        self.get(name)
        shutil.rmtree(self._folder / name, ignore_errors=True)

    def all(self) -> list[FileRecord]:
        """All files, the newest first."""
        found = []
        for entry in self._folder.iterdir() if self._folder.exists() else ():
            if NAME.fullmatch(entry.name):
                try:
                    found.append(self.get(entry.name))
                except ApiError:  # deleted meanwhile
                    continue
        return sorted(found, key=lambda record: (record.created_at, record.id), reverse=True)


class Files:
    """The routes of this API."""

    def __init__(self, drawer: Drawer) -> None:
        self._drawer = drawer

    async def upload(self, request: Request, reply: Reply) -> None:
        """POST /v1/files."""
        form = await asyncio.to_thread(read_form, request)
        purpose = form.field("purpose")
        if purpose != PURPOSE:
            raise ApiError(400, f"purpose is {PURPOSE!r}, got {purpose!r}: files serve batches here", "purpose")
        record = await asyncio.to_thread(self._drawer.put, form.file, form.filename, purpose)
        reply.respond(200, msgspec.json.encode(record), told(request))

    async def get(self, request: Request, reply: Reply, name: str) -> None:
        """GET /v1/files/{file_id}."""
        reply.respond(200, msgspec.json.encode(await asyncio.to_thread(self._drawer.get, name)), told(request))

    async def content(self, request: Request, reply: Reply, name: str) -> None:
        """GET /v1/files/{file_id}/content."""
        content = await asyncio.to_thread(self._drawer.content, name)
        reply.respond(200, content, told(request), b"application/octet-stream")

    async def delete(self, request: Request, reply: Reply, name: str) -> None:
        """DELETE /v1/files/{file_id}."""
        await asyncio.to_thread(self._drawer.delete, name)
        reply.respond(200, msgspec.json.encode({"id": name, "object": "file", "deleted": True}), told(request))

    async def listing(self, request: Request, reply: Reply) -> None:
        """GET /v1/files."""
        records = await asyncio.to_thread(self._drawer.all)
        purpose = parse_qs(request.query).get("purpose")
        found = [record for record in records if not purpose or record.purpose == purpose[-1]]
        reply.respond(200, page(request.query, found), told(request))


def page(query: str, items: list[Any]) -> bytes:
    """A page of a list whose items have ids, as its query asks: `limit` of them, after the item named `after`, in `order`.

    Raises:
        ApiError: 400.
    """
    asked = {name: values[-1] for name, values in parse_qs(query).items()}
    limit, order = asked.get("limit", str(MAX_PAGE)), asked.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_PAGE):
        raise ApiError(400, f"limit is 1 to {MAX_PAGE}, got {limit!r}", "limit")
    if order not in ("asc", "desc"):
        raise ApiError(400, f"order is asc or desc, got {order!r}", "order")
    found = items if order == "desc" else items[::-1]
    if "after" in asked:
        names = [item.id for item in found]
        if asked["after"] not in names:
            raise ApiError(400, f"nothing here has the id {asked['after']!r}", "after")
        found = found[names.index(asked["after"]) + 1 :]
    shown = found[: int(limit)]
    ends = {"first_id": shown[0].id, "last_id": shown[-1].id} if shown else {"first_id": None, "last_id": None}
    return msgspec.json.encode({"object": "list", "data": shown, **ends, "has_more": len(found) > len(shown)})
