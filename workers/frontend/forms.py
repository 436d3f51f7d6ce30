"""Bodies that are forms with a file in them: multipart/form-data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from python_multipart import create_form_parser
from python_multipart.exceptions import FormParserError

from workers.frontend.errors import ApiError
from workers.frontend.http import Request

FILE = "file"
# Far more than a client has to say. Each part costs some 20 us of Python, which every stream of the frontend waits for.
MAX_PARTS = 1000
# The body is in memory already; by itself the parser moves files beyond 1 MiB to $TMPDIR, which may be full.
PARSER = {"MAX_MEMORY_FILE_SIZE": math.inf}
STEP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Form:
    """One file, named `file`, and the other fields in their order."""

    file: bytes
    filename: str
    fields: list[tuple[str, str]]

    def field(self, name: str) -> str:
        """A field's last value; "" when it is not there."""
        return next((value for key, value in reversed(self.fields) if key == name), "")


def read_form(request: Request) -> Form:
    """The form of a request; blocks for as long as the file is large.

    Raises:
        ApiError: 415, the body is something else; 400, it is damaged, has too many parts, or not exactly one file.
    """
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise ApiError(415, f"a file is uploaded as multipart/form-data, not {kind or 'without a content type'}")
    fields: list[tuple[str, str]] = []
    files: list[tuple[bytes, str]] = []

    parts = 0

    def count() -> None:
        nonlocal parts
        parts += 1
        if parts > MAX_PARTS:
            raise ApiError(400, f"the form has more than {MAX_PARTS} parts: send fewer fields")

    def on_field(field: Any) -> None:
        count()
        fields.append(
            ((field.field_name or b"").decode(errors="replace"), (field.value or b"").decode(errors="replace"))
        )

    def on_file(file: Any) -> None:
        count()
        if file.field_name == FILE.encode():
            file.file_object.seek(0)
            files.append((file.file_object.read(), (file.file_name or b"").decode(errors="replace")))
        file.close()

    headers: Any = {"Content-Type": kind.encode()}
    try:
        parser = create_form_parser(headers, on_field, on_file, PARSER)
        for start in range(0, len(request.body), STEP_BYTES):
            parser.write(request.body[start : start + STEP_BYTES])
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise ApiError(400, f"the form cannot be read: {error}") from error
    if len(files) != 1:
        raise ApiError(400, f"the form has {len(files)} files named {FILE!r} where one is needed", FILE)
    return Form(*files[0], fields)
