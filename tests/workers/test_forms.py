"""Forms with a file in them: what is read of them, and what is refused."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as some

from workers.frontend.errors import ApiError
from workers.frontend.forms import MAX_PARTS, read_form
from workers.frontend.http import Request

EDGE = "edge-of-a-part"
KIND = f"multipart/form-data; boundary={EDGE}"
Part = tuple[str, bytes, str | None]


def request(body: bytes, kind: str | None = KIND) -> Request:
    """An upload."""
    headers = {} if kind is None else {"content-type": kind}
    return Request(method="POST", path="/v1/files", headers=headers, body=body, chunked=True, keep_alive=True)


def form(parts: Sequence[Part]) -> bytes:
    """Parts as a client writes them: name, content, and of files a name."""
    written = b""
    for name, content, filename in parts:
        more = "" if filename is None else f'; filename="{filename}"\r\nContent-Type: application/octet-stream'
        written += (
            f'--{EDGE}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
        )
    return written + f"--{EDGE}--\r\n".encode()


names = some.text(some.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=9)
values = some.text(max_size=30).filter(lambda text: EDGE not in text)


@given(
    some.binary(max_size=3_000).filter(lambda file: EDGE.encode() not in file), some.lists(some.tuples(names, values))
)
def test_what_was_sent_is_read(file: bytes, fields: list[tuple[str, str]]) -> None:
    """Every field in its order, also one that comes twice, and the file byte for byte."""
    parts: list[Part] = [(name, value.encode(errors="replace"), None) for name, value in fields]
    found = read_form(request(form([*parts, ("file", file, "a.wav")])))

    assert (found.file, found.filename) == (file, "a.wav")
    assert found.fields == [(name, value.encode(errors="replace").decode()) for name, value in fields]


def test_the_last_of_several_values_counts() -> None:
    """As vLLM's server has it."""
    found = read_form(request(form([("model", b"one", None), ("model", b"two", None), ("file", b"x", "a")])))

    assert (found.field("model"), found.field("language")) == ("two", "")


def test_a_large_file_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full is nothing to a client."""
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/full")
    file = bytes(range(256)) * (3 << 12) + b"!"

    assert read_form(request(form([("model", b"m", None), ("file", file, "a")]))).file == file


@pytest.mark.parametrize("filename", [None, "b"])
def test_parts_are_counted(filename: str | None) -> None:
    """Fields and files alike; as many as may be are read."""
    parts: list[Part] = [("file", b"x", "a"), *[("more", b"", filename)] * (MAX_PARTS - 1)]

    assert read_form(request(form(parts))).file == b"x"
    with pytest.raises(ApiError, match="more than 1000 parts") as refused:
        read_form(request(form([*parts, ("model", b"m", None)])))
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        pytest.param(b"{}", "application/json", 415, id="JSON"),
        pytest.param(b"", None, 415, id="no content type"),
        pytest.param(b"x", "multipart/form-data", 400, id="no boundary"),
        pytest.param(b"no form", KIND, 400, id="no form"),
        pytest.param(form([]), KIND, 400, id="nothing in it"),
        pytest.param(form([("file", b"x", None)]), KIND, 400, id="a file that is a field"),
        pytest.param(form([("file", b"x", "a"), ("file", b"y", "b")]), KIND, 400, id="two files"),
        pytest.param(form([("sound", b"x", "a")]), KIND, 400, id="a file by another name"),
        pytest.param(form([("file", b"x" * 90, "a")])[:120], KIND, 400, id="half a form"),
    ],
)
def test_another_body_is_refused(body: bytes, kind: str | None, status: int) -> None:
    """With the reason."""
    with pytest.raises(ApiError) as refused:
        read_form(request(body, kind))

    assert refused.value.status == status
