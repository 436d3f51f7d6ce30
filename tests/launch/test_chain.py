"""What is decided about a chain: how long it is, when the next link begins, who publishes, and what an end means."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.chain import (
    Chain,
    ChainRecord,
    Ending,
    Length,
    begins_at,
    chain_of,
    ending,
    goes_on,
    goes_on_after,
    minutes,
    parsed,
    to_publish,
)
from launch.compose import read
from launch.connect import tunnel
from launch.errors import ConfigError
from launch.history import entry
from launch.plan import plan
from launch.recipe import Handover, Launcher
from launch.records import ChainEndpoint, Endpoint, Job, Life, Phase, RunDirectory, find
from slurm.succession import outside

HOUR = 3600.0
EIGHT = datetime(2026, 12, 1, 8).timestamp()


@pytest.mark.parametrize(
    ("written", "length"),
    [
        pytest.param(None, None, id="none"),
        pytest.param(3, Length(links=3), id="links"),
        pytest.param("3", Length(links=3), id="links-as-text"),
        pytest.param("until:2026-12-01T08:00", Length(until=EIGHT), id="date"),
    ],
)
def test_a_chain_is_as_long_as_it_was_written(written: object, length: Length | None) -> None:
    """A number of links, or a date in local time."""
    assert parsed(written) == length


@pytest.mark.parametrize("written", [0, -1, "soon", "until:", "until:tomorrow", 1.5, True])
def test_a_length_that_means_nothing_is_refused_with_an_example(written: object) -> None:
    """Before anything is submitted."""
    with pytest.raises(ConfigError, match="until:2026-12-01T08:00"):
        parsed(written)


@pytest.mark.parametrize(
    ("length", "position", "ends_at", "more"),
    [
        pytest.param(Length(links=3), 2, HOUR, True, id="links-left"),
        pytest.param(Length(links=3), 3, HOUR, False, id="last-link"),
        pytest.param(Length(until=2 * HOUR), 9, HOUR, True, id="ends-before-the-date"),
        pytest.param(Length(until=2 * HOUR), 9, 3 * HOUR, False, id="reaches-the-date"),
        pytest.param(Length(until=2 * HOUR), 9, None, True, id="ends-now-before-the-date"),
        pytest.param(Length(until=0.5), 9, None, False, id="ends-now-after-the-date"),
    ],
)
def test_a_chain_goes_on_until_its_length_is_reached(
    length: Length, position: int, ends_at: float | None, more: bool
) -> None:
    """Seen at one second past the epoch."""
    assert goes_on(length, position, ends_at, now=1.0) is more


@pytest.mark.parametrize(
    ("load_s", "waited_s", "queue_s", "before_end_s"),
    [
        pytest.param(600, 0, None, 150 + 30 + 60 + 600, id="load"),
        pytest.param(600, 300, None, 150 + 30 + 60 + 600 + 300, id="load-and-queue"),
        pytest.param(600, 99999, None, 150 + 30 + 60 + 600 + 900, id="queue-up-to-a-quarter-of-the-limit"),
        pytest.param(600, 99999, 120.0, 150 + 30 + 60 + 600 + 120, id="queue-as-the-user-says"),
    ],
)
def test_the_next_link_begins_as_late_as_it_can(
    load_s: float, waited_s: float, queue_s: float | None, before_end_s: float
) -> None:
    """An hour's job that needs 150 s to finish, with a grace of 30 s and a margin of 60 s."""
    begins = begins_at(HOUR, 150, Handover(queue_s=queue_s), load_s, waited_s, time_min=60)

    assert HOUR - begins == before_end_s


@pytest.mark.parametrize(
    ("until", "begins", "limit_min"),
    [
        pytest.param(None, 0.0, 60, id="no-date"),
        pytest.param(10 * HOUR, 0.0, 60, id="date-far-off"),
        pytest.param(10 * HOUR, 9.5 * HOUR, 30, id="last-link-is-shorter"),
        pytest.param(10 * HOUR, 9.99 * HOUR, 4, id="not-shorter-than-a-job-can-be"),
    ],
)
def test_no_link_asks_for_much_more_time_than_its_chain_has(until: float | None, begins: float, limit_min: int) -> None:
    """Shorter jobs start earlier."""
    length = Length(links=3) if until is None else Length(until=until)

    assert minutes(60, 4, length, begins) == limit_min


