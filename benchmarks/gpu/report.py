"""From the rows of one or several runs to the tables of docs/gpu.md.

    python -m benchmarks.gpu.report DIR [DIR ...]                  # print the tables
    python -m benchmarks.gpu.report DIR --write docs/gpu.md        # put them between the file's markers

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is between is replaced. Where a row was measured
more than once, the last one counts; transfer rates, which scatter, are all shown.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NONE = "No run yet."


def main() -> None:
    """Print the tables, or write them into a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    made = tables(read(arguments.folders))
    if arguments.write:
        arguments.write.write_text(fill(arguments.write.read_text(), made))
    else:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in made.items()))


def read(folders: Iterable[Path]) -> list[Row]:
    """The rows of all runs in their order; what a deployment was launched with beside its shape goes to its loads too."""
    rows: list[Row] = [
        json.loads(line) for folder in folders for line in (folder / "rows.jsonl").read_text().splitlines()
    ]
    settings: dict[tuple[str, str], str] = {}
    for row in rows:
        key = (row["step"], row["shape"])
        settings[key] = row.get("extra", settings.get(key, ""))
        row["extra"] = settings[key]
    return rows


def fill(text: str, made: Mapping[str, str]) -> str:
    """The text with every marked table replaced.

    Raises:
        KeyError: A marker names no table.
    """
    return MARKED.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}", text)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """All tables by name, in markdown."""
    last = {(row["step"], row["shape"], row.get("load"), row.get("extra")): row for row in rows}
    kept = list(last.values())
    return {
        "machine": machine(kept),
        "answers": answers(
            [row for row in kept if row["step"] in ("tokens", "mismatch", "parallel") and "equal" in row]
        ),
        "sleep": sleep([row for row in kept if row["step"] == "sleep" and "before_mib" in row]),
        "transfer": transfer([row for row in rows if row["step"] == "transfer" and "gb_s" in row]),
        "load": load([row for row in kept if row["step"] in ("baton70b", "bare70b") and "tok_s_gpu" in row]),
        "ratio": ratio(kept),
        "failed": failed(rows),
    }


def machine(rows: Sequence[Row]) -> str:
    """On what, when, and how the engines ran."""
    found = sorted({(row["cards"], row["at"][:10], "eager" if row["eager"] else "CUDA graphs") for row in rows})
    return "\n".join(f"- {cards}, {day}, {how}" for cards, day, how in found) or NONE


def answers(rows: Sequence[Row]) -> str:
    """How many greedy answers are equal to one engine's."""
    return _table(
        ("", "answers equal", "first token equal", "tokens until they part (mean)"),
        [
            (
                row["shape"],
                f"{row['equal']} of {row['prompts']}",
                f"{row['first_token_equal']} of {row['prompts']}",
                f"{row['tokens_together']} of {row['of_tokens']}",
            )
            for row in rows
        ],
    )


def sleep(rows: Sequence[Row]) -> str:
    """GPU memory of a sleeping engine."""
    return _table(
        ("", "before", "asleep", "awake again", "to sleep", "to wake", "answers equal"),
        [
            (
                row["shape"],
                *(_mib(row[f"{name}_mib"]) for name in ("before", "asleep", "awake")),
                f"{row['sleep_s']} s",
                f"{row['wake_s']} s",
                f"{row['equal']} of {row['prompts']}",
            )
            for row in rows
        ],
    )


def transfer(rows: Sequence[Row]) -> str:
    """What NIXL moved, by vLLM's counters."""
    return _table(
        ("", "prompt", "KV", "descriptors", "time", "rate", "bar of 150 GB/s"),
        [
            (
                row["shape"],
                f"{row['tokens']:,} tokens",
                f"{row['gb_each']:.2f} GB",
                f"{row['descriptors']:,}",
                f"{row['ms_each']} ms",
                f"{row['gb_s']} GB/s",
                row["bar"],
            )
            for row in rows
        ],
    )


def load(rows: Sequence[Row]) -> str:
    """Every workload on every shape, plain engines under Baton."""
    ordered = sorted(
        rows,
        key=lambda row: (row["shape"] == "conditional", row["shape"], row["load"], row["step"], row.get("extra", "")),
    )
    return _table(
        ("", "tok/s/GPU", "TTFT p50 / p99", "ITL p50 / p99", "longest gap", "failed", "prefills"),
        [
            (
                f"{'plain vLLM' if row['step'] == 'bare70b' else 'Baton'} {row['shape']}, {row['load']}{_with(row)}",
                f"{row['tok_s_gpu']:.1f}",
                f"{row['ttft_p50_s']:.2f} / {row['ttft_p99_s']:.2f} s",
                f"{row['itl_p50_ms']:.1f} / {row['itl_p99_ms']:.1f} ms",
                f"{row['gap_ms']:.0f} ms",
                f"{row['failed']} of {row['requests']}",
                str(row.get("legs_prefill", "")),
            )
            for row in ordered
        ],
    )


def ratio(rows: Sequence[Row]) -> str:
    """Baton's figures over those of plain engines in the same shape and load."""
    measured = {(row["step"], row["shape"], row.get("load")): row for row in rows if "tok_s_gpu" in row}
    names = ("tok_s_gpu", "ttft_p50_s", "ttft_p99_s", "itl_p50_ms", "itl_p99_ms", "latency_mean_s")
    found = []
    for (step, shape, work), mine in sorted(measured.items(), key=lambda item: [str(part) for part in item[0]]):
        plain = measured.get(("bare70b", shape, work))
        if step == "baton70b" and plain:
            shares = (f"{mine[name] / plain[name]:.3f}" if plain[name] else "" for name in names)
            found.append((f"{shape}, {work}", *shares))
    return _table(("Baton / plain", "tok/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "latency"), found)


def failed(rows: Sequence[Row]) -> str:
    """What did not run, in the words of the run."""
    lines = [f"- {row['step']}: {row['why']}" for row in rows if row["shape"] == "failed"]
    lines += [f"- {row['step']} {row['shape']} {row['load']}: {row['skipped']}" for row in rows if "skipped" in row]
    return "\n".join(dict.fromkeys(lines)) or "Nothing."


def _with(row: Row) -> str:
    """The settings of a row, short: keys without the folder that they share."""
    words = [word.removeprefix("frontend.") for word in row.get("extra", "").split()]
    return f" ({', '.join(words)})" if words else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return NONE
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mib(value: int | str) -> str:
    return value if isinstance(value, str) else f"{value / 1024:.1f} GiB"


if __name__ == "__main__":
    main()
