"""Operations on the workers of a running deployment: by `launch.ctl`, by the admin routes, and by vLLM's names for them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.adapters import make_adapter
from tests.deployments import Deployment, deployed

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 20}
WORKERS = ["aggregated-0", "aggregated-1"]


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters a, b and c."""
    folder = tmp_path_factory.mktemp("lora")
    for number, name in enumerate("abc"):
        make_adapter(folder / name, seed=number)
    return folder


@pytest.fixture(scope="module")
def deployment(tiny_model: Path, lora_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two workers with echo engines."""
    overrides = ["engine.backend=echo", "engine.echo_interval_s=0.01", "roles.aggregated.replicas=2"]
    here = [f"model.path=tiny:{tiny_model}", f"engine.lora_dirs=[{lora_dir}]"]
    folder = tmp_path_factory.mktemp("operations")
    with deployed(folder, "+recipe=tiny_agg", *overrides, *here, name="operations") as running:
        yield running


@pytest.fixture
def admin(deployment: Deployment) -> Iterator[httpx.Client]:
    """A client with the admin key; whatever a test did to the workers is undone after it."""
    base = deployment.endpoint.url.removesuffix("/v1")
    headers = {"Authorization": f"Bearer {deployment.run.admin_key()}"}
    with httpx.Client(base_url=base, headers=headers, timeout=60) as client:
        yield client
        for worker in client.get("/admin/members").json()["members"]:
            back = {"draining": "serve", "paused": "resume", "asleep": "wake"}.get(worker["result"]["state"])
            if back:
                client.post(f"/admin/{back}", json={"members": [worker["member"]]}).raise_for_status()
            for name in worker["result"]["adapters"]:
                client.post("/admin/unload_lora", json={"members": [worker["member"]], "name": name})


def states(admin: httpx.Client) -> list[str]:
    """What every worker says that it does."""
    return [worker["result"]["state"] for worker in admin.get("/admin/members").json()["members"]]


def adapters(admin: httpx.Client) -> list[list[str]]:
    """The adapters of every worker."""
    return [worker["result"]["adapters"] for worker in admin.get("/admin/members").json()["members"]]


def ctl(deployment: Deployment, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, as a user gives it."""
    argv = [sys.executable, "-m", "launch.ctl", *words, "--runs-dir", str(deployment.run.path.parent)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/members"),
        ("POST", "/admin/drain"),
        ("POST", "/admin/nonsense"),
        ("POST", "/sleep"),
        ("POST", "/v1/load_lora_adapter"),
    ],
)
def test_operators_have_a_key_of_their_own(deployment: Deployment, admin: httpx.Client, method: str, path: str) -> None:
    """Whoever may ask the model may not put it to sleep."""
    keys = {"": 401, "Bearer wrong": 401, f"Bearer {deployment.run.api_key()}": 403}
    for key, status in keys.items():
        answer = admin.request(method, path, headers={"Authorization": key})
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status
    assert states(admin) == ["serving", "serving"]


def test_the_admin_key_does_not_ask_the_model(admin: httpx.Client) -> None:
    """Two keys, two purposes."""
    assert admin.post("/v1/chat/completions", json=CHAT).status_code == 401


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        pytest.param("/admin/dance", {}, 404, "no operation 'dance': it is one of status", id="operation"),
        pytest.param("/admin/drain", {"members": ["aggregated-7"]}, 404, "did you mean 'aggregated-", id="member"),
        pytest.param("/admin/drain", {"members": []}, 400, "list of names", id="no members"),
        pytest.param("/admin/drain", {"members": [1]}, 400, "list of names", id="members are numbers"),
        pytest.param("/admin/drain", {"role": "decode"}, 404, "no 'decode' worker.*aggregated", id="role"),
        pytest.param("/admin/drain", {"role": "a", "members": ["a"]}, 400, "not both", id="both"),
        pytest.param("/admin/drain", [], 400, "not a JSON object", id="a list"),
        pytest.param("/admin/sleep", {"level": 9}, 400, "Invalid enum value 9", id="level"),
        pytest.param("/sleep?level=9", None, 400, "Invalid enum value 9", id="level in the query"),
        pytest.param("/admin/load_lora", {"name": "a", "partial": "maybe"}, 400, "true or false", id="partial"),
        pytest.param("/v1/load_lora_adapter", {"lora_path": "/a"}, 400, "field `name`", id="nameless"),
    ],
)
def test_what_is_wrong_for_all_is_said_once_and_nothing_is_done(
    admin: httpx.Client, path: str, body: Any, status: int, message: str
) -> None:
    """In OpenAI's error shape."""
    answer = admin.post(path, json=body) if body is not None else admin.post(path)

    assert answer.status_code == status
    assert re.search(message, answer.json()["error"]["message"])
    assert states(admin) == ["serving", "serving"]


