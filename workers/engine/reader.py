"""What every request to one engine is read with: its tokenizer, its sampling defaults, and vLLM's own parsers (0.32)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.parser import ParserManager

from workers.engine.options import ServingOptions


@dataclass(frozen=True, slots=True)
class Reader:
    """`parser` is a class, one instance of which reads one answer; None where nothing but text is read."""

    tokenizer: Any
    model_config: Any
    defaults: dict[str, Any]
    parser: Any
    serving: ServingOptions

    @classmethod
    def of(cls, llm: Any, serving: ServingOptions) -> Reader:
        """For a running AsyncLLM.

        Raises:
            TypeError: A parser does not go with the model's tokenizer.
        """
        config, tokenizer = llm.model_config, llm.renderer.tokenizer
        parser = ParserManager.get_parser(
            tool_parser_name=serving.tool_call_parser,
            reasoning_parser_name=serving.reasoning_parser,
            enable_auto_tools=serving.enable_auto_tool_choice,
            model_name=config.model,
            is_harmony=config.hf_config.model_type == "gpt_oss",
            tokenizer=tokenizer,
        )
        return cls(tokenizer, config, config.get_diff_sampling_param(), parser, serving)
