"""From a tree of sysfs to the devices and interfaces that a member's libraries are told of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.compose import read
from launch.errors import LaunchError
from launch.plan import plan
from launch.recipe import Cluster, Fabric
from slurm import commands, fabric
from slurm.fabric import Snapshot
from slurm.places import Place
from tests.slurm import machines

ADDRESSES = {
    "dgx_h100": {"lo": "127.0.0.1", **{f"ib{i}": f"10.1.{i}.1" for i in range(10)}, "eth0": "192.168.7.1"},
    "gh200": {"lo": "127.0.0.1", **{f"hsn{i}": f"10.150.{i}.7" for i in range(4)}},
    "mi250x": {"lo": "127.0.0.1", **{f"hsn{i}": f"10.129.{i}.7" for i in range(4)}},
    "laptop": {"lo": "127.0.0.1", "wlan0": "192.168.178.20"},
}


def snapshot(machine: str, folder: Path) -> Snapshot:
    """Of a machine with its usual addresses."""
    make: Callable[[Path], Path] = getattr(machines, machine)
    return fabric.read(ADDRESSES[machine], make(folder))


def cluster(name: str, *overrides: str) -> Cluster:
    """A shipped profile."""
    return read(["+recipe=tiny_agg", f"cluster={name}", *overrides]).recipe.cluster


@pytest.mark.parametrize(
    ("machine", "has"),
    [
        ("dgx_h100", {Fabric.IB, Fabric.ROCE, Fabric.ETHERNET}),
        ("gh200", {Fabric.CXI, Fabric.ETHERNET}),
        ("mi250x", {Fabric.CXI, Fabric.ETHERNET}),
        ("laptop", {Fabric.ETHERNET}),
    ],
)
def test_a_node_has_the_fabrics_that_it_has_a_living_port_of(machine: str, has: set[Fabric], tmp_path: Path) -> None:
    """A laptop has no RDMA, a Slingshot node no InfiniBand."""
    assert snapshot(machine, tmp_path).has == has | {Fabric.ANY}


@pytest.mark.parametrize(
    ("slots", "devices"),
    [
        pytest.param([0], "mlx5_0:1", id="one GPU"),
        pytest.param([2, 3], "mlx5_4:1,mlx5_5:1", id="two"),
        pytest.param([7], "mlx5_11:1", id="mlx5_11, which sorts after mlx5_9"),
        pytest.param(
            list(range(8)), "mlx5_0:1,mlx5_3:1,mlx5_4:1,mlx5_5:1,mlx5_6:1,mlx5_9:1,mlx5_10:1,mlx5_11:1", id="all"
        ),
    ],
)
def test_each_gpu_is_paired_with_the_port_behind_its_own_switch(slots: list[int], devices: str, tmp_path: Path) -> None:
    """Never with one that is down, on Ethernet, or for storage."""
    seen = snapshot("dgx_h100", tmp_path)
    buses = [seen.gpus[slot].bus for slot in slots]

    env = fabric.environment(seen, cluster("generic_ib"), "10.1.0.1", buses)

    assert env == {
        "NCCL_SOCKET_IFNAME": "=ib0",
        "GLOO_SOCKET_IFNAME": "ib0",
        "UCX_NET_DEVICES": devices,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


def test_without_gpus_all_ports_of_the_fabric_are_used(tmp_path: Path) -> None:
    """The CPU engine moves KV cache over InfiniBand as well."""
    env = fabric.environment(snapshot("dgx_h100", tmp_path), cluster("generic_ib"), "10.1.0.1", [])

    assert env["UCX_NET_DEVICES"].count("mlx5_") == 8
    assert "CUDA_DEVICE_ORDER" not in env


def test_where_roce_is_promised_only_ethernet_ports_are_used(tmp_path: Path) -> None:
    """The same machine under another profile."""
    seen = snapshot("dgx_h100", tmp_path)

    assert fabric.devices_of(seen, [], Fabric.ROCE) == ("mlx5_1:1",)


def test_on_another_root_complex_the_numa_node_decides(tmp_path: Path) -> None:
    """A Grace Hopper node's NIC shares nothing but the NUMA node with its GPU."""
    seen = snapshot("gh200", tmp_path)
    ports = [
        fabric.Port(device=f"mlx5_{i}", port=1, active=True, layer="InfiniBand", gbit_per_s=200, numa=i, path=f"pci{i + 4:04x}:00/x{i}")
        for i in range(4)
    ]  # fmt: skip

    assert [fabric.nearest(gpu, ports)[0].device for gpu in seen.gpus] == ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"]


