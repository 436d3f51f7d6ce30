"""Requests of the responses and messages APIs, and how answers to them are compared with plain vLLM's own server."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx

from tests.parity import CALLED, SCHEMA, TOOLS, Case, structured

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
FUNCTION = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOL = {"name": "get_weather", "description": "Weather of a city", "input_schema": FUNCTION["parameters"]}
TOLD = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Rome"}'}


def response(given: Any = "Tell me of the sea", **more: Any) -> Case:
    """A greedy response of 24 tokens."""
    status = more.pop("status", 200)
    common = {"model": "tiny", "input": given, "max_output_tokens": 24, "temperature": 0, "ignore_eos": True}
    # vLLM 0.32 has the tokenizer put its begin token before what the template wrote, where there is one already; a
    # deployment does so only when it is told to, as with chats.
    return Case(RESPONSES, {**common, "add_special_tokens": True, **more}, status)


def message(content: Any = "Tell me of the sea", **more: Any) -> Case:
    """A greedy message of 24 tokens."""
    status = more.pop("status", 200)
    turns = more.pop("messages", [{"role": "user", "content": content}])
    common = {"model": "tiny", "messages": turns, "max_tokens": 24, "temperature": 0}
    return Case(MESSAGES, {**common, **more}, status)


def _structured(**constraint: Any) -> dict[str, Any]:
    """A grammar that ends by itself, in this API's words."""
    asked = structured(**constraint)
    return {**asked, "max_output_tokens": asked.pop("max_tokens")}


RESPONSE_CASES: dict[str, Case] = {
    "text": response(),
    "instructions": response(instructions="Be brief."),
    "items": response(
        [
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            TOLD,
            {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
            {"role": "user", "content": "And now?"},
        ]
    ),
    "items and tools": response(
        [
            {"role": "user", "content": "Weather?"},
            TOLD,
            {**TOLD, "call_id": "call_2", "arguments": "[1]"},
            {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
        ],
        tools=[FUNCTION],
        tool_choice="none",
    ),
    "the assistant's own": response(
        [
            {"role": "user", "content": "hello"},
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "status": "completed",
                "content": [{"type": "output_text", "text": "hi", "annotations": []}],
            },
            {"role": "user", "content": "again"},
        ]
    ),
    "goes on": response(
        [
            {"role": "user", "content": "Say it"},
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "status": "incomplete",
                "content": [{"type": "output_text", "text": "Once upon", "annotations": []}],
            },
        ],
        max_output_tokens=8,
    ),
    "sampled": response(temperature=1.3, seed=7, top_p=0.9, top_k=50, presence_penalty=0.5, frequency_penalty=0.2),
    "stop string": response(stop=["e"]),
    "logprobs": response(include=["message.output_text.logprobs"], top_logprobs=2),
    "told of the request": response(metadata={"a": "b"}, user="me", service_tier="flex", max_tool_calls=3),
    "json schema": response(
        text={"format": {"type": "json_schema", "name": "w", "schema": SCHEMA}},
        ignore_eos=False,
        max_output_tokens=80,
    ),
    "json": response(text={"format": {"type": "json_object"}}, ignore_eos=False, max_output_tokens=60),
    "choice": response(**_structured(choice=["north", "south"])),
    "effort": response(reasoning={"effort": "low"}),
    "tools unused": response(tools=[FUNCTION]),
    "tool called": response(tools=[FUNCTION], **_structured(choice=[CALLED])),
    "tool called after words": response(tools=[FUNCTION], **_structured(choice=["I look. " + CALLED])),
    "tool named": response(
        tools=[FUNCTION],
        tool_choice={"type": "function", "name": "get_weather"},
        ignore_eos=False,
        max_output_tokens=80,
    ),
    "tool required": response(tools=[FUNCTION], tool_choice="required", ignore_eos=False, max_output_tokens=120),
    "tools none": response(tools=[FUNCTION], tool_choice="none", **_structured(choice=[CALLED])),
    "wrong type": response(temperature="hot", status=400),
    "temperature below 0": response(temperature=-1, status=400),
    "no input": Case(RESPONSES, {"model": "tiny"}, 400),
    "unknown earlier one": response(previous_response_id="resp_none", status=404),
    "prompt template": response(prompt={"id": "p"}, status=400),
    "named tool without tools": response(tool_choice={"type": "function", "name": "x"}, status=400),
    "grammar and format": response(
        text={"format": {"type": "json_object"}}, structured_outputs={"choice": ["a"]}, status=400
    ),
}
MESSAGE_CASES: dict[str, Case] = {
    "text": message(),
    "system": message(system="Be brief."),
    "system in blocks": message(
        system=[{"type": "text", "text": "x-anthropic-billing-header: 1"}, {"type": "text", "text": "Be brief."}]
    ),
    "system within": message(
        messages=[
            {"role": "user", "content": "one"},
            {"role": "system", "content": "now be brief"},
            {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "three"}]},
        ]
    ),
    "a conversation": message(
        messages=[
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
                    {"type": "text", "text": "And now?"},
                ],
            },
        ],
        tools=[TOOL],
        tool_choice={"type": "none"},
    ),
    "stop sequence": message(stop_sequences=["e"]),
    "top_k": message(top_k=1, temperature=1.0),
    "json schema": message(output_config={"format": {"type": "json_schema", "schema": SCHEMA}}, max_tokens=80),
    "effort": message(output_config={"effort": "low"}),
    "thinking": message(thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=1030, stop_sequences=["e"]),
    "no thinking": message(thinking={"type": "disabled"}),
    "tools unused": message(tools=[TOOL], stop_sequences=["e"]),
    "tool named": message(tools=[TOOL], tool_choice={"type": "tool", "name": "get_weather"}, max_tokens=80),
    "any tool": message(tools=[TOOL], tool_choice={"type": "any"}, max_tokens=120),
    "wrong type": message(temperature="hot", status=400),
    "temperature below 0": message(temperature=-1, status=400),
    "no max_tokens": Case(MESSAGES, {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}, 400),
    "no tokens": message(max_tokens=0, status=400),
    "thinking without room": message(thinking={"type": "enabled", "budget_tokens": 1024}, status=400),
    "unknown block": message([{"type": "nonsense"}], status=400),
    "unknown model": message(model="none", status=404),
    "tool without a name": message(tools=[TOOL], tool_choice={"type": "tool"}, status=400),
}
_SAID = [{"role": "user", "content": "The café 日本"}, {"role": "assistant", "content": "Once"}]
TOKEN_CASES: dict[str, Case] = {
    "text": Case("/tokenize", {"model": "tiny", "prompt": "The café 日本", "return_token_strs": True}),
    "text alone": Case("/tokenize", {"prompt": "The sea", "add_special_tokens": False}),
    "chat": Case("/tokenize", {"model": "tiny", "messages": _SAID, "return_token_strs": True}),
    "chat with tools": Case("/tokenize", {"model": "tiny", "messages": _SAID[:1], "tools": TOOLS}),
    "chat that goes on": Case(
        "/tokenize", {"messages": _SAID, "add_generation_prompt": False, "continue_final_message": True}
    ),
    "both ways to go on": Case("/tokenize", {"messages": _SAID, "continue_final_message": True}, 400),
    "nothing": Case("/tokenize", {"model": "tiny"}, 400),
    "unknown model": Case("/tokenize", {"model": "none", "prompt": "x"}, 404),
    "ids": Case("/detokenize", {"model": "tiny", "tokens": [1, 47, 570, 86, 2, 390]}),
    "no ids": Case("/detokenize", {"tokens": []}),
    "a negative id": Case("/detokenize", {"tokens": [-1]}, 400),
}
SHAPE_CASES = {f"response: {name}": case for name, case in RESPONSE_CASES.items()} | {
    f"message: {name}": case for name, case in MESSAGE_CASES.items()
}
# Made anew for each answer, or of one of the two servers alone.
UNEQUAL = ("id", "item_id", "call_id", "created_at", "signature", "sequence_number", "input_tokens_details", "error")
MADE = re.compile(r"(?:call_|chatcmpl-tool-)[0-9a-zA-Z]+")


