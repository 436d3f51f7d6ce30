"""Requests of every kind, and what plain vLLM's own API server answers to them: a deployment must answer the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httpx

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "degrees": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 8}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@dataclass(frozen=True, slots=True)
class Case:
    """One request. `answers` is what both must say of it beyond being equal: a status."""

    path: str
    body: dict[str, Any]
    status: int = 200


def chat(content: Any = "Tell me of the sea", **more: Any) -> Case:
    """A greedy chat of 24 tokens."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    return _case(CHAT, {"messages": messages}, more)


def completion(prompt: Any = "The river was quick and the stone", **more: Any) -> Case:
    """A greedy completion of 24 tokens."""
    return _case(COMPLETION, {"prompt": prompt}, more)


def _case(path: str, body: dict[str, Any], more: dict[str, Any]) -> Case:
    status = more.pop("status", 200)
    common = {"model": "tiny", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    return Case(path, {**body, **common, **more}, status)


def structured(**constraint: Any) -> dict[str, Any]:
    """A grammar that ends by itself."""
    return {"structured_outputs": constraint, "ignore_eos": False, "max_tokens": 80}


CASES: dict[str, Case] = {
    # sampling
    "greedy": completion(),
    "no limit of its own": Case(COMPLETION, {"model": "tiny", "prompt": "short", "temperature": 0, "ignore_eos": True}),
    "seeded": completion(temperature=1.3, seed=7, top_p=0.9, top_k=50, min_p=0.01),
    "seeded, n=3": completion(temperature=2.0, seed=7, n=3),
    "penalties": completion(presence_penalty=1.5, frequency_penalty=1.1, repetition_penalty=1.3),
    "stop string": completion(stop=["e"], include_stop_str_in_output=False),
    "stop string kept": completion(stop=["e"], include_stop_str_in_output=True),
    "stop and min_tokens": completion(stop=["e", "a", "o"], min_tokens=10),
    "stop token": completion(stop_token_ids=list(range(300, 1200)), ignore_eos=False),
    "bad words": completion(bad_words=["the", " a"]),
    "logit bias": completion(logit_bias={"500": 90, "501": -100}),
    "allowed tokens": completion(allowed_token_ids=[400, 401, 402, 403]),
    "special tokens shown": completion(logit_bias={"2": 100}, skip_special_tokens=False, max_tokens=3),
    "cache salt": completion(cache_salt="mine"),
    "priority": completion(priority=5),
    # prompts
    "token ids": completion([10, 400, 500, 600]),
    "several prompts": completion(["one", "two three"], n=2, temperature=1, seed=3),
    "no begin token": completion(add_special_tokens=False),
    "echo": completion(echo=True),
    "echo of token ids": completion([400, 500, 600], echo=True),
    "echo alone": completion(echo=True, max_tokens=0),
    "chat goes on": Case(
        CHAT,
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "Once upon"}],
            "add_generation_prompt": False,
            "continue_final_message": True,
            "echo": True,
            "temperature": 0,
            "max_tokens": 8,
            "ignore_eos": True,
        },
    ),
    "developer role": Case(
        CHAT,
        {
            "model": "tiny",
            "messages": [
                {"role": "user", "content": "hello"},
                {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "system", "content": "and this"},
            ],
            "temperature": 0,
            "max_tokens": 8,
            "ignore_eos": True,
        },
    ),
    "tool results": Case(
        CHAT,
        {
            "model": "tiny",
            "messages": [
                {"role": "user", "content": "weather?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
            ],
            "tools": TOOLS,
            "tool_choice": "none",
            "temperature": 0,
            "max_tokens": 8,
            "ignore_eos": True,
        },
    ),
    # logprobs and token ids
    "logprobs": completion(logprobs=3),
    "logprobs 0": completion(logprobs=0),
    "logprobs with stop": completion(logprobs=2, stop=["e"]),
    "logprobs of some tokens": completion(logprobs=1, logprob_token_ids=[400, 500]),
    "logprobs as ids": completion(logprobs=1, return_tokens_as_token_ids=True),
    "echo with logprobs": completion(echo=True, logprobs=2),
    "echo alone with logprobs": completion(echo=True, logprobs=1, max_tokens=0),
    "chat logprobs": chat(logprobs=True, top_logprobs=2),
    "chat logprobs alone": chat(logprobs=True),
    "token ids out": completion(return_token_ids=True),
    "chat token ids out": chat(return_token_ids=True),
    # grammars
    "json schema": chat(**structured(json=SCHEMA)),
    "regex": chat(**structured(regex="[a-f]{3}-[0-9]{2}")),
    "choice": completion(**structured(choice=["north", "south"])),
    "grammar": completion(**structured(grammar='root ::= "yes" | "no" | "may" "be"')),
    "response format": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}},
        ignore_eos=False,
        max_tokens=80,
    ),
    # tools and reasoning
    "tools unused": chat(tools=TOOLS),
    "tool named": chat(
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        ignore_eos=False,
        max_tokens=80,
    ),
    "tool required": chat(tools=TOOLS, tool_choice="required", ignore_eos=False, max_tokens=120),
    "tool called": chat(tools=TOOLS, logit_bias={}, **structured(choice=[CALLED])),
    "tool called after words": chat(tools=TOOLS, **structured(choice=["I look. " + CALLED])),
    "tools none": chat(tools=TOOLS, tool_choice="none", **structured(choice=[CALLED])),
    "thinks": chat(max_tokens=30),
    "thinks unseen": chat(max_tokens=30, include_reasoning=False),
    # refused
    "bad grammar": chat(**structured(regex="[a-"), status=400),
    "bad schema": chat(**structured(json={"type": "nonsense"}), status=400),
    "temperature below 0": completion(temperature=-1, status=400),
    "top_p above 1": completion(top_p=2, status=400),
    "logprobs beyond all": completion(logprobs=100000, status=400),
    "wrong type": completion(temperature="hot", status=400),
    "tool_choice without tools": chat(tool_choice="required", status=400),
    "unknown tool": chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "no"}}, status=400),
    "no tools at all": chat(tools=[], status=400),
    "token out of vocabulary": completion([10, 99999], status=400),
    "n of the same": completion(n=2, status=400),
}
# Only for one of the two ways to answer.
UNARY_CASES: dict[str, Case] = {
    "prompt logprobs": completion(prompt_logprobs=1),
    "chat prompt logprobs": chat(prompt_logprobs=1),
}
# Made anew for each answer, or vLLM's alone.
UNEQUAL = ("id", "created", "system_fingerprint", "service_tier", "kv_transfer_params", "ec_transfer_params", "metrics")