@pytest.mark.parametrize("machine", ["gh200", "mi250x"])
def test_slingshot_gets_no_ucx_devices(machine: str, tmp_path: Path) -> None:
    """UCX has no transport for it: NIXL's libfabric backend finds its own."""
    seen = snapshot(machine, tmp_path)

    env = fabric.environment(seen, cluster("generic_slingshot"), ADDRESSES[machine]["hsn0"], [seen.gpus[0].bus])

    assert env["GLOO_SOCKET_IFNAME"] == "hsn0"
    assert "UCX_NET_DEVICES" not in env


def test_what_a_profile_says_itself_is_left_alone(tmp_path: Path) -> None:
    """Isambard's own interface names."""
    env = fabric.environment(snapshot("gh200", tmp_path), cluster("isambard_ai"), "10.150.0.7", [])

    assert "NCCL_SOCKET_IFNAME" not in env


def test_a_laptop_moves_blocks_over_its_one_interface(tmp_path: Path) -> None:
    """And on loopback nothing is set: shared memory is not a network device."""
    seen = snapshot("laptop", tmp_path)

    assert fabric.environment(seen, cluster("slurm_cpu"), "192.168.178.20", [])["UCX_NET_DEVICES"] == "wlan0"
    assert fabric.environment(seen, cluster("local"), "127.0.0.1", []) == {}


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        pytest.param(["cluster.interface=ib"], "ib0", id="first of a prefix"),
        pytest.param(["cluster.interface=null", "cluster.subnet=192.168.0.0/16"], "eth0", id="by subnet"),
        pytest.param(["cluster.interface=ib", "cluster.subnet=10.1.3.0/24"], "ib3", id="both"),
    ],
)
def test_the_address_is_found_by_prefix_and_subnet(overrides: list[str], name: str, tmp_path: Path) -> None:
    """Interfaces that are up come first."""
    found = fabric.address(snapshot("dgx_h100", tmp_path), cluster("generic_ib", *overrides))

    assert found.name == name


def test_an_interface_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    """With their addresses."""
    with pytest.raises(
        LaunchError, match=r"no interface hsn0\*.*in 10.0.0.0/8.*ib0 \(10.1.0.1\).*correct cluster.subnet"
    ):
        fabric.address(snapshot("dgx_h100", tmp_path), cluster("perlmutter", "cluster.subnet=10.0.0.0/8"))


def test_the_recipes_own_environment_wins_over_what_was_found() -> None:
    """A user who names a device means it."""
    recipe = read(["+recipe=tiny_agg", "engine.env.UCX_NET_DEVICES=mlx5_7:1"]).recipe
    (member,) = plan(recipe).members
    found = {"UCX_NET_DEVICES": "mlx5_0:1", "GLOO_SOCKET_IFNAME": "ib0"}

    env = commands.engine(recipe, member, Path("/runs/x"), Place("10.0.0.1", 20000), None, found).env

    assert (env["UCX_NET_DEVICES"], env["GLOO_SOCKET_IFNAME"]) == ("mlx5_7:1", "ib0")


def test_this_machine_can_be_read() -> None:
    """Whatever it is: loopback is up."""
    seen = fabric.read({"lo": "127.0.0.1"})

    assert any(item.name == "lo" and item.up for item in seen.interfaces)
