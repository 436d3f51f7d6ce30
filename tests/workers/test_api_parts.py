"""Parts of the API that decide by themselves: routes, packed bodies, trace context, stored responses, pages, torn batches."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.errors import ConfigError
from tests.certificates import make_certificate
from workers.frontend import messages, responses, tls
from workers.frontend.batches import Answers
from workers.frontend.bodies import gunzip
from workers.frontend.errors import ApiError
from workers.frontend.files import Drawer, page
from workers.frontend.http import Request
from workers.frontend.openapi import document
from workers.frontend.reply import Kept, Reply
from workers.frontend.routes import Route, Routes
from workers.frontend.stored import Store, Stored
from workers.frontend.trace import context_of

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def nothing(request: Request, reply: Reply, *parameters: str) -> None:
    """A handler."""


def routes() -> Routes:
    """As those of models and of files."""
    paths = ["/v1/models/{model}/ready", "/v1/models/{model}", "/v1/files/{file_id}", "/v1/files"]
    found = [Route(method="GET", path=path, handler=nothing, summary="x") for path in paths]
    return Routes([*found, Route(method="DELETE", path="/v1/files/{file_id}", handler=nothing, summary="x")])


@pytest.mark.parametrize(
    ("method", "path", "expected", "parameters"),
    [
        ("GET", "/v1/models/meta/llama", "/v1/models/{model}", ("meta/llama",)),
        ("GET", "/v1/models/meta/llama/ready", "/v1/models/{model}/ready", ("meta/llama",)),
        ("HEAD", "/v1/files", "/v1/files", ()),
        ("DELETE", "/v1/files/a", "/v1/files/{file_id}", ("a",)),
    ],
)
def test_a_path_finds_its_route(method: str, path: str, expected: str, parameters: tuple[str, ...]) -> None:
    """Names of models may have slashes."""
    route, found = routes().find(method, path)

    assert (route.path, found) == (expected, parameters)


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [("POST", "/v1/files/a", 405, "GET, DELETE"), ("GET", "/v1/files/a/b", 404, None), ("GET", "/v1", 404, None)],
)
def test_what_has_no_route_says_what_there_is(method: str, path: str, status: int, allow: str | None) -> None:
    """405 names the methods."""
    with pytest.raises(ApiError) as refused:
        routes().find(method, path)

    assert (refused.value.status, refused.value.allow) == (status, allow)


def test_the_document_has_every_route_and_no_dangling_reference() -> None:
    """Made from the same table."""
    made = document((Route(method="POST", path="/a", handler=nothing, summary="x", body=messages.MessageRequest),))
    found = json.loads(made)
    named = {part.split('"')[0] for part in made.decode().split("#/components/schemas/")[1:]}

    assert found["paths"]["/a"]["post"]["requestBody"]["required"]
    assert named <= set(found["components"]["schemas"])
    assert "max_tokens" in found["components"]["schemas"]["MessageRequest"]["required"]


@given(st.binary(max_size=2000))
def test_a_packed_body_is_what_was_packed(content: bytes) -> None:
    """Up to the bound, and not a byte beyond."""
    packed = gzip.compress(content)

    assert gunzip(packed, len(content)) == content
    if content:
        with pytest.raises(ApiError) as refused:
            gunzip(packed, len(content) - 1)
        assert refused.value.status == 413


@given(st.binary(max_size=200))
def test_noise_is_no_packed_body(noise: bytes) -> None:
    """It is refused, not a crash."""
    with pytest.raises(ApiError) as refused:
        gunzip(b"\x1f\x8b" + noise, 1000)

    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("parent", "taken"),
    [
        (PARENT, True),
        (PARENT.replace("00-", "cc-") + "-later", True),
        (PARENT.replace("00-", "ff-"), False),
        (PARENT.upper(), False),
        (PARENT[:-1], False),
        ("00-" + "0" * 32 + PARENT[35:], False),
        ("", False),
    ],
)
def test_only_a_well_formed_trace_context_is_passed_on(parent: str, taken: bool) -> None:
    """With its state, when that is of a size that fits."""
    found = context_of({"traceparent": parent, "tracestate": "a=b"})

    assert found == ({"traceparent": parent, "tracestate": "a=b"} if taken else None)
    assert context_of({"traceparent": PARENT, "tracestate": "x" * 1000}) == {"traceparent": PARENT}


def test_the_oldest_responses_are_dropped(tmp_path: Path) -> None:
    """There are never many more than the limit; files are the owner's."""
    store = Store(tmp_path / "responses", 10)
    names = [f"resp_{number:024x}" for number in range(200)]
    for at, name in enumerate(names):
        store.put(name, Stored(response=msgspec.Raw(b'{"id":1}'), input=[], messages=[]))
        os.utime(tmp_path / "responses" / name, (at, at))
    kept = [name for name in names if store.get(name)]

    assert kept == names[-len(kept) :]
    assert 10 <= len(kept) <= 10 + 64
    assert stat.S_IMODE((tmp_path / "responses" / names[-1]).stat().st_mode) == 0o600
    newest = store.get(names[-1])
    assert newest
    assert bytes(newest.response) == b'{"id":1}'
    assert store.drop(names[-1])
    assert not store.drop(names[-1])