def answer(http: httpx.Client, base: str, case: Case, stream: bool) -> tuple[int, Any]:
    """Status and content of the answer, with what may differ left out; a stream is put together again."""
    body = case.body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
    response = http.post(f"{base}{case.path}", json=body)
    if response.status_code != 200:
        return response.status_code, None
    if not stream:
        return 200, plain(response.json())
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", response.text
    chunks = [json.loads(line) for line in lines[:-1]]
    if "error" in chunks[0]:  # vLLM's server has sent its 200 before it knows; a deployment has not
        return chunks[0]["error"]["code"], None
    return 200, joined(chunks)


def plain(value: Any) -> Any:
    """Without what may differ, and without what says nothing: null, or empty."""
    if isinstance(value, dict):
        kept = {name: plain(item) for name, item in value.items() if name not in UNEQUAL}
        if "usage" in kept and isinstance(kept["usage"], dict):
            kept["usage"].pop("prompt_tokens_details", None)  # vLLM's server leaves it out unless told
        return {name: item for name, item in kept.items() if item not in (None, [], {}, "")}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


def joined(chunks: Iterable[dict[str, Any]]) -> Any:
    """One object with everything that the chunks of a stream say: texts joined, lists appended, the last word kept."""
    whole: dict[str, Any] = {"choices": {}}
    for chunk in chunks:
        assert "error" not in chunk, chunk
        if chunk.get("usage"):
            whole["usage"] = plain({"usage": chunk["usage"]}).get("usage")
        for name in ("object", "model", "prompt_token_ids"):
            if chunk.get(name):
                whole[name] = chunk[name]
        for choice in chunk["choices"]:
            _add(whole["choices"].setdefault(choice["index"], {}), choice)
    return plain(whole)


def _add(into: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if value is None or name == "index":
            continue
        if name == "tool_calls":
            calls = into.setdefault(name, {})
            for call in value:
                _add(
                    calls.setdefault(str(call["index"]), {}),
                    {key: item for key, item in call.items() if key != "index"},
                )
        elif isinstance(value, dict):
            _add(into.setdefault(name, {}), value)
        elif isinstance(value, list):
            into.setdefault(name, []).extend(value)
        elif isinstance(value, str) and name in ("content", "text", "reasoning", "arguments"):
            into[name] = into.get(name, "") + value
        else:
            into[name] = value
