"""How long Baton itself takes: agent start to control plane ready, and an engine's ready to the frontend routing to it.

    python -m benchmarks.launch_overhead [--launches 5] [--backend vllm]

Launches `tiny_disagg` several times (with echo engines unless told otherwise, so that nothing else takes the time) and
reads the agents' and the frontend's own logs. Prints one line for each launch, then the medians and the worst.
"""

from __future__ import annotations

import argparse
import datetime
import re
import statistics
import tempfile
from pathlib import Path

from tests.deployments import Deployment, deployed

STAMP = r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) "
BARS = {"control plane ready": 1.5, "routed after ready": 0.3}


def main() -> None:
    """Launch, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--backend", default="echo", choices=["echo", "vllm"])
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in BARS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(arguments.launches):
            overrides = (
                "+recipe=tiny_disagg",
                f"engine.backend={arguments.backend}",
                f"model.path=tiny:{folder / 'tiny'}",
            )
            with deployed(folder, *overrides, name=f"launch-{number}") as running:
                measured = measure(running)
            for name, seconds in measured.items():
                found[name].append(seconds)
            print("  ".join(f"{name} {seconds:.3f} s" for name, seconds in measured.items()), flush=True)
    for name, values in found.items():
        bar = BARS[name]
        verdict = "met" if max(values) <= bar else "MISSED"
        print(f"{name}: median {statistics.median(values):.3f} s, worst {max(values):.3f} s, bar {bar} s: {verdict}")


def measure(running: Deployment) -> dict[str, float]:
    """The two times of one launch, from its logs."""
    logs = running.run.path / "logs" / "latest"
    agent = next(logs.glob("*_0_log.out")).read_text()
    control = running.run.ranks(1)[0].control_ready_s
    assert control is not None
    ready = max(stamps(agent, r".* (?:prefill|decode)-\d is ready$"))
    routed = max(stamps((logs / "frontend-0.log").read_text(), r".*requests are routed$"))
    return {"control plane ready": control, "routed after ready": max(0.0, routed - ready)}


def stamps(log: str, pattern: str) -> list[float]:
    """When the lines of that pattern were written, in seconds."""
    times = re.findall(STAMP + pattern, log, re.MULTILINE)
    return [datetime.datetime.strptime(item, "%Y-%m-%d %H:%M:%S,%f").timestamp() for item in times]


if __name__ == "__main__":
    main()