@pytest.mark.parametrize("name", ["", "..", "resp_", "../api_key", "resp_" + "g" * 24, "resp_" + "0" * 24 + "\n"])
def test_only_names_of_responses_are_looked_up(tmp_path: Path, name: str) -> None:
    """Never another file."""
    (tmp_path / "api_key").write_text("secret")
    store = Store(tmp_path / "responses", 10)

    assert store.get(name) is None
    assert not store.drop(name)


def test_files_have_a_bound_together(tmp_path: Path) -> None:
    """One more is refused until others are deleted; what batches write is not."""
    drawer = Drawer(tmp_path / "files", 100)
    first = drawer.put(b"x" * 60, "a", "batch")
    with pytest.raises(ApiError, match="delete some"):
        drawer.put(b"x" * 60, "b", "batch")
    drawer.put(b"x" * 60, "c", "batch_output")
    drawer.delete(first.id)
    with pytest.raises(ApiError, match="delete some"):
        drawer.put(b"x" * 60, "b", "batch")

    assert [record.filename for record in drawer.all()] == ["c"]


def test_pages_of_a_list_leave_nothing_out(tmp_path: Path) -> None:
    """Forwards and backwards, by any size of page."""
    drawer = Drawer(tmp_path / "files", 1000)
    names = {drawer.put(b"x", str(number), "batch").id for number in range(7)}
    for order in ("asc", "desc"):
        found: list[str] = []
        while True:
            after = f"&after={found[-1]}" if found else ""
            got = json.loads(page(f"limit=3&order={order}{after}", drawer.all()))
            found += [item["id"] for item in got["data"]]
            if not got["has_more"]:
                break
        assert len(found) == 7
        assert set(found) == names
    for query in ("limit=0", "limit=x", "limit=99999999999", "order=up", "after=none"):
        with pytest.raises(ApiError):
            page(query, drawer.all())


def test_a_line_that_was_cut_off_is_no_answer(tmp_path: Path) -> None:
    """The request is asked again, and its answer is whole."""

    async def answer(*names: str) -> Answers:
        answers = Answers(tmp_path)
        for name in names:
            reply = Kept()
            reply.respond(200 if name != "c" else 400, b'{"a":1}')
            await answers.add(name, "r", reply)
        answers.close()
        return answers

    asyncio.run(answer("a", "b", "c"))
    os.truncate(tmp_path / "output.jsonl", (tmp_path / "output.jsonl").stat().st_size - 5)
    again = asyncio.run(answer())
    assert (again.done, again.completed, again.failed) == ({"a", "c"}, 1, 1)
    asyncio.run(answer("b"))
    written = [json.loads(line) for line in (tmp_path / "output.jsonl").read_text().splitlines()]

    assert [(line["custom_id"], line["response"]["body"]) for line in written] == [("a", {"a": 1}), ("b", {"a": 1})]


def test_a_certificate_without_its_key_is_refused_by_name(tmp_path: Path) -> None:
    """A missing file and one of another pair; a right pair is taken."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    certificate, key = map(str, make_certificate(tmp_path / "one"))
    with pytest.raises(ConfigError, match=r"frontend\.tls_key names .*none"):
        tls.context(certificate, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no certificate and its key"):
        tls.context(certificate, str(make_certificate(tmp_path / "other")[1]))

    assert tls.context(certificate, key) is not None
    assert tls.context(None, None) is None


def test_an_error_within_a_stream_has_its_apis_shape() -> None:
    """What the clients of each raise."""
    error = ApiError(503, "no worker is left")
    theirs = messages.error_event(error).decode()
    ours = responses.error_event(error).decode()

    assert theirs.startswith("event: error\ndata: ")
    assert json.loads(theirs.split("data: ")[1]) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "no worker is left"},
    }
    assert json.loads(ours.split("data: ")[1])["type"] == "error"
    assert json.loads(ours.split("data: ")[1])["error"]["code"] == 503