def test_noise_for_a_body_is_refused(admin: httpx.Client) -> None:
    """And asking with the wrong method."""
    for noise in (b"{", b"\xff", b"[" * 100_000):
        assert admin.post("/admin/drain", content=noise).status_code == 400
    assert admin.get("/admin/drain").status_code == 405
    assert admin.post("/admin/members").status_code == 405


@pytest.mark.parametrize(("away", "back"), [("drain", "serve"), ("pause", "resume"), ("sleep", "wake")])
def test_a_worker_leaves_and_returns_without_a_failed_request(
    deployment: Deployment, admin: httpx.Client, away: str, back: str
) -> None:
    """Under load, again and again: what runs there is finished, what comes goes to the other."""
    stop = threading.Event()
    asked: list[int] = []

    def ask_on() -> None:
        while not stop.is_set():
            answer = deployment.client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
            asked.append(answer.usage.completion_tokens)

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(ask_on) for _ in range(8)]
        try:
            while len(asked) < 60 and not any(client.done() for client in clients):
                for worker, operation in itertools.product(WORKERS, (away, back)):
                    answer = admin.post(f"/admin/{operation}", json={"members": [worker]})
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["members"][0]["result"].get("given_back", 0) == 0
        finally:
            stop.set()
        for client in clients:
            client.result()

    assert set(asked) == {20}
    assert states(admin) == ["serving", "serving"]


def test_with_every_worker_away_requests_are_refused_at_once(deployment: Deployment, admin: httpx.Client) -> None:
    """503 and when to come back; and they are served again when one is."""
    admin.post("/admin/drain").raise_for_status()
    refused = deployment.http.post(f"{deployment.endpoint.url}/chat/completions", json=CHAT)
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    admin.post("/admin/serve", json={"role": "aggregated"}).raise_for_status()

    assert deployment.http.post(f"{deployment.endpoint.url}/chat/completions", json=CHAT).status_code == 200


def test_requests_that_take_too_long_go_elsewhere(deployment: Deployment, admin: httpx.Client) -> None:
    """A worker that is to go at once gives its unary requests back, and the other answers them whole."""
    long = {**CHAT, "max_tokens": 200}
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(deployment.http.post, f"{deployment.endpoint.url}/chat/completions", json=long)
            for _ in range(8)
        ]
        while not all(member["result"]["streams"] for member in _members(admin)):
            pass
        answer = admin.post("/admin/drain", json={"members": ["aggregated-0"], "timeout_s": 0}).json()
        answers = [future.result().json() for future in asked]

    assert answer["members"][0]["result"]["given_back"] > 0
    assert [item["usage"]["completion_tokens"] for item in answers] == [200] * 8


def _members(admin: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = admin.get("/admin/members").json()["members"]
    return found


def test_an_adapter_is_loaded_by_every_worker(admin: httpx.Client, lora_dir: Path) -> None:
    """By twenty operators at once, too; and unloaded by every one."""
    body = {"name": "a", "path": str(lora_dir / "a")}
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: admin.post("/admin/load_lora", json=body), range(20)))
    loaded = [member["result"]["loaded"] for answer in answers for member in answer.json()["members"]]

    assert [answer.status_code for answer in answers] == [200] * 20
    assert sum(loaded) == 2
    assert adapters(admin) == [["a"], ["a"]]
    assert admin.post("/admin/unload_lora", json={"name": "a"}).status_code == 200
    assert adapters(admin) == [[], []]


def test_an_adapter_that_one_worker_cannot_load_is_loaded_by_none(admin: httpx.Client, lora_dir: Path) -> None:
    """Unless the operator wants what can be had."""
    for name in "ab":
        body = {"name": name, "path": str(lora_dir / name), "members": ["aggregated-0"]}
        admin.post("/admin/load_lora", json=body).raise_for_status()
    body = {"name": "c", "path": str(lora_dir / "c")}
    answer = admin.post("/admin/load_lora", json=body)
    assert answer.status_code == 409
    assert [member["status"] for member in answer.json()["members"]] == [409, 200]
    assert [member["member"] for member in answer.json()["rolled_back"]] == ["aggregated-1"]
    assert adapters(admin) == [["a", "b"], []]
    answer = admin.post("/admin/load_lora", json={**body, "partial": True})

    assert answer.status_code == 409
    assert adapters(admin) == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("path", "status"), [("/etc", 403), ("{dir}/none", 404), ("{dir}/../x", 403), ("relative", 400)]
)
def test_an_adapter_that_cannot_be_had_is_the_clients_error(
    admin: httpx.Client, lora_dir: Path, path: str, status: int
) -> None:
    """Never the server's."""
    body = {"lora_name": "x", "lora_path": path.format(dir=lora_dir)}

    assert admin.post("/v1/load_lora_adapter", json=body).status_code == status
    assert adapters(admin) == [[], []]


