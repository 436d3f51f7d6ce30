"""`python -m launch.ctl NAME OPERATION [--member M ... | --role R] [key=value ...]`: operations on a deployment's workers.

They go to the deployment's frontend, with its admin key; `status` without a member shows all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch import watch
from launch.errors import DeploymentError, LaunchError
from launch.records import RunDirectory, find
from launch.trust import trusting

# Longer than any operation takes: the frontend answers before, also when a worker does not.
PATIENCE_S = 86400.0

LIMITS = "limits"

EPILOG = """\
operations:
  status                                   what each worker says of itself
  drain [timeout_s=30]                     take nothing new, let what runs finish; `serve` undoes it
  pause [timeout_s=30] / resume            the same, and stop the engine's scheduler
  sleep [level=1] [timeout_s=30] / wake    give the GPU's memory back (level 2: the weights too)
  clear                                    forget the prefix cache
  load_lora name=N path=/a/folder          load an adapter from a folder of engine.lora_dirs (partial=true: keep it
                                           where it could be loaded, though not everywhere)
  unload_lora name=N / list_lora
  start_profile [prefix=P] / stop_profile
  scale_ep size=N                          change the size of an elastic expert-parallel engine
  limits [busy_requests=N ...]             show or change the limits of load of all frontends (keys of the recipe:
                                           frontend.busy_*, queue_*, *_per_minute)
"""


def main() -> int:
    """Do it and print what each member said; 0 when all did it, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.ctl",
        description="Operations on the workers of a running deployment.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name")
    parser.add_argument("operation")
    parser.add_argument("arguments", nargs="*", metavar="key=value")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--member", action="append", help="this worker only; may be given several times")
    where.add_argument("--role", help="the workers of this role only: decode, or chat-decode of one model of several")
    parser.add_argument("--model", help="the workers of this model only, by the name that clients use")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run directories are")
    arguments = parser.parse_intermixed_args()
    try:
        run = find(arguments.runs_dir.absolute(), arguments.name)
        body = _body(arguments.arguments, arguments.member, arguments.role, arguments.model)
        if arguments.operation == LIMITS:
            return _limits(run, body)
        status, answer = post(run, arguments.operation, body)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped waiting; the workers go on with it: `status` tells", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps(answer, indent=2))
    elif "members" in answer:
        _show(answer)
    if "members" not in answer:
        print(f"error: {answer['error']['message']}", file=sys.stderr)
    return 0 if status == 200 else 1


def _body(pairs: list[str], members: list[str] | None, role: str | None, model: str | None) -> dict[str, Any]:
    """The request's body.

    Raises:
        DeploymentError: An argument is no key=value.
    """
    body: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise DeploymentError(f"{pair!r} is not key=value")
        body[key] = value
    if members:
        body["members"] = members
    if role:
        body["role"] = role
    if model:
        body["model"] = model
    return body


def _limits(run: RunDirectory, body: dict[str, Any]) -> int:
    """Change limits, and print what each frontend says of them: those of all together, and how many requests wait there."""
    for url in _urls(run):
        status, answer = post(run, LIMITS, body, [url])
        if status != 200:
            print(f"error: {answer['error']['message']}", file=sys.stderr)
            return 1
        for model, each in answer["models"].items():
            whose = (url, model) if len(answer["models"]) > 1 else (url,)
            print(*whose, json.dumps(each["limits"]), f"{each['waiting']} waiting")
    return 0


def _urls(run: RunDirectory) -> list[str]:
    """One of each frontend.

    Raises:
        DeploymentError: The deployment does not run.
    """
    endpoint = run.endpoint()
    if endpoint is None or watch.where_alive(run) is None:
        raise DeploymentError(f"{run.name} is not running: launch it first")
    return endpoint.urls


def post(
    run: RunDirectory, operation: str, body: dict[str, Any], urls: list[str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Ask for an operation: status and answer of the first frontend, of these or of all, that can be reached.

    Raises:
        DeploymentError: None can, or something else answers there.
    """
    urls = urls or _urls(run)
    # A cluster's HTTP proxy leads out of it; the frontend is inside.
    secure = trusting(run.recipe().frontend.tls_cert)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=secure))
    try:
        key = run.admin_key()
    except OSError as error:
        raise DeploymentError(f"the admin key cannot be read ({error}): only who launched {run.name} may") from error
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    why = ""
    for url in urls:
        request = urllib.request.Request(
            f"{url.removesuffix('/v1')}/admin/{operation}", json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with opener.open(request, timeout=PATIENCE_S) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            try:
                return error.code, json.loads(error.read())
            except ValueError:
                raise DeploymentError(f"{url} answers {error.code}, and not as a frontend does") from error
        except urllib.error.URLError as error:  # not reached: nothing was asked of anyone yet
            why = f"{url}: {error.reason}"
    raise DeploymentError(f"no frontend of {run.name} can be reached ({why}): see `python -m launch.status {run.name}`")


def _show(answer: dict[str, Any]) -> None:
    table = Table(title=answer["operation"], title_justify="left")
    for column in ("member", "answer", "details"):
        table.add_column(column, overflow="fold")
    for reply in answer["members"]:
        table.add_row(reply["member"], _word(reply["status"]), escape(reply["message"] or _details(reply["result"])))
    for reply in answer.get("rolled_back", ()):
        table.add_row(reply["member"], _word(reply["status"]), escape(f"rolled back {reply['message']}".strip()))
    Console(soft_wrap=True).print(table)


def _word(status: int) -> str:
    return "[green]done[/]" if status == 200 else f"[red]failed ({status})[/]"


def _details(result: dict[str, Any]) -> str:
    shown = (
        (name, value) for name, value in result.items() if value is not None and value is not False and value != []
    )
    return ", ".join(
        f"{name}={json.dumps(value) if isinstance(value, list | dict) else value}" for name, value in shown
    )


if __name__ == "__main__":
    sys.exit(main())
