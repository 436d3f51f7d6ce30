"""The step on engines of more than one process: pipeline, tensor, data and expert parallel, on one node and on two.

One machine plays both nodes: each has an agent with GPUs of its own, and vLLM's processes meet as they do between hosts,
except that NCCL finds its peer on the same one. The model is a mixture of experts, in float32, where nothing but an
error makes answers differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu import shapes
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.steps_8b import AGGREGATED, exact_arguments, reference, same_answers, small_deployment

DTYPE = "float32 experts"
# On one machine vLLM takes the GPUs of all its processes for visible to each of them, which here they are not.
APART = ("+engine.args.disable_custom_all_reduce=true",)


@dataclass(frozen=True, slots=True)
class Layout:
    """One engine over two GPUs: its name in the table, GPUs of each node, and what it is launched with."""

    name: str
    gpus_per_node: int
    launch: tuple[str, ...]


def _role(**settings: int | str) -> tuple[str, ...]:
    return tuple(f"roles.aggregated.{name}={value}" for name, value in settings.items())


LAYOUTS = (
    Layout("DP2, expert parallel", 2, _role(data_parallel=2, expert_parallel="true")),
    Layout("DP2, expert parallel, two nodes", 1, (*_role(data_parallel=2, expert_parallel="true", nodes=2), *APART)),
    Layout("TP2 over two nodes", 1, (*_role(tensor_parallel=2, nodes=2), *APART)),
    Layout("TP2, expert parallel", 2, _role(tensor_parallel=2, expert_parallel="true")),
    Layout("PP2", 2, _role(pipeline_parallel=2)),
    Layout("PP2 over two nodes", 1, (*_role(pipeline_parallel=2, nodes=2), *APART)),
)


def one_gpu(bench: Bench, steps: frozenset[str]) -> None:
    """The answers of one engine on one GPU."""
    with small_deployment(bench, "experts", shapes.MIXTRAL_SHALLOW, AGGREGATED, 1, **exact_arguments(bench)) as running:
        reference(bench, running, DTYPE)


def compare(layout: Layout, bench: Bench, steps: frozenset[str]) -> None:
    """The same answers from an engine of that layout."""
    name = layout.name.replace(" ", "-").replace(",", "").lower()
    with small_deployment(
        bench,
        name,
        shapes.MIXTRAL_SHALLOW,
        AGGREGATED,
        layout.gpus_per_node,
        launch=layout.launch,
        **exact_arguments(bench),
    ) as running:
        same_answers(bench, running, "parallel", DTYPE, f"{layout.name}, experts float32", moves=False)
