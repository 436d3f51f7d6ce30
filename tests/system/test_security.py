"""What a stranger on the same machine or fabric gets: nothing, at every port that a deployment opens."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from launch.plan import ETCD_PORT, NATS_PORT, SHARED_PORT, plan
from launch.records import Control
from slurm.children import group_members
from tests.deployments import Deployment, processes_of, targets
from tests.system.test_lifecycle import operator, until
from workers.control.servers import host_and_port
from workers.runtime.trust import control_tls

NOBODY = 65534
LISTENING = "0A"


@pytest.fixture(scope="module")
def control(echo: Deployment) -> Control:
    """The deployment's own addresses and secrets."""
    found = echo.run.control()
    assert found
    return found


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """Addresses and ports at which these processes listen (proc(5): net/tcp)."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
            except FileNotFoundError:
                continue
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == LISTENING and fields[9] in sockets:
            address, _, port = fields[1].partition(":")
            found.add((socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(port, 16)))
    assert not [line for line in Path("/proc/net/tcp6").read_text().splitlines() if line.split()[9] in sockets]
    return found


def own_ports(running: Deployment) -> dict[int, str]:
    """Every port that the plan knows of, and what is there."""
    ranks = running.run.ranks(1)
    base = ranks[0].port_base
    found = {base + NATS_PORT: "nats", base + ETCD_PORT: "etcd", base + SHARED_PORT: "frontend"}
    for member in plan(running.run.recipe()).members:
        found[ranks[member.rank].port_base + member.ports.requests] = "requests"
        found[ranks[member.rank].port_base + member.ports.metrics] = "page"
    return found


def as_stranger(code: str, *arguments: str) -> str:
    """What a program prints that knows addresses only, and runs as another user where we may do that.

    It takes the system's Python where there is one: ours may be in a folder that only we can enter.
    """
    user = NOBODY if os.geteuid() == 0 else None
    command = [shutil.which("python3", path="/usr/bin") or sys.executable, "-I", "-c", code, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, user=user, group=user, cwd="/", check=True
    )
    return done.stdout


def test_only_the_ports_of_the_plan_are_open_and_only_at_the_chosen_address(echo: Deployment) -> None:
    """No port that nobody thought of, and none at another interface."""
    pids = {pid for leader in processes_of(echo.run) for pid in (leader, *group_members(leader))}
    found = listening(pids)
    address = echo.run.ranks(1)[0].address

    assert {port for _, port in found} == set(own_ports(echo))
    assert {at for at, _ in found} == {address}


HTTP_CODE = """
import ssl, sys, urllib.error, urllib.request
tls = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), tls)
for number in range(1, len(sys.argv), 2):
    method, url = sys.argv[number:number + 2]
    data = b'{"model": "tiny", "prompt": "a", "messages": [], "key": "AA==", "range_end": "AA=="}' if method == "POST" else None
    try:
        print(opener.open(urllib.request.Request(url, data, method=method), timeout=5).status)
    except urllib.error.HTTPError as error:
        print(error.code)
    except OSError:
        print(0)
"""


def statuses(asked: list[tuple[str, str]]) -> list[int]:
    """The status of each request of a stranger; 0 where nobody answers in HTTP."""
    return [int(line) for line in as_stranger(HTTP_CODE, *(part for pair in asked for part in pair)).split()]


def test_http_asks_every_stranger_for_a_key(echo: Deployment) -> None:
    """The model, its list, operations and metrics; of the rest only whether it lives."""
    base = echo.endpoint.url.removesuffix("/v1")
    posts = (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/admin/drain",
        "/v1/load_lora_adapter",
        "/sleep",
    )
    gets = ("/v1/models", "/metrics", "/admin/members")
    asked = [*(("POST", base + path) for path in posts), *(("GET", base + path) for path in gets)]
    asked += [("GET", f"http://{item['targets'][0]}/metrics") for item in targets(echo.run)]

    assert statuses(asked) == [401] * len(asked)
    assert statuses([("GET", base + path) for path in ("/health", "/live")]) == [200, 200]


def test_etcd_answers_nobody_without_the_deployments_certificate(control: Control) -> None:
    """Not even what etcd's passwords would leave open: alarms that make it read-only, leases, its own command line."""
    posts = ("kv/range", "kv/put", "lease/grant", "maintenance/alarm", "maintenance/status", "cluster/member/list")
    asked = [*(("POST", f"{control.etcd_url}/v3/{path}") for path in posts)]
    asked += [("GET", control.etcd_url + path) for path in ("/version", "/metrics", "/debug/vars")]
    tls = ssl.create_default_context(cadata=control.authority)
    tls.load_cert_chain(control.client_file)

    assert statuses([*asked, *((method, url.replace("https", "http")) for method, url in asked)]) == [0] * 2 * len(
        asked
    )
    assert httpx.get(f"{control.etcd_url}/version", verify=tls).status_code == 200
    assert httpx.post(f"{control.etcd_url}/v3/kv/range", json={"key": "AA=="}, verify=tls).status_code == 400


NATS_WORDS = b'CONNECT {"verbose":true}\r\nSUB > 1\r\nPING\r\n'
NATS_CODE = f"""
import socket, sys
host, port = sys.argv[1:3]
said = b""
with socket.create_connection((host, int(port)), timeout=5) as connection:
    try:
        connection.sendall({NATS_WORDS!r})
        while part := connection.recv(4096):
            said += part
    except ConnectionError:
        pass
print(said.decode())
"""