def test_vllms_names_do_the_same(admin: httpx.Client, lora_dir: Path) -> None:
    """For scripts that were written for vLLM's server."""
    admin.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": str(lora_dir / "a")}).raise_for_status()
    assert adapters(admin) == [["a"], ["a"]]
    admin.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).raise_for_status()
    assert adapters(admin) == [[], []]
    admin.post("/reset_prefix_cache").raise_for_status()
    admin.post("/sleep?level=2").raise_for_status()
    assert [member["result"]["level"] for member in _members(admin)] == [2, 2]
    admin.post("/wake_up").raise_for_status()
    admin.post("/pause").raise_for_status()
    assert states(admin) == ["paused", "paused"]
    admin.post("/resume").raise_for_status()

    assert states(admin) == ["serving", "serving"]


def test_the_command_shows_what_each_worker_said(deployment: Deployment, admin: httpx.Client, lora_dir: Path) -> None:
    """A table for people, JSON for programs, and an exit code for scripts."""
    done = ctl(deployment, "operations", "load_lora", "name=a", f"path={lora_dir / 'a'}")
    assert (done.returncode, done.stdout.count("done")) == (0, 2), done.stdout + done.stderr
    one = ctl(deployment, "operations", "drain", "--member", "aggregated-1", "timeout_s=1", "--json")
    assert one.returncode == 0
    assert [member["member"] for member in json.loads(one.stdout)["members"]] == ["aggregated-1"]
    status = ctl(deployment, "operations", "status")
    assert "state=serving" in status.stdout
    assert "state=draining" in status.stdout
    assert 'adapters=["a"]' in status.stdout
    refused = ctl(deployment, "operations", "scale_ep", "size=2", "--role", "aggregated")
    assert refused.returncode == 1
    assert refused.stdout.count("failed (501)") == 2
    assert "one size" in refused.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("operations", "dance"), "no operation 'dance'", id="operation"),
        pytest.param(("operations", "drain", "level"), "'level' is not key=value", id="argument"),
        pytest.param(("operation", "drain"), "did you mean 'operations'", id="deployment"),
        pytest.param(("operations", "drain", "--member", "decode-0"), "no worker 'decode-0'", id="member"),
    ],
)
def test_the_command_says_what_is_wrong(deployment: Deployment, words: tuple[str, ...], message: str) -> None:
    """On one line, without a traceback."""
    done = ctl(deployment, *words)

    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.engine
def test_engines_that_pass_their_cache_on_pause_and_do_not_sleep(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Asleep, the memory that others pull from would be gone; after everything else they answer as before."""
    folder = tmp_path_factory.mktemp("nixl")
    with deployed(folder, "+recipe=tiny_disagg", f"model.path=tiny:{tiny_model}", name="nixl") as running:
        greedy = {**CHAT, "temperature": 0}
        before = running.client.chat.completions.create(**greedy)  # type: ignore[call-overload]
        slept = ctl(running, "nixl", "sleep", "--json")
        assert slept.returncode == 1
        for member in json.loads(slept.stdout)["members"]:
            assert member["status"] == 501
            assert "does not register that memory again" in member["message"]
        for words in (["sleep", "level=0"], ["resume"], ["drain"], ["clear"], ["serve"]):
            done = ctl(running, "nixl", *words)
            assert done.returncode == 0, done.stdout + done.stderr
        after = running.client.chat.completions.create(**greedy)  # type: ignore[call-overload]

    assert after.choices == before.choices


def test_a_restarted_worker_has_its_adapters_again(deployment: Deployment, admin: httpx.Client, lora_dir: Path) -> None:
    """Those that it had, from the moment that it serves; one that is gone from the disk is left out."""
    (lora_dir / "fleeting").mkdir()
    for path in (lora_dir / "a").iterdir():
        shutil.copy(path, lora_dir / "fleeting")

    def do(operation: str, **given: str) -> None:
        admin.post(f"/admin/{operation}", json={"members": WORKERS[:1], **given}).raise_for_status()

    for name in ("b", "a"):
        do("load_lora", name=name, path=str(lora_dir / name))
    do("unload_lora", name="b")
    do("load_lora", name="fleeting", path=str(lora_dir / "fleeting"))
    shutil.rmtree(lora_dir / "fleeting")
    before = deployment.pids()[WORKERS[0]]
    os.kill(before, signal.SIGKILL)

    def adapters() -> list[str] | None:
        for worker in admin.get("/admin/members").json()["members"]:
            if worker["member"] == WORKERS[0] and deployment.pids()[WORKERS[0]] != before:
                found: list[str] | None = (worker.get("result") or {}).get("adapters")  # none while it starts
                return found
        return None

    asked = time.monotonic()
    while (found := adapters()) is None:
        assert time.monotonic() - asked < 30
        time.sleep(0.05)

    assert found == ["a"]
    assert deployment.client.completions.create(model="a", prompt="x", max_tokens=2).choices
