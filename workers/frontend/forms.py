"""Bodies that are forms with a file in them: multipart/form-data."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from python_multipart import parse_form
from python_multipart.exceptions import FormParserError

from workers.frontend.errors import ApiError
from workers.frontend.http import Request

FILE = "file"


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
        ApiError: 415, the body is something else; 400, it is damaged, or has not exactly one file.
    """
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise ApiError(415, f"a file is uploaded as multipart/form-data, not {kind or 'without a content type'}")
    fields: list[tuple[str, str]] = []
    files: list[tuple[bytes, str]] = []

    def on_field(field: Any) -> None:
        fields.append(
            ((field.field_name or b"").decode(errors="replace"), (field.value or b"").decode(errors="replace"))
        )

    def on_file(file: Any) -> None:
        if file.field_name == FILE.encode():
            file.file_object.seek(0)
            files.append((file.file_object.read(), (file.file_name or b"").decode(errors="replace")))
        file.close()

    headers: Any = {"Content-Type": kind.encode(), "Content-Length": str(len(request.body)).encode()}
    try:
        parse_form(headers, io.BytesIO(request.body), on_field, on_file)
    except (FormParserError, ValueError) as error:
        raise ApiError(400, f"the form cannot be read: {error}") from error
    if len(files) != 1:
        raise ApiError(400, f"the form has {len(files)} files named {FILE!r} where one is needed", FILE)
    return Form(*files[0], fields)
