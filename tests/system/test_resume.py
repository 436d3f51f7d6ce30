"""An answer that one worker began and another ends is the answer that one worker would have given, wherever it was cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from launch.recipe import Kind
from tests.deployments import Deployment, deployed
from tests.parity import CALLED, CHAT, SCHEMA, TOOLS, Case, chat, completion, joined, structured
from tests.shapes import events_of, joined_events
from workers.frontend.exchange import Answered, Pool, Question, Relay, answer
from workers.frontend.links import Links
from workers.frontend.openai import options
from workers.frontend.router import Router, mode
from workers.frontend.text import Text
from workers.runtime import wire
from workers.runtime.curve import ClientKeys
from workers.runtime.etcd import Etcd
from workers.runtime.registry import follow

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

HEAD = '{"id":"x","object":"o","created":1,"model":"tiny",'
CASES: dict[str, Case] = {
    "completion": completion(max_tokens=40),
    "stop string": completion(stop=["er"], max_tokens=60),
    "stop string over the seam": completion(stop=["ed blend"], max_tokens=60),
    "min_tokens": completion(stop=["e"], min_tokens=12, max_tokens=40),
    "bytes of characters": completion(logit_bias={str(token): 120 for token in range(130, 264)}, max_tokens=24),
    "chat": chat(max_tokens=40),
    "tool call": chat(tools=TOOLS, **structured(choice=["I look. " + CALLED])),
    "grammar": chat(**structured(json=SCHEMA)),
    "penalties": completion(presence_penalty=1.5, frequency_penalty=1.1, max_tokens=40),
    "logprobs": completion(logprobs=1, max_tokens=20),
    "token ids": chat(return_token_ids=True, max_tokens=20),
}


@pytest.fixture(scope="module", params=["+recipe=tiny_agg", "+recipe=tiny_disagg"], ids=["aggregated", "disaggregated"])
def deployment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Deployment]:
    """One engine, or one for prompts and one for answers."""
    folder = tmp_path_factory.mktemp("resume")
    model = (f"model.path=tiny:{tiny_model}", "engine.args.tool_call_parser=hermes")
    with deployed(folder, request.param, *model, name="resume") as running:
        yield running


@pytest.fixture
async def pool(deployment: Deployment) -> AsyncIterator[Pool]:
    """A frontend's view of the workers, in this process."""
    control = deployment.run.control()
    assert control
    recipe = deployment.run.recipe()
    links = Links(ClientKeys.of_frontends(control), 5.0, lambda: None)
    router = Router(choose={kind: mode(recipe.router) for kind in Kind})
    found = Pool(links, router, recipe.disaggregated, lambda kind: None)
    async with Etcd(control) as etcd, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(follow(etcd, recipe.name, links.update)),
            group.create_task(links.keep()),
        ]
        while found.missing:
            await asyncio.sleep(0.05)
        yield found
        for task in tasks:
            task.cancel()
    links.close()


# A unary answer with logprobs begins anew when it is cut, instead of going on: the client has had nothing of it.
CUT = [
    (name, stream) for name, case in CASES.items() for stream in (False, True) if stream or "logprobs" not in case.body
]


