"""`python -m launch +recipe=<name> [key=value ...]`: compose, plan, submit, and stay until the deployment ends."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import submitit
from rich.console import Console

from launch import chains, resubmit, watch
from launch.compose import Launch, choices, read
from launch.dry_run import describe
from launch.errors import ConfigError, DeploymentError, LaunchError
from launch.plan import Plan, plan
from launch.progress import Display, endpoint_text
from launch.recipe import Backend, Executor, Launcher, Wait
from launch.records import Phase, RunDirectory
from launch.standby import control_ranks
from launch.submission import submit
from launch.watch import View
from slurm import executors, hosts, preflight
from slurm.executors import Submitted
from workers.engine.connectors import kv_transfer_config, require_packages
from workers.engine.ray_cluster import require_ray

HELP = """python -m launch +recipe=<name> [key=value ...]

recipes    {recipes}
clusters   {clusters}          cluster=<name>, default local
launcher   slurm, allocation, local, debug          launcher=<name>, default the cluster's
keys       any of conf/schema.py: roles.decode.replicas=2, engine.args.max_model_len=8192, slurm.account=x
wait       wait=true stays until the end (Ctrl-C stops the deployment), wait=ready until it serves, wait=false not at all
dry run    dry_run=true prints the plan, the batch script and every command, and touches nothing

chain      chain=3 or "chain=until:2026-12-01T08:00" serves past the time limit, as jobs that take over from each other

then       python -m launch.status NAME, launch.logs NAME [member or role], launch.stop NAME, launch.list, launch.history NAME,
           launch.connect NAME, launch.gateway NAME
