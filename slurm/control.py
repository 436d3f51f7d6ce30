"""The control plane of an attempt: what rank 0 decides once it knows where the ranks that may lead are, and their servers.

Rank 0 draws the secrets and signs the certificates, and leaves both to the other two in `control/seed.json` (0600); the
authority's key is nowhere kept. `control.json` appears when the servers answer.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import msgspec
import zmq

from launch.plan import ETCD_PEER_PORT, ETCD_PORT, NATS_PORT, NATS_ROUTE_PORT
from launch.recipe import Recipe
from launch.records import Control, RankRecord, RunDirectory, read_bytes, write
from launch.standby import on_rank
from workers.control import servers
from workers.control.certificates import Certificates, issue


class Seed(msgspec.Struct, kw_only=True):
    """What the ranks that run servers start them from."""

    control: Control
    certificates: Certificates


def sow(run: RunDirectory, records: Sequence[RankRecord]) -> Seed:
    """Decide on addresses and secrets, and tell them to the other ranks with servers; the first record is rank 0's."""
    certificates = issue(*(record.address for record in records))
    client_file = servers.client_file(certificates, run.path / "control")
    seed = Seed(control=_control(records, certificates, str(client_file)), certificates=certificates)
    if len(records) > 1:
        write(run.path / "control" / "seed.json", msgspec.json.encode(seed), mode=0o600)
    return seed


def reap(run: RunDirectory, attempt: int) -> Seed | None:
    """What rank 0 decided for this attempt, once it has."""
    content = read_bytes(run.path / "control" / "seed.json")
    seed = msgspec.json.decode(content, type=Seed) if content else None
    return seed if seed and seed.control.attempt == attempt else None


def of_rank(run: RunDirectory, recipe: Recipe, seed: Seed, rank: int) -> tuple[servers.Server, servers.Server]:
    """NATS and etcd of a rank; writes their configuration."""
    folder, control = run.path / "control", seed.control
    nats = servers.nats(
        control,
        seed.certificates,
        servers.find_nats(recipe.control.nats_server),
        folder / on_rank("nats", rank),
        rank,
    )
    etcd = servers.etcd(
        control,
        seed.certificates,
        servers.find_etcd(recipe.control.etcd),
        folder / on_rank(f"etcd-{control.attempt}", rank),
        rank,
    )
    return nats, etcd


def _control(records: Sequence[RankRecord], certificates: Certificates, client_file: str) -> Control:
    worker, frontend = ([key.decode() for key in zmq.curve_keypair()] for _ in range(2))

    def urls(scheme: str, port: int) -> list[str]:
        return [f"{scheme}://{record.address}:{record.port_base + port}" for record in records]

    several = len(records) > 1
    return Control(
        attempt=records[0].attempt,
        nats_urls=urls("nats", NATS_PORT),
        nats_user="baton",
        nats_password=secrets.token_urlsafe(24),
        etcd_urls=urls("https", ETCD_PORT),
        etcd_user="root",
        etcd_password=secrets.token_urlsafe(24),
        worker_public=worker[0],
        worker_secret=worker[1],
        frontend_public=frontend[0],
        frontend_secret=frontend[1],
        authority=certificates.authority,
        client_file=client_file,
        nats_routes=urls("nats", NATS_ROUTE_PORT) if several else [],
        nats_route_password=secrets.token_urlsafe(24) if several else "",
        etcd_peers=urls("https", ETCD_PEER_PORT) if several else [],
    )
