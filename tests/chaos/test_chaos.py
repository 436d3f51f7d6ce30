"""Nothing is lost, nothing is wrong, nothing stays: under any faults, for any seed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.clients import End
from tests.chaos.storm import ECHO, VLLM, Setting, storm


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("minutes", "setting"),
    [
        pytest.param(0.3, ECHO, marks=pytest.mark.timeout(240), id="a short storm"),
        pytest.param(10, ECHO, marks=pytest.mark.timeout(1200), id="a long storm"),
        pytest.param(
            10, VLLM, marks=[pytest.mark.timeout(1800), pytest.mark.engine], id="a storm over engines of vLLM"
        ),
    ],
)
def test_a_storm_of_faults_costs_no_request_and_leaves_nothing(
    tmp_path: Path, tiny_model: Path, minutes: float, setting: Setting
) -> None:
    """Workers, frontends, NATS and etcd are killed, frozen, cut off and wiped at random: every client gets the whole right
    answer, the deployment is whole again after each fault, and no memory, descriptor, file or process is left.
    """
    seed = random.SystemRandom().randrange(10**6)
    print(f"python -m tests.chaos --minutes {minutes} --seed {seed}{' --vllm' if setting.vllm else ''}")
    report = storm(tmp_path / "storm", tiny_model, minutes, seed, setting)
    print(report.table())

    assert report.problems == []
    assert report.tally.ends[End.RIGHT] > (10 if setting.vllm else 60) * minutes
    assert len({done.fault for done in report.ledger.done}) > 2
