"""The plan: which member of which engine runs on which rank, on which GPUs, behind which ports.

A pure function of the recipe, so that every rank computes it and takes its own part; nothing is negotiated that can be
computed. Ports are offsets into the port block that each rank claims when it starts (`slurm.ports`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.errors import PlanError
from launch.recipe import Cluster, Kind, Recipe, Role

# One table of port offsets for a rank's block; offset 0 guards the block (slurm.ports).
PORT_BLOCK = 128
NATS_PORT = 1
ETCD_PORT = 2
ETCD_PEER_PORT = 3
FRONTEND_PORT = 8
FRONTEND_PORTS = 8
MEMBER_PORT = 16
PORTS_PER_MEMBER = 8
MEMBERS_PER_RANK = (PORT_BLOCK - MEMBER_PORT) // PORTS_PER_MEMBER


@dataclass(frozen=True, slots=True)
class MemberPorts:
    """Offsets of a member's ports in the block of its rank."""

    first: int

    @property
    def requests(self) -> int:
        """ZMQ request plane; leaders only."""
        return self.first

    @property
    def metrics(self) -> int:
        """Prometheus page of the member."""
        return self.first + 1

    @property
    def rendezvous(self) -> int:
        """torch.distributed rendezvous of an engine that spans nodes; leaders only."""
        return self.first + 2

    @property
    def side_channel(self) -> int:
        """NIXL handshakes; one port for each data-parallel rank from here on."""
        return self.first + 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """The process of one engine on one node; node 0 of an engine is its leader."""

    engine: str
    kind: Kind
    replica: int
    node: int
    nodes: int
    rank: int
    slots: tuple[int, ...]
    ports: MemberPorts

    @property
    def name(self) -> str:
        """`decode-0`, or `decode-0.1` for the second node of an engine that spans several."""
        return self.engine if self.nodes == 1 else f"{self.engine}.{self.node}"

    @property
    def leader(self) -> bool:
        """Whether this member talks to the frontends for its engine."""
        return self.node == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where everything runs; `ranks` is the number of nodes of the job."""

    ranks: int
    slots_per_node: int
    members: tuple[Member, ...]
    frontends: tuple[str, ...]

    def on(self, rank: int) -> tuple[Member, ...]:
        """The members of one rank, in the order of their slots."""
        return tuple(member for member in self.members if member.rank == rank)

    def member(self, name: str) -> Member:
        """The member of that name.

        Raises:
            PlanError: The plan has no such member.
        """
        for member in self.members:
            if member.name == name:
                return member
        raise PlanError(f"no member {name!r} in the plan: {', '.join(m.name for m in self.members)}")

    def leader_of(self, engine: str) -> Member:
        """The member that speaks for an engine."""
        return next(m for m in self.members if m.engine == engine and m.leader)


def plan(recipe: Recipe) -> Plan:
    """Give every member its place, on as few nodes as first fit in the order of `recipe.roles` needs.

    An engine that fits a node shares it with others; one that does not takes the same number of slots on each of the
    fewest consecutive nodes that its processes divide by. With `control.dedicated`, rank 0 runs no engine.

    Raises:
        PlanError: An engine cannot be placed on this cluster at all.
    """
    per_node = slots_per_node(recipe)
    first_rank = 1 if recipe.control.dedicated else 0
    used: list[int] = [0] * first_rank
    counts: list[int] = [0] * first_rank
    members: list[Member] = []
    for role in recipe.roles:
        nodes, slots = shape(role, recipe, per_node)
        for replica in range(role.replicas):
            rank = _first_fit(used, counts, first_rank, nodes, slots, per_node)
            for node in range(nodes):
                while len(used) <= rank + node:
                    used.append(0)
                    counts.append(0)
                here = rank + node
                members.append(
                    Member(
                        engine=f"{role.kind}-{replica}",
                        kind=role.kind,
                        replica=replica,
                        node=node,
                        nodes=nodes,
                        rank=here,
                        slots=tuple(range(used[here], used[here] + slots)),
                        ports=MemberPorts(MEMBER_PORT + counts[here] * PORTS_PER_MEMBER),
                    )
                )
                used[here] += slots
                counts[here] += 1
    frontends = tuple(f"frontend-{i}" for i in range(recipe.frontend.processes))
    return Plan(ranks=len(used), slots_per_node=per_node, members=tuple(members), frontends=frontends)


def slots_per_node(recipe: Recipe) -> int:
    """Slots of one node: its GPUs, or the engines that share a machine without any.

    Raises:
        PlanError: The engines want GPUs and the cluster has none.
    """
    if recipe.engine.device == "cpu":
        return recipe.cluster.cpu_engines_per_node
    if recipe.cluster.gpus_per_node < 1:
        raise PlanError(
            f"the recipe needs GPUs but cluster {recipe.cluster.name!r} has none: choose a cluster with "
            f"cluster=<name>, or say how many GPUs a node has with cluster.gpus_per_node=8"
        )
    return recipe.cluster.gpus_per_node


def shape(role: Role, recipe: Recipe, per_node: int) -> tuple[int, int]:
    """How many nodes an engine of the role takes, and how many slots on each of them.

    Raises:
        PlanError: Its processes cannot be spread evenly.
    """
    if recipe.engine.device == "cpu":
        return 1, 1
    if role.world <= per_node:
        return 1, role.world
    for nodes in range(2, role.world + 1):
        if role.world % nodes == 0 and role.world // nodes <= per_node:
            break
    local = role.world // nodes
    if local == 1 and per_node > 1:
        raise PlanError(
            f"roles.{role.kind}: tensor_parallel * pipeline_parallel = {role.world} does not divide over nodes of "
            f"{per_node} GPUs ({recipe.cluster.name}): choose a multiple of {per_node}, or a size up to {per_node}"
        )
    return nodes, local


def check_hosts(plan: Plan, hosts: Sequence[str], cluster: Cluster) -> None:
    """Refuse an allocation of another size than the plan's.

    Raises:
        PlanError: Names the number to ask for.
    """
    if len(hosts) != plan.ranks:
        raise PlanError(
            f"the deployment needs {plan.ranks} nodes of cluster {cluster.name!r} but the job has {len(hosts)} "
            f"({', '.join(hosts)}): submit with --nodes={plan.ranks}, or change the replicas of the recipe"
        )


def _first_fit(used: list[int], counts: list[int], first: int, nodes: int, slots: int, per_node: int) -> int:
    """The lowest rank from which `nodes` consecutive ranks have `slots` free each; ranks past the end are empty."""
    rank = first
    while True:
        window = range(rank, min(rank + nodes, len(used)))
        if all(used[r] + slots <= per_node and counts[r] < MEMBERS_PER_RANK for r in window):
            return rank
        rank += 1
