"""The GPU benchmark, as far as it needs no GPU: what is asked, what is counted, what is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from benchmarks.gpu import disagg, report, shapes, steps_8b, weights
from benchmarks.gpu.bench import GPU, REPOSITORY, SMOKE, Bench, play
from benchmarks.gpu.load import Seen, Workload, arrivals, figures, prompts, quantile
from tests.deployments import Deployment

WORK = Workload(name="test", prompt_tokens=20, answer_tokens=6, vocabulary=2048, rate=20.0, duration_s=1.0)


def test_every_token_is_a_word_that_names_it(tmp_path: Path) -> None:
    """The ids of an answer can be read from its text, and the text of ids becomes the ids again."""
    folder = shapes.make(shapes.SMALL, tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    wanted = list(range(shapes.SMALL.vocabulary - 1))
    text = tokenizer.decode(wanted, skip_special_tokens=False)
    assert shapes.ids(text) == wanted
    assert tokenizer.encode(text).ids == wanted
    assert tokenizer.get_vocab_size() == shapes.SMALL.vocabulary


def test_a_text_of_other_words_is_no_answer() -> None:
    """Text that the tokenizer did not make is refused and not taken for ids."""
    with pytest.raises(ValueError, match="'hello' is no word"):
        shapes.ids(" w1 hello")


@pytest.mark.parametrize(
    ("shape", "per_token"),
    [
        pytest.param(shapes.LLAMA_8B, 131_072, id="8b"),
        pytest.param(shapes.LLAMA_70B, 327_680, id="70b"),
    ],
)
def test_kv_bytes_are_those_of_the_real_model(shape: shapes.Shape, per_token: int) -> None:
    """In bfloat16; the transfer step asks for prompts of a gigabyte by it."""
    assert shape.kv_bytes_per_token(2) == per_token


def test_every_length_of_the_transfer_bar_is_a_gigabyte() -> None:
    """The bar is for moves of at least a gigabyte, so the step must make such moves."""
    assert min(GPU.transfer_lengths) * GPU.answers.kv_bytes_per_token(2) >= 1e9
    assert max(GPU.transfer_lengths) < GPU.max_model_len


def test_both_precisions_are_one_model() -> None:
    """The float32 and the bfloat16 weights of a name differ by rounding only, and come out the same again."""
    torch = pytest.importorskip("torch")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = type("Config", (), sizes | {"head_dim": 4, "vocab_size": 10, "num_hidden_layers": 1})
    exact = dict(weights.tensors(config, torch.float32, "cpu"))
    again = dict(weights.tensors(config, torch.float32, "cpu"))
    rounded = dict(weights.tensors(config, torch.bfloat16, "cpu"))
    for name, tensor in exact.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor.to(torch.bfloat16), rounded[name]), name
    assert not torch.equal(exact["model.layers.0.mlp.gate_proj.weight"], exact["model.layers.0.mlp.up_proj.weight"])


def test_a_process_with_the_plugin_folder_finds_the_load_format(tmp_path: Path) -> None:
    """vLLM finds plugins by installed distributions; a folder on PYTHONPATH must count as one."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(weights.install(tmp_path))))}
    code = f"from importlib.metadata import entry_points as e; print([p.load() for p in e(group={weights.GROUP!r})])"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "register" in done.stdout
    assert "guard" in done.stdout


def test_every_target_gets_the_same_load() -> None:
    """Arrivals and prompts depend on the workload alone; prompts are all different, and other loads have others."""
    times = arrivals(WORK)
    assert times == arrivals(WORK) == sorted(times)
    assert len(times) > 5
    asked = prompts(WORK, 30)
    assert asked == prompts(WORK, 30)
    assert len({tuple(prompt) for prompt in asked}) == 30
    closed = Workload(name="closed", prompt_tokens=20, answer_tokens=6, vocabulary=2048, count=7)
    assert prompts(closed, 1) != asked[:1]
    assert arrivals(closed) == [0.0] * 7


@pytest.mark.parametrize(
    ("share", "value"),
    [
        pytest.param(0.5, 50.0, id="median"),
        pytest.param(0.99, 99.0, id="p99"),
        pytest.param(1.0, 100.0, id="max"),
    ],
)
def test_quantiles_are_values_that_were_seen(share: float, value: float) -> None:
    """By nearest rank."""
    assert quantile([float(number) for number in range(100, 0, -1)], share) == value


def test_figures_count_what_failed_and_what_fell_short() -> None:
    """A request with an error, or with fewer tokens than were asked for, is a failed one and in no other figure."""
    seen = [
        Seen(at=1.0, first=1.5, last=2.5, tokens=6, gap=0.4),
        Seen(at=1.0, first=2.0, last=3.0, tokens=6, gap=0.2),
        Seen(at=1.0, error="refused"),
        Seen(at=1.0, first=9.0, last=10.0, tokens=5, gap=0.9),
    ]
    row = figures(WORK, seen, gpus=2)
    assert (row["requests"], row["failed"]) == (4, 2)
    assert row["tok_s_gpu"] == 12 / 2.0 / 2
    assert (row["ttft_p50_s"], row["ttft_p99_s"]) == (0.5, 1.0)
    assert row["itl_p50_ms"] == pytest.approx(200)
    assert row["gap_ms"] == 400


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(WORK, id="open loop"),
        pytest.param(
            Workload(name="c", prompt_tokens=20, answer_tokens=6, vocabulary=2000, count=9, at_once=3), id="closed"
        ),
    ],
)
def test_the_client_counts_every_token_of_a_real_frontend(echo: Deployment, work: Workload) -> None:
    """Every request succeeds with as many tokens as were asked for, stamped in order."""
    target = {"url": echo.endpoint.url, "key": echo.run.api_key(), "model": "tiny"}
    seen = play(work, target)
    assert len(seen) == len(arrivals(work))
    assert {(item.error, item.tokens) for item in seen} == {("", 6)}
    assert all(item.at < item.first <= item.last for item in seen)


