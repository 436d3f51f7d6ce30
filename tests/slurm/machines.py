"""Trees of sysfs for kinds of machines, as far as Baton reads them.

Made from the published layouts of these machines, not copied from running ones; what matters is who hangs where in the
PCI tree, which ports are alive, and how devices are named.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """A PCI device: its path below /sys/devices, and what classes it is seen in."""

    path: str
    numa: int
    vendor: str = "0x15b3"
    kind: str = "0x020700"
    rdma: str | None = None
    layer: str = "InfiniBand"
    state: str = "4: ACTIVE"
    rate: str = "400 Gb/sec (4X NDR)"
    net: str | None = None
    up: bool = True
    cxi: str | None = None


def gpu(path: str, numa: int, vendor: str = "0x10de") -> Device:
    """A GPU."""
    return Device(path, numa, vendor, "0x030200" if vendor == "0x10de" else "0x038000")


def build(root: Path, devices: list[Device], modules: tuple[str, ...] = ()) -> Path:
    """Write the tree; returns the root."""
    for folder in ("class/net", "bus/pci/devices", "module"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for device in devices:
        here = root / "devices" / device.path
        here.mkdir(parents=True)
        (here / "vendor").write_text(f"{device.vendor}\n")
        (here / "class").write_text(f"{device.kind}\n")
        (here / "numa_node").write_text(f"{device.numa}\n")
        (root / "bus/pci/devices" / here.name).symlink_to(here)
        if device.rdma:
            port = here / "infiniband" / device.rdma / "ports/1"
            port.mkdir(parents=True)
            (port / "state").write_text(f"{device.state}\n")
            (port / "link_layer").write_text(f"{device.layer}\n")
            (port / "rate").write_text(f"{device.rate}\n")
            _in_class(root, "infiniband", here, device.rdma)
        if device.net:
            (here / "net" / device.net).mkdir(parents=True)
            (here / "net" / device.net / "operstate").write_text("up\n" if device.up else "down\n")
            _in_class(root, "net", here, device.net)
        if device.cxi:
            (here / "cxi" / device.cxi).mkdir(parents=True)
            _in_class(root, "cxi", here, device.cxi)
    lo = root / "devices/virtual/net/lo"
    lo.mkdir(parents=True)
    (lo / "operstate").write_text("unknown\n")
    (root / "class/net/lo").symlink_to(lo)
    for module in modules:
        (root / "module" / module).mkdir()
    return root


def _in_class(root: Path, kind: str, device: Path, name: str) -> None:
    (root / "class" / kind).mkdir(exist_ok=True)
    (device / kind / name / "device").symlink_to(device)
    (root / "class" / kind / name).symlink_to(device / kind / name)


def dgx_h100(root: Path) -> Path:
    """8 GPUs, each behind a switch with a ConnectX-7 for compute; two more ports for storage (one on Ethernet), one down."""
    devices = []
    for index in range(8):
        numa, switch = index // 4, f"pci0000:{index:02x}/0000:{index:02x}:01.0"
        bus = f"{index * 0x10 + 0x1B:02x}"
        devices.append(gpu(f"{switch}/0000:{bus}:00.0", numa))
        # Named by firmware, not in the order of the GPUs.
        name = ("mlx5_0", "mlx5_3", "mlx5_4", "mlx5_5", "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11")[index]
        nic = f"{index * 0x10 + 0x18:02x}"
        devices.append(Device(f"{switch}/0000:{nic}:00.0", numa, rdma=name, net=f"ib{index}"))
    devices += [
        Device("pci0000:80/0000:80:02.0/0000:81:00.0", 0, rdma="mlx5_1", layer="Ethernet", rate="200 Gb/sec", net="eth0"),
        Device("pci0000:90/0000:90:02.0/0000:91:00.0", 1, rdma="mlx5_2", state="1: DOWN", rate="10 Gb/sec", net="ib8", up=False),
        Device("pci0000:a0/0000:a0:02.0/0000:a1:00.0", 1, rdma="mlx5_7", rate="100 Gb/sec (4X EDR)", net="ib9"),
    ]  # fmt: skip
    return build(root, devices, ("nvidia_peermem",))


def gh200(root: Path) -> Path:
    """4 superchips of one Grace and one Hopper each, every one with a Cassini NIC of its own on another root complex."""
    devices = []
    for index in range(4):
        devices.append(gpu(f"pci{index:04x}:00/{index:04x}:00:00.0/{index:04x}:01:00.0", index))
        nic = f"pci{index + 4:04x}:00/{index + 4:04x}:00:00.0/{index + 4:04x}:01:00.0"
        devices.append(Device(nic, index, "0x17db", "0x020000", net=f"hsn{index}", cxi=f"cxi{index}"))
    return build(root, devices)


def mi250x(root: Path) -> Path:
    """8 GPUs on 4 packages, 4 Cassini NICs, one behind every second GPU's switch."""
    devices = []
    for index in range(8):
        switch = f"pci0000:{index // 2 * 2:02x}/0000:{index // 2 * 2:02x}:01.1"
        devices.append(gpu(f"{switch}/0000:{0xC1 + index:02x}:00.0", index // 2, "0x1002"))
        if index % 2:
            nic = f"{switch}/0000:{0x50 + index:02x}:00.0"
            devices.append(
                Device(nic, index // 2, "0x17db", "0x020000", net=f"hsn{index // 2}", cxi=f"cxi{index // 2}")
            )
    return build(root, devices)


def laptop(root: Path) -> Path:
    """A graphics card and a wireless interface."""
    devices = [
        gpu("pci0000:00/0000:00:02.0", -1, "0x8086"),
        Device("pci0000:00/0000:00:14.3", -1, "0x8086", "0x028000", net="wlan0"),
    ]
    return build(root, devices)
