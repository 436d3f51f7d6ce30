"""This node: which of its addresses the other ranks can reach, and which GPUs are ours."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from launch.errors import LaunchError

SIOCGIFADDR = 0x8915
# submitit's local executor overwrites CUDA_VISIBLE_DEVICES; what it was before travels under this name.
VISIBLE_DEVICES = "BATON_VISIBLE_DEVICES"


def address(suffix: str = "") -> str:
    """The IPv4 address that this node's own name resolves to; some sites name the fabric's address by a suffix.

    Raises:
        LaunchError: The name does not resolve, or to loopback only. There is no last resort: an address that others cannot
            reach fails later and elsewhere.
    """
    short, dot, domain = socket.gethostname().partition(".")
    host = f"{short}{suffix}{dot}{domain}" if suffix else socket.gethostname()
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError as error:
        raise LaunchError(f"{host} cannot resolve its own name ({error}): set cluster.interface=<name>") from error
    routable = sorted(item for item in found if not item.startswith("127."))
    if not routable:
        raise LaunchError(
            f"{host} resolves to loopback only: set cluster.interface to one of {', '.join(interfaces())}"
        )
    return routable[0]


def refuse_loopback(here: tuple[str, str], there: tuple[str, str]) -> None:
    """Refuse loopback addresses between two nodes, each given as its name and the address that it gives to others.

    Raises:
        LaunchError: The nodes are different ones, and one of the addresses leads back to whoever uses it.
    """
    if here[0] == there[0]:
        return
    for host, given in (here, there):
        if ipaddress.ip_address(given).is_loopback:
            raise LaunchError(
                f"{host} gives the address {given}, which no other node can reach: set cluster.interface to the fabric's "
                f"interface (here: {', '.join(name for name in interfaces() if name != 'lo') or 'none found'})"
            )


def interfaces() -> dict[str, str]:
    """This node's interfaces that have an IPv4 address, by name."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:
                continue  # the interface is down or has no IPv4 address
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def devices_here() -> tuple[str, ...]:
    """NVIDIA GPUs of this machine that we may use: what CUDA_VISIBLE_DEVICES names, or else all, by their device files.

    For the agents of submitit's local executor that is what it was when they were submitted.
    """
    given = os.environ.get(VISIBLE_DEVICES) or os.environ.get("CUDA_VISIBLE_DEVICES")
    if given:
        return tuple(given.split(","))
    found = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    return tuple(str(number) for number in range(len(found)))


def node_devices(devices: Sequence[str], rank: int, slots_per_node: int) -> tuple[str, ...]:
    """The GPUs of a rank where one machine plays all nodes: `slots_per_node` consecutive ones, as far as there are."""
    return tuple(devices[rank * slots_per_node : (rank + 1) * slots_per_node])
