"""What the program works on: the frozen form of a recipe, checked when it is made.

`conf.schema` holds the form that a user writes; `launch.compose` converts once. Sizes are counted in *slots*: a slot
is one GPU, or on machines without GPUs one engine (`Cluster.cpu_engines_per_node` of them fit a node).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from launch.errors import ConfigError, closest

# vLLM 0.32 compares some of these in its handshake and answers wrongly when others differ.
EQUAL = (
    *("block_size", "dtype", "kv_cache_dtype", "revision", "code_revision", "quantization", "hf_overrides"),
    *("prefix_caching_hash_algo", "mamba_block_size", "mamba_cache_dtype", "mamba_ssm_cache_dtype"),
)
HASH_SEED = "PYTHONHASHSEED"
NIXL_BACKENDS = ("UCX", "LIBFABRIC")
# What `models.<key>` may be: it begins the names of engines, which are parts of NATS subjects, etcd keys and file names.
MODEL_KEY = re.compile(r"[a-z][a-z0-9_-]{0,31}")
# What of `engine` holds for the whole deployment: nodes are asked for, and jobs end, by it.
SHARED_ENGINE = ("device", "ready_timeout_s", "drain_s")
# What of `frontend` a model may have for itself: how its requests find workers, and wait for them.
PER_MODEL_FRONTEND = (
    *("router", "router_overlap_weight", "router_load_weight", "router_balance_weight", "router_temperature"),
    *("router_ttl_s", "router_sessions", "router_direct"),
    *("local_prefill", "local_prefill_short_tokens", "local_prefill_behind_tokens", "local_prefill_room_tokens"),
    *("busy_kv_usage", "busy_prefill_tokens", "busy_requests", "queue_requests", "queue_tokens", "queue_timeout_s"),
    *("requests_per_minute", "tokens_per_minute"),
)


class Kind(StrEnum):
    """What an engine is for."""

    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"
    EMBEDDING = "embedding"


class Launcher(StrEnum):
    """Where the agents run: a Slurm job of their own or the one we are in, processes of this machine, or this very process."""

    SLURM = "slurm"
    ALLOCATION = "allocation"
    LOCAL = "local"
    DEBUG = "debug"


class Wait(StrEnum):
    """How long `python -m launch` stays: until the deployment ends, until it is ready, or not at all."""

    STOPPED = "stopped"
    READY = "ready"
    NO = "no"


class Backend(StrEnum):
    """What produces tokens: vLLM, or an engine that says the prompt again and costs nothing (tests, benchmarks)."""

    VLLM = "vllm"
    ECHO = "echo"


class Executor(StrEnum):
    """What starts the processes of one engine: vLLM's own multiprocessing, or Ray."""

    MP = "mp"
    RAY = "ray"


class Tokenize(StrEnum):
    """Who makes a prompt of messages: the frontend where it surely can and else a worker, always the one, or the other."""

    AUTO = "auto"
    FRONTEND = "frontend"
    WORKER = "worker"


class Tiny(StrEnum):
    """The models that the project makes itself: one reads text, others also see images, hear, or watch video."""

    TEXT = "text"
    VISION = "vision"
    AUDIO = "audio"
    VIDEO = "video"


class LoadFailure(StrEnum):
    """What becomes of a request whose KV cache could not be fetched: it fails, or its prompt is computed again."""

    FAIL = "fail"
    RECOMPUTE = "recompute"


class RouterMode(StrEnum):
    """How a worker is chosen among those of a role."""

    KV = "kv"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    POWER_OF_TWO = "power_of_two"
    LEAST_LOADED = "least_loaded"
    DIRECT = "direct"


class Fabric(StrEnum):
    """What nodes move KV cache over."""

    IB = "ib"
    ROCE = "roce"
    CXI = "cxi"
    ETHERNET = "ethernet"
    ANY = "any"

    @property
    def rdma(self) -> bool:
        """Whether the profile promises remote memory access."""
        return self in (Fabric.IB, Fabric.ROCE, Fabric.CXI)