def test_nats_answers_nobody_without_the_deployments_certificate(control: Control) -> None:
    """Not even with its version and address, which it tells first where it speaks in plain text."""
    host, port = host_and_port(control.nats_url)
    tls = ssl.create_default_context(cadata=control.authority)
    with (
        socket.create_connection((host, port), 5) as plain,
        tls.wrap_socket(plain, server_hostname=host) as connection,
        pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
    ):
        connection.recv(4096)

    assert as_stranger(NATS_CODE, host, str(port)).strip() == ""


def test_nats_asks_for_a_password_too(control: Control) -> None:
    """And ends the connection of who has the certificate alone."""
    host, port = host_and_port(control.nats_url)
    with (
        socket.create_connection((host, port), 5) as plain,
        control_tls(control).wrap_socket(plain, server_hostname=host) as connection,
    ):
        connection.sendall(NATS_WORDS)
        said = b"".join(iter(lambda: connection.recv(4096), b"")).decode()

    assert "Authorization Violation" in said
    assert "+OK" not in said
    assert "PONG" not in said


ZMQ_CODE = """
import socket, sys
for port in sys.argv[2:]:
    with socket.create_connection((sys.argv[1], int(port)), timeout=5) as connection:
        connection.settimeout(1)
        # A greeting of ZMTP 3.0 with the mechanism NULL, which proves nothing of who we are.
        connection.sendall(b"\\xff" + bytes(8) + b"\\x7f\\x03\\x00" + b"NULL".ljust(20, b"\\0") + bytes(32))
        said = b""
        try:
            while part := connection.recv(4096):
                said += part
            print("closed", len(said))
        except TimeoutError:
            print("open", len(said))
"""


def test_workers_drop_whoever_comes_without_a_key(echo: Deployment) -> None:
    """Their greeting says that they want CURVE, and that is all they say; strangers with keys are in test_request_plane."""
    ports = [str(port) for port, what in own_ports(echo).items() if what == "requests"]
    said = as_stranger(ZMQ_CODE, echo.run.ranks(1)[0].address, *ports).splitlines()

    assert ports
    assert all(line.startswith("closed") and int(line.split()[1]) <= 64 for line in said), said


def test_no_secret_is_on_a_command_line_in_an_environment_or_in_a_log(echo: Deployment, control: Control) -> None:
    """Where `ps` or a colleague who helps with a log would see it."""
    httpx.get(f"{echo.endpoint.url}/models", headers={"Authorization": f"Bearer {echo.run.api_key()}x"})
    secrets = {
        echo.run.api_key(),
        echo.run.admin_key(),
        control.nats_password,
        control.etcd_password,
        control.worker_secret,
        control.frontend_secret,
        Path(control.client_file).read_text().splitlines()[-3],
    }
    shown = {}
    for pid in processes_of(echo.run):
        for name in ("cmdline", "environ"):
            shown[f"{name} of {pid}"] = Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    for path in (*echo.run.logs(1).iterdir(), echo.output_file):
        shown[str(path)] = path.read_bytes().decode(errors="replace")

    assert len(shown) > 10
    assert [where for where, text in shown.items() if any(secret in text for secret in secrets)] == []


def test_nobody_else_may_look_into_the_run_directory(echo: Deployment) -> None:
    """Itself 0700, what holds a secret 0600, and nothing in it is for others, sockets of servers included."""
    inside = [path for path in echo.run.path.rglob("*") if not path.is_symlink()]
    open_to_others = [path for path in inside if stat.S_IMODE(path.stat().st_mode) & 0o077 and "control" in path.parts]

    assert stat.S_IMODE(echo.run.path.stat().st_mode) == 0o700
    assert open_to_others == []
    for name in ("api_key", "admin_key", "control.json", "endpoint.json", "recipe.yaml", "control/nats/nats.conf"):
        assert stat.S_IMODE((echo.run.path / name).stat().st_mode) == 0o600, name


@pytest.fixture
def guest(echo: Deployment) -> Iterator[str]:
    """A key that was given out while the deployment serves."""
    runs = echo.run.path.parent.parent
    key = operator(runs, "keys", "echo", "add", "guest").stdout.strip()
    yield key
    operator(runs, "keys", "echo", "revoke", "guest")


def test_keys_are_given_out_and_taken_back_while_the_deployment_serves(echo: Deployment, guest: str) -> None:
    """Within seconds, without a restart; a user's key is none of an operator's."""
    base = echo.endpoint.url.removesuffix("/v1")

    def status(path: str) -> int:
        return httpx.get(base + path, headers={"Authorization": f"Bearer {guest}"}).status_code

    until(lambda: status("/v1/models") == 200, 5)
    as_operator = status("/admin/members")
    kept = json.loads(echo.run.keys_file.read_text())
    revoked = operator(echo.run.path.parent.parent, "keys", "echo", "revoke", "guest")
    until(lambda: status("/v1/models") == 401, 5)

    assert as_operator == 403
    assert revoked.stdout == "guest is revoked\n"
    assert guest not in json.dumps(kept)
    assert stat.S_IMODE(echo.run.keys_file.stat().st_mode) == 0o600
    assert echo.http.get(f"{echo.endpoint.url}/models").status_code == 200
