"""The plan: which member of which engine runs on which rank, on which GPUs, behind which ports.

A pure function of the recipe, so that every rank computes it and takes its own part; nothing is negotiated that can be
computed. Ports are offsets into the port block that each rank claims when it starts (`slurm.ports`).

A deployment that was extended while it ran is the recipe and its extensions (`launch.elastic`). Ranks and replicas of an
extension come after all earlier ones and never change: joining moves nobody, and no name is used twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from launch.errors import PlanError
from launch.recipe import Cluster, Executor, Kind, Recipe, Role, group_name

# One table of port offsets for a rank's block; offset 0 guards the block (slurm.ports).
PORT_BLOCK = 256
NATS_PORT = 1
ETCD_PORT = 2
NATS_ROUTE_PORT = 3
SHARED_PORT = 4
PREFLIGHT_PORT = 5
NIXL_PROBE_PORT = 6
ETCD_PEER_PORT = 7
FRONTEND_PORT = 8
WEIGHTS_PORT = 16
MEMBER_PORT = 17
RAY_PORTS = 8


class Ports(Protocol):
    """The port block of a running rank (`slurm.places.Place`)."""

    def port(self, offset: int) -> str:
        """A port of the block."""
        ...


@dataclass(frozen=True, slots=True)
class MemberPorts:
    """Offsets of a member's ports in the block of its rank; `ranks` of them each for what every data-parallel rank has."""

    first: int
    ranks: int = 1
    ray_ports: int = 0

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
        """torch.distributed rendezvous of an engine that spans nodes; node 0 only."""
        return self.first + 2

    @property
    def data_parallel(self) -> int:
        """Handshakes of data-parallel ranks on several nodes; node 0 only."""
        return self.first + 3

    @property
    def side_channel(self) -> int:
        """NIXL handshakes; one port for each data-parallel rank of the member from here on."""
        return self.first + 4

    @property
    def kv_events(self) -> int:
        """KV events; one port for each data-parallel rank of the member from here on."""
        return self.first + 4 + self.ranks

    @property
    def kv_replay(self) -> int:
        """KV events that were missed; one port for each data-parallel rank of the member from here on."""
        return self.first + 4 + 2 * self.ranks

    @property
    def ray(self) -> int:
        """Ray's servers on this node, where the engine runs on Ray."""
        return self.first + 4 + 3 * self.ranks

    @property
    def end(self) -> int:
        """The offset after the last."""
        return self.ray + self.ray_ports


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """The process of one engine on one node; `model` is the key of the model that it serves (`Role.model`).

    Node 0 of an engine is its leader: it serves for all of them. `by_data` engines spread their data-parallel ranks over
    the nodes: there each member serves the ranks from `dp_first` on, and all are leaders.
    """

    engine: str
    kind: Kind
    replica: int
    node: int
    nodes: int
    rank: int
    slots: tuple[int, ...]
    ports: MemberPorts
    by_data: bool = False
    dp_first: int = 0
    model: str = ""

    @property
    def name(self) -> str:
        """`decode-0`, or `decode-0.1` for the second node of an engine that spans several; `chat-decode-0` of the model `chat`."""
        return self.engine if self.nodes == 1 else f"{self.engine}.{self.node}"

    @property
    def group(self) -> str:
        """The role of its model that it belongs to (`Role.group`)."""
        return group_name(self.model, self.kind)

    @property
    def leader(self) -> bool:
        """Whether this member talks to the frontends, for its engine or for its data-parallel ranks."""
        return self.node == 0 or self.by_data


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What an extension adds of one role: `replicas` engines, the first of them number `first_replica`."""

    kind: Kind
    first_replica: int
    replicas: int
    model: str = ""

    @property
    def group(self) -> str:
        """The role of its model (`Role.group`)."""
        return group_name(self.model, self.kind)

    @property
    def engines(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(f"{self.group}-{self.first_replica + index}" for index in range(self.replicas))


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """Engines that join a live deployment with a job of their own, on ranks from `first_rank` on."""

    number: int
    first_rank: int
    parts: tuple[Part, ...]

    @property
    def engines(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(name for part in self.parts for name in part.engines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The ranks of an extension."""

    number: int
    first: int
    ranks: int

    def __contains__(self, rank: int) -> bool:
        return self.first <= rank < self.first + self.ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where everything runs; `ranks` is the number of nodes of the job, without those of the extensions in `joined`."""

    ranks: int
    slots_per_node: int
    members: tuple[Member, ...]
    frontends: tuple[str, ...]
    joined: tuple[Span, ...] = ()

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
        """Node 0 of an engine, where its other nodes find it."""
        return next(m for m in self.members if m.engine == engine and m.node == 0)

    def members_of(self, engine: str) -> tuple[Member, ...]:
        """All members of an engine, in the order of its nodes."""
        return tuple(m for m in self.members if m.engine == engine)

    def engines(self, group: str) -> tuple[str, ...]:
        """The engines of a role (`Role.group`), the oldest first."""
        members = sorted(self.members, key=lambda m: m.replica)
        return tuple(dict.fromkeys(m.engine for m in members if m.group == group))

    def span(self, rank: int) -> Span | None:
        """The extension that a rank came with; None for those of the job itself."""
        return next((span for span in self.joined if rank in span), None)

    def part(self, number: int) -> Plan:
        """An extension as the plan of its own job: as many ranks as that has, no frontends.

        Raises:
            PlanError: There is no extension of that number.
        """
        for span in self.joined:
            if span.number == number:
                members = tuple(m for m in self.members if m.rank in span)
                return Plan(ranks=span.ranks, slots_per_node=self.slots_per_node, members=members, frontends=())
        raise PlanError(f"no extension {number} in the plan: {', '.join(str(s.number) for s in self.joined) or 'none'}")


@dataclass(frozen=True, slots=True)
class Spread:
    """What one engine takes: `slots` on each of `nodes` nodes."""

    nodes: int
    slots: int
    by_data: bool
    ports: int


def plan(recipe: Recipe, extensions: Iterable[Extension] = (), left: Collection[str] = ()) -> Plan:
    """Give every member its place, on as few nodes as first fit in the order of `recipe.roles` needs.

    An engine that fits a node shares it with others; one that does not takes the same number of slots on each of the
    fewest consecutive nodes that its processes divide by. With `control.dedicated`, rank 0 runs no engine. Extensions take
    nodes of their own. Engines that have `left` keep their places empty.

    Raises:
        PlanError: An engine cannot be placed on this cluster at all.
    """
    per_node = slots_per_node(recipe)
    launched = [
        Part(kind=role.kind, first_replica=0, replicas=role.replicas, model=role.model) for role in recipe.roles
    ]
    members, ranks = _placed(launched, recipe, per_node, 0, 1 if recipe.control.dedicated else 0)
    joined = []
    for extension in extensions:
        more, count = _placed(extension.parts, recipe, per_node, extension.first_rank, 0)
        members += more
        joined.append(Span(number=extension.number, first=extension.first_rank, ranks=count))
    return Plan(
        ranks=ranks,
        slots_per_node=per_node,
        members=tuple(member for member in members if member.engine not in left),
        frontends=tuple(f"frontend-{i}" for i in range(recipe.frontend.processes)),
        joined=tuple(joined),
    )


def extend(recipe: Recipe, extensions: Sequence[Extension], wanted: Mapping[str, int]) -> Extension:
    """The extension that adds so many engines of each role (`Role.group`) to what there is.

    Raises:
        PlanError: The recipe has no such role, so nobody knows how large its engines are.
    """
    roles = {role.group: role for role in recipe.roles}
    counts = {group: role.replicas for group, role in roles.items()}
    for group in wanted:
        if group not in counts:
            raise PlanError(f"the deployment has no role {group}: it has {', '.join(counts)}; launch another for it")
    for extension in extensions:
        for part in extension.parts:
            counts[part.group] = max(counts[part.group], part.first_replica + part.replicas)
    before = plan(recipe, extensions)
    return Extension(
        number=max((extension.number for extension in extensions), default=0) + 1,
        first_rank=max((span.first + span.ranks for span in before.joined), default=before.ranks),
        parts=tuple(
            Part(kind=roles[group].kind, first_replica=counts[group], replicas=more, model=roles[group].model)
            for group, more in wanted.items()
        ),
    )


def _placed(
    parts: Iterable[Part], recipe: Recipe, per_node: int, offset: int, reserved: int
) -> tuple[list[Member], int]:
    """Members of the parts on consecutive ranks from `offset` on, `reserved` of them empty; and how many ranks that are."""
    roles = {role.group: role for role in recipe.roles}
    used: list[int] = [0] * reserved
    next_port: list[int] = [MEMBER_PORT] * reserved
    members: list[Member] = []
    for part in parts:
        role = roles[part.group]
        wanted = spread_of(role, recipe, per_node)
        local_ranks = role.data_parallel // wanted.nodes if wanted.by_data else role.data_parallel
        for replica in range(part.first_replica, part.first_replica + part.replicas):
            rank = _first_fit(used, next_port, reserved, wanted, per_node)
            for node in range(wanted.nodes):
                here = rank + node
                while len(used) <= here:
                    used.append(0)
                    next_port.append(MEMBER_PORT)
                ports = MemberPorts(next_port[here], local_ranks, RAY_PORTS if role.executor is Executor.RAY else 0)
                members.append(
                    Member(
                        engine=f"{role.group}-{replica}",
                        kind=role.kind,
                        replica=replica,
                        node=node,
                        nodes=wanted.nodes,
                        rank=offset + here,
                        slots=tuple(range(used[here], used[here] + wanted.slots)),
                        ports=ports,
                        by_data=wanted.by_data,
                        dp_first=node * local_ranks if wanted.by_data else 0,
                        model=role.model,
                    )
                )
                used[here] += wanted.slots
                next_port[here] = ports.end
    return members, len(used)


def dp_ranks(role: Role, member: Member) -> tuple[int, int]:
    """The data-parallel ranks of its engine that a member serves: the first, and how many."""
    if not member.by_data:
        return 0, role.data_parallel
    count = role.data_parallel // member.nodes
    return member.node * count, count


def shared_port(recipe: Recipe, rank0: Ports) -> int:
    """The HTTP port of the deployment's clients: the recipe's, or one of rank 0's block."""
    return recipe.frontend.port or int(rank0.port(SHARED_PORT))


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