@pytest.mark.parametrize(("name", "stream"), CUT, ids=lambda value: str(value))
async def test_an_answer_goes_on_as_if_it_had_not_been_cut(
    pool: Pool, tiny_model: Path, name: str, stream: bool
) -> None:
    """The same bytes to the client, but for where events are parted; usage counts each token once; for many cuts."""
    question = asked(CASES[name], Text(tiny_model), stream)
    whole = Recorder()
    last = await answer(pool, question, whole)
    tokens = last.completion_tokens
    expected = client_sees(whole.data + last.data, stream)

    for cut in sorted({1, 2, 3, tokens // 3, tokens // 2, tokens - 2, tokens - 1} & set(range(1, tokens))):
        ids, said = whole.after(cut)
        rest = Recorder(ids)
        end = await answer(pool, question, rest)

        assert client_sees(said + rest.data + end.data, stream) == expected, cut
        assert counted(end) == counted(last)


@pytest.mark.parametrize("name", ["chat", "tool call"])
@pytest.mark.parametrize("shape", [wire.Shape.MESSAGE, wire.Shape.RESPONSE], ids=str)
async def test_messages_and_responses_go_on_as_if_they_had_not_been_cut(
    pool: Pool, tiny_model: Path, shape: wire.Shape, name: str
) -> None:
    """Blocks have the same names, what was said before is in the last event, and numbers go on rising."""
    chat = asked(CASES[name], Text(tiny_model), True)
    question = replace(chat, render=msgspec.structs.replace(chat.render, shape=shape, head=f'{{"id":"{shape}-{name}",'))
    whole = Recorder()
    last = await answer(pool, question, whole)
    tokens = last.completion_tokens
    expected = events_of((whole.data + last.data).decode())

    for cut in sorted({1, 2, tokens // 3, tokens // 2, tokens - 1} & set(range(1, tokens))):
        ids, said = whole.after(cut)
        rest = Recorder(ids)
        end = await answer(pool, question, rest)
        found = events_of((said + rest.data + end.data).decode())
        numbers = [event["sequence_number"] for event in found if "sequence_number" in event]

        assert joined_events(found) == joined_events(expected), cut
        assert named(found) == named(expected)
        assert numbers == sorted(set(numbers))
        assert counted(end) == counted(last)


def named(events: list[dict[str, Any]]) -> set[str]:
    """The names of blocks and calls in a stream."""
    items = [event.get("item", event) for event in events]
    return {str(item[key]) for item in items for key in ("id", "item_id", "call_id") if item.get(key)}


class Recorder(Relay):
    """A relay that remembers after how many tokens it had written what."""

    def __init__(self, ids: bytes = b"") -> None:
        super().__init__(self.write)
        self.ids = bytearray(ids)
        self.written = bool(ids)
        self.data = b""
        self._steps: list[tuple[int, int]] = []

    def write(self, data: bytes) -> None:
        """Bytes for the client."""
        self.data += data

    def feed(self, ids: bytes, data: bytes) -> None:
        """As a relay, taking note."""
        super().feed(ids, data)
        self._steps.append((len(self.ids), len(self.data)))

    def after(self, tokens: int) -> tuple[bytes, bytes]:
        """The ids, and what the client had, after the last step with at most that many tokens, or the first."""
        fitting = [step for step in self._steps if step[0] <= 4 * tokens] or self._steps[:1]
        length, size = fitting[-1]
        return bytes(self.ids[:length]), self.data[:size]


def asked(case: Case, text: Text, stream: bool) -> Question:
    """As the frontend asks it."""
    shape = wire.Shape.CHAT if case.path == CHAT else wire.Shape.COMPLETION
    if shape is wire.Shape.CHAT:
        prompt = text.chat(case.body["messages"], {}, case.body.get("tools"))
    else:
        prompt = text.encode(case.body["prompt"])
    return Question(
        request_id=f"resume-{id(case)}",
        prompt=prompt,
        render=wire.Render(shape, stream, False, HEAD, "}", 0),
        options=options(case.body),
        max_tokens=case.body["max_tokens"],
        restarts=not stream and "logprobs" in case.body,
    )


def client_sees(data: bytes, stream: bool) -> Any:
    """What a client makes of the bytes; ids of tool calls are made anew each time."""
    if not stream:
        return _without_call_ids(json.loads(data))
    chunks = [json.loads(event.removeprefix("data: ")) for event in data.decode().split("\n\n") if event]
    return _without_call_ids(joined(chunks))


def _without_call_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_call_ids(item)
            for name, item in value.items()
            if not (name == "id" and str(item).startswith("chatcmpl-tool-"))
        }
    return [_without_call_ids(item) for item in value] if isinstance(value, list) else value


def counted(last: Answered) -> tuple[int, int]:
    """The usage of an answer."""
    return last.prompt_tokens, last.completion_tokens
