"""Real engines in two network namespaces, and a path between them that swallows everything."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from workers.engine.peers import ANSWER_S, SILENT_S

pytestmark = [pytest.mark.engine, pytest.mark.nightly, pytest.mark.timeout(300)]

TAG = f"bt{os.getpid() % 100000}"
BRIDGE = f"{TAG}b"
PREFILL, DECODE = "10.77.0.1", "10.77.0.2"
PROMPTS = [list(range(300 + 10 * number, 400 + 10 * number)) for number in range(4)]


def ip(*argv: str) -> None:
    """Run iproute2's `ip`."""
    subprocess.run(["ip", *argv], check=True, capture_output=True)


@pytest.fixture
def bridged() -> Iterator[dict[str, str]]:
    """Two namespaces on a bridge; yields their names by address."""
    if os.geteuid() != 0 or not shutil.which("bridge"):
        pytest.skip("needs root and iproute2")
    names = {PREFILL: f"{TAG}p", DECODE: f"{TAG}d"}
    with contextlib.ExitStack() as stack:
        ip("link", "add", BRIDGE, "type", "bridge")
        stack.callback(ip, "link", "del", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for address, name in names.items():
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", name, "master", BRIDGE, "up")
            for argv in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                ip("-n", name, *argv)
            ip("-n", name, "link", "set", "lo", "up")
        yield names


def cut(names: dict[str, str], isolated: bool) -> None:
    """Let the bridge pass nothing between the two, or everything again; both links stay up."""
    for name in names.values():
        state = "on" if isolated else "off"
        subprocess.run(["bridge", "link", "set", "dev", name, "isolated", state], check=True, capture_output=True)


class Probe:
    """An engine in a namespace."""

    def __init__(self, namespace: str, address: str, kind: str, model: Path, log: IO[str]) -> None:
        argv = ["ip", "netns", "exec", namespace, sys.executable, "-m", "tests.pull_probe", str(model), kind, address]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ}
        )

    def hear(self) -> dict[str, Any]:
        """Its next answer."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("PROBE "):
                found: dict[str, Any] = json.loads(line.removeprefix("PROBE "))
                return found
        raise AssertionError("the probe ended")

    def ask(self, leg: str, prompt: list[int], transfer: str = "") -> dict[str, Any]:
        """Have a leg served."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"leg": leg, "prompt": prompt, "transfer": transfer}) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        """Let it stop."""
        with self.process:  # closes its pipes: the end of its input ends it
            assert self.process.stdin
            self.process.stdin.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()


def test_a_pull_over_a_cut_path_is_given_up_in_time(bridged: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    """Between engines that know each other: within the silence and two questions. The decode engine lives on, computes the prompt
    itself to the same tokens, is told at once the next time, and pulls again once the path is whole.
    """
    with (tmp_path / "log").open("w") as log, contextlib.ExitStack() as stack:
        prefill = Probe(bridged[PREFILL], PREFILL, "prefill", tiny_model, log)
        stack.callback(prefill.end)
        decode = Probe(bridged[DECODE], DECODE, "decode", tiny_model, log)
        stack.callback(decode.end)
        assert prefill.hear() == decode.hear() == {"ready": True}

        def pulled(prompt: list[int]) -> dict[str, Any]:
            return decode.ask("decode", prompt, prefill.ask("prefill", prompt)["transfer"])

        met = pulled(PROMPTS[0])
        passed = prefill.ask("prefill", PROMPTS[1])["transfer"]
        cut(bridged, True)
        hung = decode.ask("decode", PROMPTS[1], passed)
        alone = decode.ask("whole", PROMPTS[1])
        told = pulled(PROMPTS[2])
        cut(bridged, False)
        again = pulled(PROMPTS[3])
        right = [decode.ask("whole", prompt)["ids"] for prompt in (PROMPTS[0], PROMPTS[3])]

    assert met["ids"] == right[0]
    assert hung["error"] == "PeerLostError", hung
    assert SILENT_S <= hung["seconds"] < SILENT_S + 3 * ANSWER_S + 3
    assert len(alone["ids"]) == 8
    assert alone["seconds"] < 10
    assert told["error"] == "PeerLostError"
    assert told["seconds"] < ANSWER_S + 2
    assert again.get("ids") == right[1], again