def endpoint(state: Phase, url: str = "http://new/v1") -> Endpoint:
    """What a link says of itself."""
    return Endpoint(url=url, urls=[url], models=["m"], state=state, api_key_file="k")


def published(link: int, state: Phase) -> ChainEndpoint:
    """What the chain's file says."""
    return ChainEndpoint(url="http://old/v1", urls=[], models=["m"], state=state, api_key_file="k", link=link)


@pytest.mark.parametrize(
    ("own", "there", "writes"),
    [
        pytest.param(Phase.STARTING, None, True, id="the-first-tells-that-it-starts"),
        pytest.param(Phase.STARTING, published(1, Phase.READY), False, id="not-while-it-loads"),
        pytest.param(Phase.READY, published(1, Phase.READY), True, id="takes-over-when-ready"),
        pytest.param(Phase.READY, published(1, Phase.DRAINING), True, id="takes-over-late"),
        pytest.param(Phase.STARTING, published(1, Phase.STOPPED), True, id="tells-who-waits-in-a-gap"),
        pytest.param(Phase.DRAINING, published(1, Phase.READY), False, id="not-when-it-leaves"),
        pytest.param(Phase.DEGRADED, published(2, Phase.READY), True, id="tells-its-own-changes"),
        pytest.param(Phase.READY, published(3, Phase.READY), False, id="never-over-a-newer-one"),
        pytest.param(Phase.READY, published(3, Phase.STOPPED), False, id="never-over-a-newer-one-that-ended"),
    ],
)
def test_one_link_at_a_time_publishes(own: Phase, there: ChainEndpoint | None, writes: bool) -> None:
    """Link 2 looks at the chain's endpoint; what it writes is its own, with its number."""
    told = to_publish(endpoint(own), 2, there)

    assert (told is not None) is writes
    if told:
        assert (told.url, told.state, told.link) == ("http://new/v1", own, 2)


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(list(Phase))), max_size=30))
def test_the_published_link_never_goes_back(looks: list[tuple[int, Phase]]) -> None:
    """Whatever links say in whatever order, and writing twice the same changes nothing."""
    there: ChainEndpoint | None = None
    for number, phase in looks:
        told = to_publish(endpoint(phase), number, there)
        if told:
            assert there is None or told.link >= there.link
            assert to_publish(endpoint(phase), number, told) is None
            there = told


@pytest.mark.parametrize(
    ("facts", "job", "why", "another"),
    [
        pytest.param({"asked": True}, {"JobState": "COMPLETING"}, Ending.STOPPED, False, id="launch.stop"),
        pytest.param({"replaced": True}, {}, Ending.REPLACED, False, id="replaced"),
        pytest.param({"dated": True}, {}, Ending.DATE, False, id="date"),
        pytest.param(
            {}, {"JobState": "RUNNING", "PreemptTime": "2026-12-01T08:00:00"}, Ending.PREEMPTED, True, id="preempted"
        ),
        pytest.param({}, {"JobState": "COMPLETING", "PreemptTime": "None"}, Ending.CANCELLED, False, id="scancel"),
        pytest.param({"now": 90.0}, {"JobState": "RUNNING", "PreemptTime": "None"}, Ending.LIMIT, True, id="limit"),
        pytest.param({}, {"JobState": "RUNNING", "PreemptTime": "None"}, Ending.ASKED, False, id="kill"),
        pytest.param({}, {}, Ending.ASKED, False, id="slurm-does-not-answer"),
        pytest.param({"stopping": False}, {"JobState": "RUNNING"}, Ending.FAILED, True, id="failed"),
    ],
)
def test_what_an_end_means_for_the_chain(
    facts: dict[str, float], job: dict[str, str], why: Ending, another: bool
) -> None:
    """Preemption, the time limit and a failure are followed by another link; who asks for the end means it."""
    seen = {"asked": False, "replaced": False, "dated": False, "stopping": True, "ends_at": 80.0, "now": 10.0} | facts
    found = ending(job=job, **seen)  # type: ignore[arg-type]

    assert found is why
    assert goes_on_after(found, was_ready=True) is another


def test_a_link_that_fails_before_it_served_is_not_tried_again() -> None:
    """It would fail again, for as long as the chain is long."""
    assert not goes_on_after(Ending.FAILED, was_ready=False)