def spread_of(role: Role, recipe: Recipe, per_node: int) -> Spread:
    """How many nodes an engine of the role takes, and what on each of them.

    Raises:
        PlanError: Its processes cannot be spread evenly.
    """
    cpu = recipe.engine.device == "cpu"
    nodes = role.nodes or (1 if cpu else _fewest_nodes(role, recipe, per_node))
    local = role.world // nodes
    by_data = nodes > 1 and role.data_parallel > 1
    # A node holds whole data-parallel ranks: their own processes talk at every layer.
    unit = role.rank_world if by_data else 1
    if role.world % (nodes * unit) or (local > per_node and not cpu):
        raise PlanError(
            f"{role.where}: an engine of {_sizes(role)} does not spread over {nodes} nodes"
            f"{'' if cpu else f' of {per_node} GPUs'} ({recipe.cluster.name})"
            f"{_fitting(role.world, nodes * unit, None if cpu else nodes * per_node)}"
        )
    ranks = role.data_parallel // nodes if by_data else role.data_parallel
    ports = MemberPorts(0, ranks, RAY_PORTS if role.executor is Executor.RAY else 0).end
    if ports > PORT_BLOCK - MEMBER_PORT:
        raise PlanError(
            f"{role.where}: {ranks} data-parallel ranks on one node need {ports} ports and a rank has "
            f"{PORT_BLOCK - MEMBER_PORT}: use more nodes or replicas, and fewer ranks in an engine"
        )
    return Spread(nodes, 1 if cpu else local, by_data, ports)