def test_the_client_says_what_a_frontend_refused(echo: Deployment) -> None:
    """A refusal is the request's error with the frontend's words, and no time-out."""
    seen = play(WORK, {"url": echo.endpoint.url, "key": "wrong", "model": "tiny"})
    assert all("API key" in item.error for item in seen)


def test_settings_to_try_go_where_they_belong() -> None:
    """Capitals are environment, `extra.` the connector's, the rest engine arguments."""
    text = "UCX_TLS=cuda_ipc,extra.num_threads=8,block_size=256"
    assert steps_8b.parse_settings(text) == ({"UCX_TLS": "cuda_ipc"}, {"num_threads": 8}, {"block_size": 256})
    for settings in steps_8b.TRIES.values():
        assert any(steps_8b.parse_settings(settings))
    with pytest.raises(ValueError, match="not KEY=VALUE"):
        steps_8b.parse_settings("block_size")


def _bench(folder: Path, **more: Any) -> Bench:
    given: dict[str, Any] = {
        "gpus": 2,
        "scale": SMOKE,
        "work": folder / "work",
        "out": folder / "out",
        "eager": False,
        "rates": (1.0,),
        "closed": True,
        "conditional": (),
        "ends_at": time.monotonic() + 600,
    }
    return Bench(**given | more)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "rows.jsonl").read_text().splitlines()]


def test_a_stage_that_does_not_fit_the_budget_is_left_out_and_said(tmp_path: Path) -> None:
    """On a rented machine a stage that would be cut off only costs time."""
    bench = _bench(tmp_path, ends_at=time.monotonic() + 30)
    for stage in disagg.stages(bench, frozenset(["tokens"]), ["agg"], []):
        disagg.run(bench, stage)
    assert {row["shape"] for row in _rows(tmp_path)} == {"failed"}
    assert all("left out" in row["why"] for row in _rows(tmp_path))
    assert bench.failures == 4


def test_a_stage_that_fails_or_hangs_does_not_end_the_run(tmp_path: Path) -> None:
    """Its reason is a row, and the next stage has its turn."""
    bench = _bench(tmp_path)

    def hang(bench: Bench) -> None:
        time.sleep(30)

    def succeed(bench: Bench) -> None:
        bench.row("tokens", "fine", equal=1)

    def fail(bench: Bench) -> None:
        raise RuntimeError("no such kernel")

    for work in (hang, fail, succeed):
        disagg.run(bench, disagg.Stage(name=work.__name__, step="tokens", expected_s=1, limit_s=1, run=work))
    assert [row.get("why", row["shape"]) for row in _rows(tmp_path)] == [
        "hang: not done within 1 s",
        "fail: RuntimeError('no such kernel')",
        "fine",
    ]


def test_the_tables_of_the_page_are_made_from_rows() -> None:
    """Every marker of docs/gpu.md names a table; a later row takes the place of an earlier one; ratios are of one load."""
    common = {"cards": "2 x GPU", "at": "2026-01-01T00:00:00Z", "eager": False, "load": "0.9 req/s", "shape": "disagg"}
    figure = {"ttft_p50_s": 2.0, "ttft_p99_s": 2.0, "itl_p50_ms": 2.0, "itl_p99_ms": 2.0, "latency_mean_s": 2.0}
    rest = {"gap_ms": 31.0, "failed": 0, "requests": 41}
    rows = [
        {"step": "baton70b", "tok_s_gpu": 1.0, **figure, **rest, **common},
        {"step": "baton70b", "tok_s_gpu": 49.0, **figure, **rest, **common},
        {"step": "bare70b", "tok_s_gpu": 50.0, **figure, **rest, **common},
    ]
    page = (REPOSITORY / "docs" / "gpu.md").read_text()
    filled = report.fill(page, report.tables(rows))
    assert "| disagg, 0.9 req/s | 0.980 | 1.000 |" in filled
    assert "| Baton disagg, 0.9 req/s | 49.0 | 2.00 / 2.00 s |" in filled
    assert "- 2 x GPU, 2026-01-01, CUDA graphs" in filled
    assert report.fill(filled, report.tables(rows)) == filled


@pytest.mark.engine
@pytest.mark.nightly
@pytest.mark.timeout(420)
def test_the_whole_script_runs_on_the_cpu(tmp_path: Path) -> None:
    """Real engines: prefill + decode answer as one engine does, mixed TP too, and both sides of the load succeed."""
    argv = [
        sys.executable,
        "-m",
        "benchmarks.gpu.disagg",
        "--smoke",
        "--steps",
        "tokens,mismatch,transfer,baton70b,bare70b",
    ]
    argv += ["--shapes", "disagg", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = _rows(tmp_path)
    compared = [row for row in rows if "moved_mb" in row]
    assert {row["step"] for row in compared} == {"tokens", "mismatch"}
    assert all(row["equal"] == row["prompts"] and row["moved_mb"] > 0 for row in compared)
    control = [row for row in rows if row["shape"].endswith("other beginning")]
    assert control
    assert all(row["equal"] == 0 for row in control)
    loads = {(row["step"], row["load"]): row["failed"] for row in rows if "load" in row}
    assert loads == {(step, load): 0 for step in ("baton70b", "bare70b") for load in ("1 req/s", "closed 3")}
    assert all(row["moves"] == SMOKE.transfer_times for row in rows if row["step"] == "transfer")