def shaped_answer(http: httpx.Client, base: str, case: Case, stream: bool) -> tuple[int, Any]:
    """Status and content of an answer with what may differ left out; of a stream all events, their deltas joined."""
    answered = http.post(f"{base}{case.path}", json=case.body | ({"stream": True} if stream else {}))
    if answered.status_code != 200:
        return answered.status_code, None
    if not stream:
        return 200, _plain(answered.json())
    events = events_of(answered.text)
    if events and events[0].get("error"):
        return int(events[0]["error"].get("code", 400)), None
    return 200, joined_events(events)


def events_of(stream: str) -> list[dict[str, Any]]:
    """The content of each event."""
    return [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]


def joined_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A stream's events without what may differ, deltas that follow each other joined."""
    return _joined([_plain(event) for event in events])


def _joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Deltas that follow each other are one: how much text comes with each is chance."""
    found: list[dict[str, Any]] = []
    for event in events:
        before = found[-1] if found else {}
        alike = event["type"] == before.get("type") and event["type"].endswith("delta")
        if alike and isinstance(event.get("delta"), str):
            before["delta"] = before.get("delta", "") + event["delta"]
            before["logprobs"] = [*before.get("logprobs", []), *event.get("logprobs", [])]
        elif alike and isinstance(event.get("delta"), dict) and "type" in event["delta"]:
            for name, value in event["delta"].items():
                if name != "type":
                    before["delta"][name] = before["delta"].get(name, "") + value
        else:
            found.append(event)
    return [_plain(event) for event in found]


def _plain(value: Any) -> Any:
    """Without what may differ, and without what says nothing."""
    if isinstance(value, dict):
        kept = {name: _plain(item) for name, item in value.items() if name not in UNEQUAL}
        if "input_tokens" in kept:
            # Of an input that was partly cached, vLLM's server tells only when it is told to.
            kept["input_tokens"] += kept.pop("cache_read_input_tokens", 0)
        if "bytes" in kept and "token" in kept:
            kept.pop("bytes")  # vLLM's server leaves them out of events
        return {name: item for name, item in kept.items() if item not in (None, [], {}, "")}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return MADE.sub("call", value)
    return round(value, 3) if isinstance(value, float) else value