"""
QUEUE_POLL_S = 5.0
STOP_WAIT_S = 60.0


def main() -> int:
    """Launch; 0 when the deployment did what was asked, 1 with a message when not."""
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        print(HELP.format(recipes=", ".join(choices("recipe")), clusters=", ".join(choices("cluster"))))
        return 0
    try:
        launch(read(arguments), Console(soft_wrap=True))
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def launch(asked: Launch, console: Console) -> None:
    """Do what was asked.

    Raises:
        LaunchError: It could not be done; nothing of it is left running.
    """
    where = plan(asked.recipe)
    control_ranks(asked.recipe, asked.launcher)  # refuses a standby that there are no ranks for
    run = RunDirectory(asked.runs_dir / asked.recipe.name)
    if asked.dry_run:
        print(describe(asked, where, chains.path_of_first(asked, run)))
        return
    resubmit.check(asked)
    executors.check(asked.launcher, asked.recipe, where, len(hosts.devices_here()))
    _check_packages(asked)
    _check_model(asked)
    chains.refuse_taken(run)
    interrupted = threading.Event()
    if asked.chain is not None:
        with _on_interrupt(interrupted):
            chains.serve(asked, asked.chain, run, console, interrupted, attend)
        return
    chains.forget(run)
    with _on_interrupt(interrupted):
        _until_sound(asked, where, run, console, interrupted)


def _until_sound(asked: Launch, where: Plan, run: RunDirectory, console: Console, interrupted: threading.Event) -> None:
    """Submit, and again for other nodes as long as the recipe says so when some fail their preflight."""
    for tried in itertools.count(1):
        try:
            _once(asked, where, run, console, interrupted)
            return
        except DeploymentError as error:
            reports = [msgspec.json.decode(content, type=preflight.Report) for content in run.preflights()]
            further = resubmit.again(asked, reports, tried)
            if further is None or interrupted.is_set():
                raise
            asked = further
            console.print(f"{error}\nsubmitting again without {asked.recipe.slurm.sbatch['exclude']}", markup=False)


def _once(asked: Launch, where: Plan, run: RunDirectory, console: Console, interrupted: threading.Event) -> None:
    """One submission, attended as asked."""
    job = submit(asked.launcher, asked.recipe, where, run, asked.overrides)
    console.print(f"{run.name} submitted: {asked.launcher}, job {job.job_id}, logs in {run.path}/logs/latest")
    if asked.launcher is Launcher.DEBUG:
        _run_here(job, run, console)
    elif asked.wait is not Wait.NO:
        try:
            attend(asked, run, job, console, interrupted)
        finally:
            if asked.recipe.preflight.only:
                _print_verdict(run)


def attend(
    asked: Launch,
    run: RunDirectory,
    job: Submitted,
    console: Console,
    interrupted: threading.Event,
    until_ready: bool = False,
) -> None:
    """Show progress until the deployment is ready, and then, unless only that is waited for, until it ends.

    Raises:
        DeploymentError: It failed, or ended by itself.
    """
    announced = False
    with Display(console, run.name) as display:
        for view, note in _views(run):
            display.show(view.rows, note)
            _raise_if_failed(run, job, view)
            if view.phase.serves and view.endpoint and not announced:
                announced = True
                for change in view.changes:
                    console.print(change, highlight=False, markup=False)
                console.print(endpoint_text(view.endpoint), highlight=False, markup=False)
                for line in watch.node_notes(run, view):
                    console.print(line, highlight=False, markup=False)
                if until_ready or asked.wait is Wait.READY:
                    return
                console.print("Ctrl-C stops the deployment", highlight=False)
            if interrupted.is_set():
                if until_ready:
                    return
                break
            if view.ended and watch.where_alive(run) is None:
                return
    _stop(asked, run, console)


def _run_here(job: Submitted, run: RunDirectory, console: Console) -> None:
    """The debug executor: everything in this process, progress from a thread beside it."""
    done = threading.Event()

    def show() -> None:
        announced = False
        with Display(console, run.name) as display:
            for view, note in _views(run):
                display.show(view.rows, note)
                if view.phase is Phase.READY and view.endpoint and not announced:
                    announced = True
                    console.print(endpoint_text(view.endpoint), highlight=False, markup=False)
                if done.is_set():
                    return

    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    assert isinstance(job, submitit.core.core.Job)
    error = job.exception()  # runs the job; results() would open a debugger at an error
    done.set()
    thread.join()
    if error is not None:
        raise error if isinstance(error, LaunchError) else DeploymentError(str(error))


def _print_verdict(run: RunDirectory) -> None:
    """What the nodes were found to be like."""
    reports = [msgspec.json.decode(content, type=preflight.Report) for content in run.preflights()]
    print(preflight.table(reports) or "no node has reported")


def _stop(asked: Launch, run: RunDirectory, console: Console) -> None:
    console.print("stopping; Ctrl-C again ends it at once", highlight=False)
    again = threading.Event()
    with _on_interrupt(again, lambda: watch.insist(run)), Display(console, run.name) as display:
        watch.stop(run, asked.recipe.engine.drain_s + STOP_WAIT_S, lambda view: display.show(view.rows, "stopping"))
    console.print(f"{run.name} stopped", highlight=False)


def _views(run: RunDirectory) -> Iterator[tuple[View, str]]:
    """How the deployment is, four times a second; Slurm is asked less often."""
    asked_at, note = 0.0, ""
    while True:
        view = watch.look(run)
        if view.job.launcher is Launcher.SLURM and time.monotonic() - asked_at > QUEUE_POLL_S:
            asked_at = time.monotonic()
            state, reason = watch.slurm_state(view.job.id)
            note = f"job {view.job.id} {(state or '').lower()} {reason}".strip() if not view.ranks else ""
            if state in watch.ENDED_SLURM_STATES and not view.ended:
                _raise_ended(run, watch.look(run), f"Slurm says {state or 'nothing'} of job {view.job.id}")
        yield view, note
        time.sleep(watch.POLL_S)


def _raise_if_failed(run: RunDirectory, job: Submitted, view: View) -> None:
    if view.failure:
        watch.stop(run, STOP_WAIT_S)
        # A node that the preflight refused is seldom alone: whoever mends it wants to know of all.
        unfit = [failure for failure in watch.look(run).failures if preflight.UNFIT in failure]
        raise DeploymentError("\n".join(dict.fromkeys((view.failure, *unfit))))
    if view.job.launcher in (Launcher.LOCAL, Launcher.ALLOCATION) and not view.ended and job.done():
        who = "the local executor's processes have" if view.job.launcher is Launcher.LOCAL else "srun has"
        _raise_ended(run, watch.look(run), f"{who} ended")


def _raise_ended(run: RunDirectory, view: View, how: str) -> None:
    if view.ended and not view.failure:
        return
    raise DeploymentError(
        view.failure or f"{run.name} ended before its time ({how}):\n{watch.agent_logs(run, view.job)}"
    )


def _check_packages(asked: Launch) -> None:
    """Refuse missing packages at once where the engines run in this environment; on a cluster the members do."""
    elsewhere = asked.launcher in (Launcher.SLURM, Launcher.ALLOCATION)
    if elsewhere:
        return
    for recipe in asked.recipe.each:
        for role in recipe.roles if recipe.engine.backend is Backend.VLLM else ():
            require_packages(kv_transfer_config(recipe, role.kind))
            if role.executor is Executor.RAY:
                require_ray()


def _check_model(asked: Launch) -> None:
    for served in asked.recipe.models:
        model, where = served.model, f"models.{served.key}.model.path" if served.key else "model.path"
        if model.tiny:
            from launch.tiny_model import make_tiny_model

            make_tiny_model(Path(model.path), kind=model.tiny)
        elif not (Path(model.path) / "config.json").is_file():
            raise ConfigError(
                f"{where}={model.path} is not a folder with a config.json: download the model there, "
                f"or say where it is with {where}=<folder>"
            )


@contextlib.contextmanager
def _on_interrupt(event: threading.Event, act: object = None) -> Iterator[None]:
    """Ctrl-C and SIGTERM set the event, and act; they do not interrupt what runs."""

    def handle(signum: int, frame: object) -> None:
        event.set()
        if callable(act):
            act()

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


if __name__ == "__main__":
    sys.exit(main())
