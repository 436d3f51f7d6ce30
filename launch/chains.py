"""`python -m launch chain=...`: begin a chain, and stay with it, showing which link serves, until it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from launch import watch
from launch.chain import Chain, ChainRecord, Length, Trouble
from launch.compose import Launch
from launch.errors import ConfigError, NameTakenError, SubmitError
from launch.handover import alive, first_link, next_link, stop_chain
from launch.recipe import Launcher, OnBadNode, Wait
from launch.records import CHAIN_FILE, LINKS, RunDirectory, link_numbers

POLL_S = 1.0
STOP_WAIT_S = 60.0
# Where a chain cannot be: in an allocation that ends with its own limit, and in the launching process.
REFUSED = {
    Launcher.ALLOCATION: "an allocation ends at its time limit, whatever is submitted in it: use launcher=slurm",
    Launcher.DEBUG: "the debug launcher holds one deployment in one process: use launcher=local",
}


def path_of_first(asked: Launch, run: RunDirectory) -> Path:
    """The run directory of what a launch submits: that of the deployment, or of the chain's first link."""
    if asked.chain is None:
        return run.path
    return run.path / LINKS / str(max(link_numbers(run.path), default=0) + 1)


def refuse_taken(run: RunDirectory) -> None:
    """Refuse a name under which something runs or waits.

    Raises:
        NameTakenError: A deployment or a link of a chain does.
    """
    where = watch.where_alive(run) if run.job() else None
    if where:
        raise NameTakenError(run.name, where)
    for link, place in alive(Chain(run.path)):
        raise NameTakenError(run.name, f"{link.name}, {place}")


def forget(run: RunDirectory) -> None:
    """Let a single deployment take over the name of a chain that has ended; its links stay for `launch.history`."""
    (run.path / CHAIN_FILE).unlink(missing_ok=True)


def serve(
    asked: Launch,
    length: Length,
    run: RunDirectory,
    console: Console,
    interrupted: threading.Event,
    attend: Callable[..., None],
) -> None:
    """Begin a chain and stay with it for as long as was asked.

    Args:
        asked: The launch.
        length: How long the chain is to be.
        run: The folder of its name.
        console: Where progress goes.
        interrupted: Set when the user wants it to end.
        attend: Shows a link until it is ready.

    Raises:
        LaunchError: It could not be begun, or its first link failed.
    """
    if asked.launcher in REFUSED:
        raise ConfigError(f"chain={length} does not go with launcher={asked.launcher}: {REFUSED[asked.launcher]}")
    if asked.recipe.preflight.only:
        raise ConfigError("preflight.only=true tests one job's nodes: leave out chain")
    if asked.recipe.preflight.on_bad_node is OnBadNode.RESUBMIT:
        raise ConfigError(
            "preflight.on_bad_node=resubmit does not go with chain, whose links nobody waits for: use exclude_and_shrink, or fail"
        )
    if length.until is not None and length.until <= time.time():
        raise ConfigError(f"the chain would end {length}, which is over: give a date to come")
    chain = Chain(run.path)
    record = ChainRecord(
        links=length.links,
        until=length.until,
        launcher=asked.launcher,
        words=asked.overrides,
        first=max(link_numbers(run.path), default=0) + 1,
        begun_at=time.time(),
    )
    link, job = first_link(chain, record, asked.recipe)
    console.print(f"{chain.name} is a chain {length}", highlight=False)
    console.print(f"{link.name} submitted: {asked.launcher}, job {job.job_id}, logs in {link.path}/logs/latest")
    if asked.wait is Wait.NO:
        return
    attend(asked, link, job, console, interrupted, until_ready=True)
    if asked.wait is Wait.READY and not interrupted.is_set():
        return
    console.print("Ctrl-C stops the chain", highlight=False)
    follow(chain, record, console, interrupted)
    if interrupted.is_set():
        console.print("stopping; Ctrl-C again ends this command", highlight=False)
    stop_chain(chain, asked.recipe.engine.drain_s + STOP_WAIT_S, [each for each, _ in alive(chain)])
    console.print(f"{chain.name} has ended", highlight=False)


def follow(chain: Chain, record: ChainRecord, console: Console, interrupted: threading.Event) -> None:
    """Say which link serves, until none is left or the user wants it to end.

    What the nodes may not submit themselves is submitted from here.
    """
    told: set[str] = set()

    def tell(text: str) -> None:
        if text not in told:
            told.add(text)
            console.print(text, highlight=False, soft_wrap=True)

    tried_at = 0.0
    while not interrupted.is_set():
        living = alive(chain)
        for link, place in living:
            tell(f"{link.name}: {place.partition(',')[0]}")
        endpoint = chain.endpoint()
        if endpoint:
            tell(f"link {endpoint.link} is {endpoint.state} at {endpoint.url}")
        trouble = chain.trouble()
        if trouble:
            tell(f"link {trouble.link} could not be submitted from the job: {trouble.message}")
            if trouble.at > tried_at:  # each refusal of a node is answered once
                _submit_from_here(chain, record, trouble, tell)
                tried_at = time.time()
        if not living:
            return
        time.sleep(POLL_S)


def _submit_from_here(chain: Chain, record: ChainRecord, trouble: Trouble, tell: Callable[[str], None]) -> None:
    """Submit a link that the job could not submit itself."""
    newest = max(chain.numbers(), default=0)
    if newest != trouble.link - 1 or chain.stop_file.exists():
        return
    try:
        link, job = next_link(chain, record, newest, trouble.begin_at)
    except (SubmitError, NameTakenError) as error:
        tell(f"link {trouble.link} could not be submitted from here either: {error}")
    else:
        tell(f"{link.name} submitted from here: job {job.job_id}")