class Container(StrEnum):
    """What runs an image."""

    APPTAINER = "apptainer"
    PYXIS = "pyxis"
    PODMAN_HPC = "podman_hpc"
    CSCS = "cscs"


class Level(StrEnum):
    """How much the preflight tests: all, nothing between nodes, or nothing."""

    FULL = "full"
    LOCAL = "local"
    OFF = "off"


class OnBadNode(StrEnum):
    """What becomes of the deployment when a node fails its preflight."""

    FAIL = "fail"
    EXCLUDE_AND_SHRINK = "exclude_and_shrink"
    RESUBMIT = "resubmit"


class OnLostNode(StrEnum):
    """What becomes of engines whose node is lost: nothing, or a job with new ones that join."""

    SHRINK = "shrink"
    EXTRA_JOB = "extra_job"


class Stage(StrEnum):
    """How the model comes to the nodes: not at all, copied by each, or read once and sent from node to node."""

    NONE = "none"
    LOCAL = "local"
    BROADCAST = "broadcast"


class Transport(StrEnum):
    """What carries a broadcast: MPI where it can be started and else sockets, or always sockets."""

    AUTO = "auto"
    SOCKETS = "sockets"


class When(StrEnum):
    """Whether something optional is done."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Standby(StrEnum):
    """Whether ranks 1 and 2 can take over from rank 0; auto where there are as many."""

    AUTO = "auto"
    YES = "true"
    NO = "false"


class LocalPrefillMode(StrEnum):
    """When a decode engine computes a prompt itself: never, short prompts, or also while prefill engines are behind."""

    NEVER = "never"
    SHORT = "short"
    LOAD = "load"


def group_name(model: str, kind: Kind) -> str:
    """What the engines of a role are named after; `model` is the key of their model, or empty."""
    return f"{model}-{kind}" if model else str(kind)


def kind_of(name: str) -> str:
    """The role in the name of a group, an engine or a member: `decode` of `decode-0`, `chat-decode-0.1` and `chat-decode`."""
    group, _, last = name.rpartition("-")
    return group.rpartition("-")[2] if last[:1].isdigit() else last


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A group of identical engines; `nodes` is the number that each of them spans, None as few as fit.

    `model` is the key of the model that they serve, empty for the one of a recipe that names no others.
    """

    kind: Kind
    replicas: int
    model: str = ""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False
    nodes: int | None = None
    executor: Executor = Executor.MP
    args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = (self.replicas, self.tensor_parallel, self.pipeline_parallel, self.data_parallel, self.nodes or 1)
        if min(counts) < 1 or self.nodes == 0:
            raise ConfigError(
                f"{self.where}: replicas, tensor_parallel, pipeline_parallel, data_parallel and nodes start at 1, "
                f"got {counts}; to leave the role out write {self.where}.replicas=0"
            )
        if self.executor is Executor.RAY and self.data_parallel > 1:
            raise ConfigError(
                f"{self.where}: executor=ray with data_parallel={self.data_parallel} is not served: "
                "use executor=mp, or more replicas instead of data_parallel"
            )

    @property
    def group(self) -> str:
        """What its engines' names begin with: `decode`, or `chat-decode` of the model `chat`."""
        return group_name(self.model, self.kind)

    @property
    def where(self) -> str:
        """Where it stands in the recipe."""
        return f"models.{self.model}.roles.{self.kind}" if self.model else f"roles.{self.kind}"

    @property
    def rank_world(self) -> int:
        """Processes that compute in one data-parallel rank: tensor times pipeline parallel size."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def world(self) -> int:
        """Processes that compute in one engine."""
        return self.rank_world * self.data_parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The weights and the name that clients use. `tiny` ones are made by the project itself (`launch.tiny_model`).

    `key` is what the recipe calls it below `models`; empty for the one of a recipe that names no others.
    """

    path: str
    name: str
    tiny: Tiny | None = None
    key: str = ""

    def __post_init__(self) -> None:
        if self.key and not MODEL_KEY.fullmatch(self.key):
            raise ConfigError(
                f"models.{self.key}: names of engines begin with it, so use small letters, digits, '_' and '-' (at most 32, the "
                f"first a letter); clients may call it otherwise: models.<key>.model.name={self.name!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What all engines of a model share, and some of it those of all models (`SHARED_ENGINE`)."""

    backend: Backend
    device: str
    args: Mapping[str, Any]
    env: Mapping[str, str]
    ready_timeout_s: float
    drain_s: float
    canary_interval_s: float
    canary_timeout_s: float
    echo_interval_s: float
    echo_cache_blocks: int = 0
    echo_prefill_tokens_per_s: float = 0.0
    echo_slots: int = 0
    connector: tuple[str | Mapping[str, Any], ...] = ("nixl",)
    kv_load_failure: LoadFailure = LoadFailure.FAIL
    kv_lease_s: int = 30
    kv_events: bool | None = None
    lora_dirs: tuple[str, ...] = ()
    tokenize: Tokenize = Tokenize.AUTO
    encoder_cache_gb: float = 8.0

    def __post_init__(self) -> None:
        relative = [folder for folder in self.lora_dirs if not folder.startswith("/")]
        if relative:
            raise ConfigError(f"engine.lora_dirs are absolute paths, the same on every node; got {relative[0]!r}")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"engine.device is cpu or cuda, got {self.device!r}")
        if self.ready_timeout_s <= 0 or self.drain_s < 0:
            raise ConfigError(
                f"engine.ready_timeout_s must be above 0 and engine.drain_s at least 0, "
                f"got {self.ready_timeout_s} and {self.drain_s}"
            )
        if self.canary_interval_s < 0 or self.canary_timeout_s <= 0:
            raise ConfigError(
                f"engine.canary_interval_s is at least 0 (0 sends no canaries) and engine.canary_timeout_s above 0, "
                f"got {self.canary_interval_s} and {self.canary_timeout_s}"
            )
        if self.encoder_cache_gb < 0:
            raise ConfigError(f"engine.encoder_cache_gb is at least 0, got {self.encoder_cache_gb}")
        if self.kv_lease_s < 6:
            raise ConfigError(
                f"engine.kv_lease_s is at least 6 (a decode engine renews it every sixth of it, and what is left of less "
                f"than 5 s is never used), got {self.kv_lease_s}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """The embedded NATS and etcd of the ranks that may lead."""

    dedicated: bool
    standby: Standby
    lease_ttl_s: int
    etcd: str | None
    nats_server: str | None

    def __post_init__(self) -> None:
        if self.lease_ttl_s < 2:
            raise ConfigError(
                f"control.lease_ttl_s is at least 2 (etcd's own minimum election time), got {self.lease_ttl_s}"
            )


LOAD_LIMITS = (
    *("busy_kv_usage", "busy_prefill_tokens", "busy_requests", "queue_requests", "queue_tokens", "queue_timeout_s"),
    *("requests_per_minute", "tokens_per_minute"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontend:
    """The OpenAI-compatible server."""

    processes: int
    port: int | None
    router: RouterMode | None
    stall_timeout_s: float
    max_body_bytes: int
    local_prefill: LocalPrefillMode
    local_prefill_short_tokens: int
    local_prefill_behind_tokens: int
    local_prefill_room_tokens: int
    tls_cert: str | None
    tls_key: str | None
    unix_socket: str | None
    stored_responses: int
    files_max_bytes: int
    batch_concurrency: int
    otlp_endpoint: str | None
    router_overlap_weight: float
    router_load_weight: float
    router_balance_weight: float
    router_temperature: float
    router_ttl_s: float
    router_sessions: bool
    router_direct: bool
    max_connections: int
    keep_alive_s: float
    request_timeout_s: float
    reader_timeout_s: float
    max_unsent_bytes: int
    busy_kv_usage: float
    busy_prefill_tokens: int
    busy_requests: int
    queue_requests: int
    queue_tokens: int
    queue_timeout_s: float
    requests_per_minute: int
    tokens_per_minute: int

    def __post_init__(self) -> None:
        if (self.tls_cert is None) is not (self.tls_key is None):
            raise ConfigError(
                f"frontend.tls_cert and frontend.tls_key go together, got {self.tls_cert} and {self.tls_key}: set both"
            )
        if self.unix_socket is not None and not (self.unix_socket.startswith("/") and len(self.unix_socket) < 100):
            raise ConfigError(
                f"frontend.unix_socket is an absolute path of less than 100 characters, got {self.unix_socket!r}"
            )
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"frontend.otlp_endpoint is an http:// or https:// URL, got {self.otlp_endpoint!r}: "
                "a collector of OTLP over HTTP listens at http://<host>:4318/v1/traces, mostly"
            )
        if self.stored_responses < 0 or self.files_max_bytes < 0 or self.batch_concurrency < 1:
            raise ConfigError(
                "frontend.stored_responses and frontend.files_max_bytes are at least 0 and frontend.batch_concurrency at "
                f"least 1, got {self.stored_responses}, {self.files_max_bytes} and {self.batch_concurrency}"
            )
        if not 1 <= self.processes <= 8:
            raise ConfigError(f"frontend.processes is 1 to 8, got {self.processes}")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"frontend.port is 1 to 65535, or null for one derived from the job, got {self.port}")
        weights = (
            self.router_overlap_weight,
            self.router_load_weight,
            self.router_balance_weight,
            self.router_temperature,
        )
        if min(weights) < 0 or self.router_ttl_s <= 0:
            raise ConfigError(
                "frontend.router_overlap_weight, router_load_weight, router_balance_weight and router_temperature are at "
                f"least 0 and router_ttl_s above 0, got {weights} and {self.router_ttl_s}"
            )
        for name in ("max_connections", "keep_alive_s", "request_timeout_s", "reader_timeout_s", "max_unsent_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"frontend.{name} must be above 0, got {getattr(self, name)}")
        for name in LOAD_LIMITS:
            if getattr(self, name) < 0:
                raise ConfigError(f"frontend.{name} is at least 0 (0 sets no limit), got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failover:
    """What becomes of a request whose worker is lost."""

    max_attempts: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.max_attempts <= 100:
            raise ConfigError(f"failover.max_attempts is 1 (never try again) to 100, got {self.max_attempts}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """What strangers on the fabric are shown."""

    open_metrics: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A kind of job that a site takes: so many nodes for at most so many minutes; None is any."""

    partition: str | None = None
    qos: str | None = None
    nodes_min: int = 1
    nodes: int | None = None
    time_min: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a machine is like; one file in `conf/cluster/` each."""

    name: str
    launcher: Launcher
    gpus_per_node: int
    cpu_engines_per_node: int
    interface: str | None
    gpu_request: str | None
    nixl_backends: tuple[str, ...] = ("UCX",)
    hosts: tuple[str, ...] = ()
    host_env: Mapping[str, str] = field(default_factory=dict)
    arch: str | None = None
    gpu_vendor: str = "nvidia"
    subnet: str | None = None
    hostname_suffix: str = ""
    fabric: Fabric = Fabric.ANY
    rdma_between_jobs: bool | None = None
    account_required: bool = False
    account_form: str | None = None
    limits: tuple[Limit, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    sbatch: Mapping[str, Any] = field(default_factory=dict)
    srun_args: tuple[str, ...] = ()
    mpi: str | None = None
    setup: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    cache_dir: str | None = None
    local_scratch: str | None = None
    container: Container | None = None
    container_command: str | None = None
    internet: str = "unknown"
    home_quota_gb: int | None = None
    flavour: str = "slurm"
    login_host: str | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.nixl_backends if name not in NIXL_BACKENDS]
        if unknown or not self.nixl_backends:
            raise ConfigError(
                f"cluster.nixl_backends is a list of {', '.join(NIXL_BACKENDS)}, got {list(self.nixl_backends)}"
                f"{closest(unknown[0].upper(), NIXL_BACKENDS) if unknown else ''}"
            )
        if self.gpus_per_node < 0 or self.cpu_engines_per_node < 1:
            raise ConfigError(
                f"cluster.gpus_per_node is at least 0 and cluster.cpu_engines_per_node at least 1, "
                f"got {self.gpus_per_node} and {self.cpu_engines_per_node}"
            )
        if self.gpu_vendor not in ("nvidia", "amd"):
            raise ConfigError(f"cluster.gpu_vendor is nvidia or amd, got {self.gpu_vendor!r}")
        if self.mpi is not None and not re.fullmatch(r"[a-z0-9_]+", self.mpi):
            raise ConfigError(f"cluster.mpi is what `srun --mpi=list` lists, such as pmix, got {self.mpi!r}")
        if self.account_form is not None and self.account_form.count("{account}") != 1:
            raise ConfigError(f"cluster.account_form holds {{account}} once, got {self.account_form!r}")
        if self.subnet is not None:
            try:
                ipaddress.ip_network(self.subnet)
            except ValueError as error:
                raise ConfigError(
                    f"cluster.subnet is a network like 10.128.0.0/16, got {self.subnet!r} ({error})"
                ) from None

    @property
    def joins_rdma(self) -> bool:
        """Whether processes of two jobs can exchange RDMA: as the profile says, or else on all fabrics but Slingshot."""
        return self.fabric is not Fabric.CXI if self.rdma_between_jobs is None else self.rdma_between_jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The flags of the Slurm job."""

    time_min: int
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    cpus_per_task: int | None
    mem: str | None
    exclusive: bool
    setup: tuple[str, ...]
    srun_args: tuple[str, ...]
    sbatch: Mapping[str, Any]
    on_lost_node: OnLostNode = OnLostNode.SHRINK

    def __post_init__(self) -> None:
        if self.time_min < 1:
            raise ConfigError(f"slurm.time_min is at least 1 minute, got {self.time_min}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where the compute nodes' Python comes from; `container` is the runtime of an image, None for everything else."""

    kind: str = "here"
    path: str | None = None
    python: str = "python3"
    binds: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    container: Container | None = None

    def __post_init__(self) -> None:
        if self.kind != "here" and not self.path:
            raise ConfigError(f"environment.kind={self.kind} needs environment.path=<where it is>")
        if self.kind == "here" and self.path:
            raise ConfigError(
                f"environment.path={self.path} is for another kind of environment: say which, environment.kind=container "
                "for an image, conda or archive"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What is tested on each node before its engines start."""

    level: Level = Level.FULL
    only: bool = False
    ignore: tuple[str, ...] = ()
    on_bad_node: OnBadNode = OnBadNode.FAIL
    kv: When = When.AUTO
    min_gbit_per_s: float = 0.0
    max_skew_s: float = 10.0
    timeout_s: float = 20.0

    def __post_init__(self) -> None:
        if self.timeout_s <= 0 or self.max_skew_s <= 0 or self.min_gbit_per_s < 0:
            raise ConfigError(
                f"preflight.timeout_s and preflight.max_skew_s are above 0 and preflight.min_gbit_per_s at least 0, "
                f"got {self.timeout_s}, {self.max_skew_s} and {self.min_gbit_per_s}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """How a link of a chain takes over from the one before it; a `queue_s` of None is what the last one waited."""

    grace_s: float = 30.0
    margin_s: float = 60.0
    queue_s: float | None = None

    def __post_init__(self) -> None:
        if min(self.grace_s, self.margin_s, self.queue_s or 0) < 0:
            raise ConfigError(
                "handover.grace_s, handover.margin_s and handover.queue_s are at least 0, "
                f"got {self.grace_s}, {self.margin_s} and {self.queue_s}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How the model comes to the nodes."""

    stage: Stage = Stage.NONE
    transport: Transport = Transport.AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model of a deployment: its engines, and how its requests find them."""

    model: Model
    roles: tuple[Role, ...]
    engine: Engine
    frontend: Frontend

    def __post_init__(self) -> None:
        whose = f"models.{self.key}" if self.key else "the recipe"
        under = f"models.{self.key}." if self.key else ""
        kinds = {role.kind for role in self.roles}
        if not kinds:
            raise ConfigError(
                f"{whose} has no roles: write {under}roles.aggregated, or {under}roles.prefill and {under}roles.decode"
            )
        if Kind.PREFILL in kinds and not kinds & {Kind.DECODE, Kind.AGGREGATED}:
            raise ConfigError(f"{whose} has prefill engines but none that decode: add {under}roles.decode.replicas=1")
        if Kind.DECODE in kinds and Kind.PREFILL not in kinds:
            raise ConfigError(f"{whose} has decode engines but none that prefill: add {under}roles.prefill.replicas=1")
        if self.disaggregated:
            self._refuse_unequal()
        if Kind.ENCODE in kinds and not kinds & {Kind.PREFILL, Kind.AGGREGATED}:
            raise ConfigError(
                f"{whose} has encode engines but none that answer: add {under}roles.aggregated, or {under}roles.prefill and "
                f"{under}roles.decode"
            )
        if kinds & {Kind.AGGREGATED, Kind.EMBEDDING} and len(kinds - {Kind.ENCODE}) > 1:
            raise ConfigError(
                f"aggregated and embedding engines of one model mix with no other role but encode ({whose} has "
                f"{', '.join(sorted(kinds))}): launch two deployments, or give another model its own roles below models"
            )
        if self.frontend.router is RouterMode.KV and self.engine.kv_events is not False and not self._caches:
            raise ConfigError(
                f"{under}frontend.router=kv follows what engines cache, but these cache no prefixes: leave out "
                f"enable_prefix_caching=false (engine.echo_cache_blocks for echo engines), or let the router guess with "
                f"{under}engine.kv_events=false"
            )

    @property
    def key(self) -> str:
        """What the recipe calls it; empty for the one of a recipe that names no others."""
        return self.model.key

    @property
    def router(self) -> RouterMode:
        """How workers are chosen: as the recipe says, or else by KV cache where there is a choice and engines cache prefixes."""
        if self.frontend.router is not None:
            return self.frontend.router
        choice = any(role.replicas * role.data_parallel > 1 for role in self.roles)
        kv = choice and self._caches and self.engine.backend is Backend.VLLM
        return RouterMode.KV if kv and self.engine.kv_events is not False else RouterMode.LEAST_LOADED

    @property
    def publishes_kv_events(self) -> bool:
        """Whether engines tell what they cache: as the recipe says, or else where the router needs it."""
        if self.engine.kv_events is not None:
            return self.engine.kv_events
        return self.router is RouterMode.KV

    @property
    def disaggregated(self) -> bool:
        """Whether prompts are computed by one engine and continued by another."""
        return any(role.kind is Kind.PREFILL for role in self.roles)

    @property
    def encodes_apart(self) -> bool:
        """Whether images are encoded by engines that do nothing else."""
        return any(role.kind is Kind.ENCODE for role in self.roles)

    @property
    def _caches(self) -> bool:
        """Whether all engines keep the KV blocks of prompts that they have computed, for the next that begins alike."""
        if any(role.kind is Kind.EMBEDDING for role in self.roles):
            return False
        if self.engine.backend is Backend.ECHO:
            return self.engine.echo_cache_blocks > 0
        told = [self._value(role, "enable_prefix_caching") for role in self.roles if role.kind is not Kind.ENCODE]
        return all(value is None or value for value in told)

    def _refuse_unequal(self) -> None:
        pair = [role for role in self.roles if role.kind is not Kind.ENCODE]
        found = {name: {str(role.kind): self._value(role, name) for role in pair} for name in EQUAL}
        found[HASH_SEED] = {str(role.kind): role.env.get(HASH_SEED, self.engine.env.get(HASH_SEED)) for role in pair}
        for name, values in found.items():
            if len(set(map(str, values.values()))) > 1:
                where = f"engine.env.{name}" if name == HASH_SEED else f"engine.args.{name}"
                raise ConfigError(
                    f"prefill and decode engines must agree on {name}, or decode reads another layout than was written; "
                    f"got {values}: set {f'models.{self.key}.' if self.key else ''}{where} once"
                )

    def _value(self, role: Role, name: str) -> Any:
        return role.args.get(name, self.engine.args.get(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A deployment as decided by its user: everything that the plan, the job and the members are computed from.

    It serves `models`, mostly one. What concerns one of them is asked of the recipe of that model alone (`of`, `each`): there
    `engine` and `frontend` are its own. In the whole recipe they are what models share and lay theirs over.
    """

    name: str
    models: tuple[ServedModel, ...]
    engine: Engine
    control: Control
    frontend: Frontend
    cluster: Cluster
    slurm: Batch
    failover: Failover = Failover()
    security: Security = Security()
    environment: Environment = Environment()
    preflight: Preflight = Preflight()
    handover: Handover = Handover()
    weights: Weights = Weights()

    def __post_init__(self) -> None:
        if self.weights.stage is not Stage.NONE and self.cluster.local_scratch is None:
            raise ConfigError(
                f"weights.stage={self.weights.stage} needs cluster.local_scratch=<folder on a disk of each node's own, or in "
                f"its memory>, which cluster {self.cluster.name!r} does not name: $TMPDIR or /tmp, on many machines"
            )
        if self.weights.stage is not Stage.NONE and len(self.models) > 1:
            raise ConfigError(
                f"weights.stage={self.weights.stage} brings one model to the nodes, and this recipe serves {', '.join(self._keys)}: use "
                "weights.stage=none, so that engines read each from its path"
            )
        names = [served.model.name for served in self.models]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ConfigError(
                f"two models are called {twice[0]!r}, and requests name the one that they mean: set models.<key>.model.name"
            )

    @property
    def each(self) -> tuple[Recipe, ...]:
        """The recipe of each model alone."""
        return tuple(self.of(served.key) for served in self.models)

    def of(self, key: str, path: str | None = None) -> Recipe:
        """The recipe of one model alone; with a `path` its weights are read there.

        Raises:
            ConfigError: There is none of that key.
        """
        for served in self.models:
            if served.key == key:
                model = replace(served.model, path=path) if path else served.model
                one = replace(served, model=model)
                return replace(self, models=(one,), engine=one.engine, frontend=one.frontend)
        raise ConfigError(
            f"no model {key!r} in the recipe{closest(key, self._keys)}; there are {', '.join(self._keys)}"
        )

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles of all models."""
        return tuple(role for served in self.models for role in served.roles)

    @property
    def scheme(self) -> str:
        """What frontends speak: http or https."""
        return "http" if self.frontend.tls_cert is None else "https"

    @property
    def one(self) -> ServedModel:
        """The only model, of the recipe of one alone."""
        if len(self.models) != 1:
            raise ValueError(f"this recipe serves {', '.join(self._keys)}: ask the recipe of one of them (Recipe.of)")
        return self.models[0]

    @property
    def model(self) -> Model:
        """Of the only model."""
        return self.one.model

    @property
    def router(self) -> RouterMode:
        """Of the only model: how its workers are chosen."""
        return self.one.router

    @property
    def publishes_kv_events(self) -> bool:
        """Of the only model: whether its engines tell what they cache."""
        return self.one.publishes_kv_events

    @property
    def disaggregated(self) -> bool:
        """Of the only model: whether prompts are computed by one engine and continued by another."""
        return self.one.disaggregated

    @property
    def encodes_apart(self) -> bool:
        """Of the only model: whether images are encoded by engines that do nothing else."""
        return self.one.encodes_apart

    @property
    def _keys(self) -> list[str]:
        return [served.key or served.model.name for served in self.models]
