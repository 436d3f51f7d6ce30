"""The fabric of a node: which network ports are alive, which is nearest to which GPU, and what that means for UCX, NCCL and
Gloo. Deciding is pure, over a snapshot of sysfs; `read` takes the snapshot.

Devices are named by what was found on this very node, and never by a pattern or by `all`: names differ between nodes, and
one dead or Ethernet port in a list ends NIXL.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.errors import LaunchError
from launch.recipe import Cluster, Fabric
from slurm import hosts

GPU_VENDORS = {"0x10de": "nvidia", "0x1002": "amd"}
GPU_CLASSES = ("0x0302", "0x0300", "0x0380", "0x1200")
# RDMA links slower than this next to faster ones are for management or storage: KV cache does not go over them.
SLOW_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port of an RDMA device; `path` is where it hangs below /sys/devices, `numa` -1 where the machine does not say."""

    device: str
    port: int
    active: bool
    layer: str
    gbit_per_s: float
    numa: int
    path: str

    @property
    def name(self) -> str:
        """As UCX names it: `mlx5_0:1`."""
        return f"{self.device}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A network interface; `address` is its IPv4 address, if it has one."""

    name: str
    address: str | None
    up: bool
    numa: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU on the PCI bus, by its address there (`0000:1b:00.0`)."""

    bus: str
    vendor: str
    numa: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What sysfs says of a node; GPUs and ports in the order of the PCI bus, `cxi` the Slingshot devices."""

    ports: tuple[Port, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    cxi: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    modules: frozenset[str] = frozenset()

    @property
    def has(self) -> frozenset[Fabric]:
        """The fabrics that this node has a living port of."""
        found = {Fabric.ANY}
        if any(item.up and item.name != "lo" for item in self.interfaces):
            found.add(Fabric.ETHERNET)
        if any(port.active and port.layer == "InfiniBand" for port in self.ports):
            found.add(Fabric.IB)
        if any(port.active and port.layer == "Ethernet" for port in self.ports):
            found.add(Fabric.ROCE)
        if self.cxi and any(item.up and item.name.startswith("hsn") for item in self.interfaces):
            found.add(Fabric.CXI)
        return frozenset(found)


def read(addresses: Mapping[str, str], root: Path = Path("/sys")) -> Snapshot:
    """Take the snapshot; `addresses` are the IPv4 addresses of interfaces, which sysfs does not have."""
    return Snapshot(
        ports=tuple(port for device in _entries(root / "class/infiniband") for port in _ports(device, root)),
        interfaces=tuple(_interface(entry, addresses, root) for entry in _entries(root / "class/net")),
        cxi=tuple(entry.name for entry in _entries(root / "class/cxi")),
        gpus=tuple(gpu for entry in _entries(root / "bus/pci/devices") if (gpu := _gpu(entry, root))),
        modules=frozenset(entry.name for entry in _entries(root / "module")),
    )


def usable(snapshot: Snapshot, fabric: Fabric) -> tuple[Port, ...]:
    """The RDMA ports that KV cache may go over: alive, of the promised kind, and not much slower than the fastest of them.

    InfiniBand goes before RoCE where nothing is promised: the Ethernet ports of such a node are for storage and logins.
    """
    layers = {Fabric.IB: ("InfiniBand",), Fabric.ROCE: ("Ethernet",), Fabric.ANY: ("InfiniBand", "Ethernet")}
    for layer in layers.get(fabric, ()):
        alive = [port for port in snapshot.ports if port.active and port.layer == layer]
        if alive:
            fastest = max(port.gbit_per_s for port in alive)
            return tuple(port for port in alive if port.gbit_per_s >= SLOW_SHARE * fastest)
    return ()


def nearest(gpu: Gpu, ports: Sequence[Port]) -> tuple[Port, ...]:
    """The ports nearest to a GPU: those that share most of its way through the PCI tree, else its NUMA node, else all."""
    if not ports:
        return ()
    shared = [_shared(gpu.path, port.path) for port in ports]
    # The first part is the root complex, which says no more than the NUMA node does.
    if max(shared) > 1:
        return tuple(port for port, length in zip(ports, shared, strict=True) if length == max(shared))
    same = tuple(port for port in ports if port.numa == gpu.numa and gpu.numa >= 0)
    return same or tuple(ports)


def devices_of(snapshot: Snapshot, buses: Sequence[str], fabric: Fabric) -> tuple[str, ...]:
    """The ports for a member with the GPUs at these PCI addresses, as UCX names them; all usable ones for no GPUs."""
    ports = usable(snapshot, fabric)
    gpus = {gpu.bus: gpu for gpu in snapshot.gpus}
    known = [gpus[bus] for bus in buses if bus in gpus]
    chosen = {port.name for gpu in known for port in nearest(gpu, ports)} if known else {port.name for port in ports}
    return tuple(port.name for port in ports if port.name in chosen)


def address(snapshot: Snapshot, cluster: Cluster) -> Interface:
    """The interface whose address members give to each other: by the profile's prefix, within its subnet.

    Raises:
        LaunchError: No interface of that prefix has an address in that network.
    """
    found = [item for item in snapshot.interfaces if item.address and item.name.startswith(cluster.interface or "")]
    if cluster.interface is None:
        found = [item for item in found if item.name != "lo"]
    if cluster.subnet is not None:
        network = ipaddress.ip_network(cluster.subnet)
        found = [item for item in found if ipaddress.ip_address(str(item.address)) in network]
    found.sort(key=lambda item: (not item.up, _natural(item.name)))
    if found:
        return found[0]
    have = ", ".join(f"{item.name} ({item.address})" for item in snapshot.interfaces if item.address)
    where = f" in {cluster.subnet}" if cluster.subnet else ""
    raise LaunchError(
        f"no interface {cluster.interface or ''}* with an IPv4 address{where}: set cluster.interface to one of {have or 'none found'}"
        f"{', or correct cluster.subnet' if where else ''}"
    )


def own_address(snapshot: Snapshot, cluster: Cluster) -> str:
    """What this node gives to others, by the profile's interface or subnet, or else by its name.

    Raises:
        LaunchError: There is none.
    """
    if cluster.interface is None and cluster.subnet is None:
        return hosts.address(cluster.hostname_suffix)
    return str(address(snapshot, cluster).address)


def environment(snapshot: Snapshot, cluster: Cluster, own: str, buses: Sequence[str]) -> dict[str, str]:
    """What a member's libraries are told of the fabric; nothing where everything is on this machine.

    Args:
        snapshot: This node's.
        cluster: The profile; what its own `env` names is left alone.
        own: The address that this node gives to others.
        buses: PCI addresses of the member's GPUs, in the order of its slots.
    """
    interface = next((item for item in snapshot.interfaces if item.address == own), None)
    if interface is None or interface.name == "lo":
        return {}
    # NCCL takes a name for a prefix unless it is marked as exact; Gloo wants one exact name.
    env = {"NCCL_SOCKET_IFNAME": f"={interface.name}", "GLOO_SOCKET_IFNAME": interface.name}
    if "UCX" in cluster.nixl_backends:
        devices = devices_of(snapshot, buses, cluster.fabric)
        # Without RDMA UCX moves blocks over TCP, and only over the interface that the others reach us by.
        env["UCX_NET_DEVICES"] = ",".join(devices) or interface.name
    if buses:
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # so that slot i is the GPU that nvidia-smi lists at i
    return {name: value for name, value in env.items() if name not in cluster.env}


def _ports(device: Path, root: Path) -> list[Port]:
    path = _path(device / "device", root)
    return [
        Port(
            device=device.name,
            port=int(entry.name),
            active=_text(entry / "state").partition(":")[2].strip() == "ACTIVE",
            layer=_text(entry / "link_layer"),
            gbit_per_s=_number(_text(entry / "rate")),
            numa=int(_number(_text(device / "device/numa_node"), -1)),
            path=path,
        )
        for entry in _entries(device / "ports")
    ]


def _interface(entry: Path, addresses: Mapping[str, str], root: Path) -> Interface:
    state = _text(entry / "operstate")
    return Interface(
        name=entry.name,
        address=addresses.get(entry.name),
        up=state == "up" or (state == "unknown" and entry.name in addresses),  # lo and some drivers do not say
        numa=int(_number(_text(entry / "device/numa_node"), -1)),
        path=_path(entry / "device", root),
    )


def _gpu(entry: Path, root: Path) -> Gpu | None:
    vendor = GPU_VENDORS.get(_text(entry / "vendor"))
    if vendor is None or not _text(entry / "class").startswith(GPU_CLASSES):
        return None
    return Gpu(
        bus=entry.name, vendor=vendor, numa=int(_number(_text(entry / "numa_node"), -1)), path=_path(entry, root)
    )


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=lambda entry: _natural(entry.name))
    except OSError:
        return []  # the kernel has no such class


def _path(link: Path, root: Path) -> str:
    """Where a device hangs below `devices`, as `pci0000:00/0000:00:01.0/0000:01:00.0`; empty for virtual ones."""
    with contextlib.suppress(OSError, ValueError):
        return str(link.resolve(strict=True).relative_to((root / "devices").resolve()))
    return ""


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _number(text: str, default: float = 0.0) -> float:
    """The number that a text starts with: 400 of `400 Gb/sec (4X NDR)`."""
    match = re.match(r"-?\d+(\.\d+)?", text)
    return float(match[0]) if match else default


def _shared(first: str, second: str) -> int:
    """How many leading parts two paths have in common."""
    count = 0
    for left, right in zip(first.split("/"), second.split("/"), strict=False):
        if left != right or not left:
            break
        count += 1
    return count


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sorts mlx5_10 after mlx5_9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


def unless_told(variables: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Those that the user's own shell or the batch script's setup does not set; only `all` is never what anybody means."""
    return {name: value for name, value in variables.items() if environ.get(name) in (None, "all")}