def _fewest_nodes(role: Role, recipe: Recipe, per_node: int) -> int:
    """The fewest nodes of GPUs that an engine divides over; with data parallelism each holds whole ranks."""
    if role.world <= per_node:
        return 1
    unit = role.rank_world if role.data_parallel > 1 else 1
    for nodes in range(2, role.world + 1):
        local = role.world // nodes
        if role.world % nodes == 0 and local <= per_node and local % unit == 0:
            break
    else:
        raise PlanError(
            f"{role.where}: one data-parallel rank of {_sizes(role)} takes {role.rank_world} GPUs and a node of "
            f"{recipe.cluster.name} has {per_node}: an engine either spreads its data-parallel ranks over nodes or spreads one "
            f"rank; use replicas instead of data_parallel, or at most {per_node} GPUs for a rank"
        )
    if local == 1 and unit == 1 and per_node > 1:
        raise PlanError(
            f"{role.where}: an engine of {_sizes(role)} does not spread over nodes of {per_node} GPUs "
            f"({recipe.cluster.name}){_fitting(role.world, per_node, None)}"
        )
    return nodes


def _sizes(role: Role) -> str:
    """The factors of an engine's size, as the user wrote them."""
    named = {"tensor_parallel": role.tensor_parallel, "pipeline_parallel": role.pipeline_parallel}
    named["data_parallel"] = role.data_parallel
    return f"{' * '.join(f'{name}={size}' for name, size in named.items() if size > 1)} (together {role.world})"


def _fitting(world: int, step: int, most: int | None) -> str:
    """`: make it 8 or 12 together`, for the multiples of `step` around a size that does not fit."""
    below = min(world - 1, most or world) // step * step
    above = below + step
    near = [str(size) for size in (below, above) if size and (most is None or size <= most)]
    return f": make it {' or '.join(near)} together" if near else ": use more nodes"


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


def _first_fit(used: list[int], next_port: list[int], first: int, wanted: Spread, per_node: int) -> int:
    """The lowest rank from which enough consecutive ranks have room; ranks past the end are empty."""
    rank = first
    while True:
        window = range(rank, min(rank + wanted.nodes, len(used)))
        if all(used[r] + wanted.slots <= per_node and next_port[r] + wanted.ports <= PORT_BLOCK for r in window):
            return rank
        rank += 1