def test_a_job_submitted_from_inside_a_job_inherits_nothing_of_it() -> None:
    """Slurm's variables of the running job would steer the next one; how to reach Slurm stays."""
    of_the_job = ("SLURM_JOB_ID", "SRUN_CPUS_PER_TASK", "SUBMITIT_EXECUTOR", "CUDA_VISIBLE_DEVICES", "PMIX_RANK")
    of_the_user = {"SLURM_CONF": "/etc/slurm.conf", "PATH": "p", "HF_HOME": "h", "SBATCH_ACCOUNT": "me"}

    assert outside(dict.fromkeys(of_the_job, "1") | of_the_user) == of_the_user


def test_links_share_the_keys_of_their_chain(tmp_path: Path) -> None:
    """One key opens every link, and one that is replaced in one of them is replaced in all."""
    chain = Chain(tmp_path / "runs" / "row")
    length = {"links": 2, "until": None}
    chain.begin(ChainRecord(**length, launcher=Launcher.LOCAL, words=(), first=1, begun_at=0.0))
    recipe = read(["+recipe=tiny_agg"]).recipe
    for number in (1, 2):
        run = chain.make_link(number)
        run.prepare(recipe, plan(recipe), 1)
        run.put_job(Job(launcher=Launcher.LOCAL, attempt=1, id=str(number), host="h", submitted_at=0.0))
    chain.put_endpoint(ChainEndpoint(url="u", urls=[], models=[], state=Phase.READY, api_key_file="k", link=1))
    first, second = chain.link(1), chain.link(2)

    assert first.api_key_file == second.api_key_file == chain.path / "api_key"
    assert first.api_key() == second.api_key()
    assert first.keys_file == chain.path / "keys.json"
    assert find(tmp_path / "runs", "row").path == first.path
    assert find(tmp_path / "runs", "row/links/2").name == "row/links/2"
    found = chain_of(second)
    assert found
    assert (found[0].path, found[1]) == (chain.path, 2)
    assert chain_of(RunDirectory(tmp_path / "runs" / "row")) is None


@pytest.mark.parametrize(
    ("life", "where", "heard_at", "how", "hours"),
    [
        pytest.param(None, "Slurm job 7, pending", None, "pending", None, id="waits"),
        pytest.param(None, None, None, "never began", None, id="cancelled-while-it-waited"),
        pytest.param(Life(started_at=1 * HOUR), "Slurm job 7, running", None, "running", 8.0, id="runs"),
        pytest.param(
            Life(started_at=1 * HOUR, ended_at=2 * HOUR, how="replaced"), None, None, "replaced", 4.0, id="ended"
        ),
        pytest.param(Life(started_at=1 * HOUR), None, 1.5 * HOUR, "lost", 2.0, id="lost"),
        pytest.param(Life(started_at=1 * HOUR), None, None, "lost", None, id="lost-and-overwritten"),
    ],
)
def test_history_says_how_it_ended_and_what_it_cost(
    life: Life | None, where: str | None, heard_at: float | None, how: str, hours: float | None
) -> None:
    """Four nodes, seen three hours past the epoch; waiting costs nothing."""
    job = Job(launcher=Launcher.SLURM, attempt=1, id="7", host="h", submitted_at=0.0, nodes=4)
    found = entry(None, job, life, where, heard_at, now=3 * HOUR)

    assert (found.how, found.node_hours) == (how, hours)


@pytest.mark.parametrize(
    ("via", "end"),
    [
        pytest.param("login.example.org", ["login.example.org"], id="login"),
        pytest.param("me@login.example.org", ["me@login.example.org"], id="user"),
        pytest.param("gate.example.org, login01", ["-J", "gate.example.org", "login01"], id="jump"),
        pytest.param("a,b,login01", ["-J", "a,b", "login01"], id="jumps"),
    ],
)
def test_the_tunnel_goes_through_every_host_to_the_endpoint(via: str, end: list[str]) -> None:
    """From loopback here to the endpoint's address as the login host sees it."""
    argv = tunnel("https://10.1.2.3:20123/v1", 8000, via)

    assert argv[:2] == ["ssh", "-N"]
    assert argv[argv.index("-L") + 1 :] == ["127.0.0.1:8000:10.1.2.3:20123", *end]


@pytest.mark.parametrize("via", ["", "a,,b", "-oProxyCommand=x"])
def test_what_is_no_host_is_not_given_to_ssh(via: str) -> None:
    """A name that begins with a dash would be an option."""
    with pytest.raises(ConfigError, match="no list of hosts"):
        tunnel("http://10.1.2.3:1/v1", 8000, via)
