"""What each node is tested for before its engines start, and what the results mean.

`gather` takes the facts of this node, `judge` and `judge_links` turn them into findings, and `examine` does all of it. A finding that failed names the node, the device and what to do; the deployment ends with it unless
`preflight.ignore` has its name.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec

from launch.errors import LaunchError
from launch.plan import Member, Plan
from launch.recipe import Backend, Cluster, Kind, Launcher, Level, Recipe, When
from slurm import fabric, gpus
from slurm.fabric import Snapshot
from slurm.gpus import GpuState
from slurm.probe import Link

GIB = 1 << 30
MIB = 1 << 20
# A GPU that nobody uses still holds a few hundred MiB for its driver.
DIRTY_BYTES = 1 * GIB
# Locked memory that UCX and libfabric need at the least to register a KV cache.
MEMLOCK_BYTES = 64 * GIB
SHM_BYTES = 1 * GIB
DISK_BYTES = 1 * GIB
MOST_PEERS = 16
UNFIT = "is not fit to serve"
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
# vLLM's formats that read weights from the folder; of others (dummy, a plugin's) nothing is known.
READ_FORMATS = ("auto", "hf", "safetensors", "pt", "npcache", "gguf", "mistral", "bitsandbytes")


class Grade(StrEnum):
    """How a test ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


class Finding(msgspec.Struct, kw_only=True, frozen=True):
    """The result of one test; `fix` says what to do where there is something to do."""

    name: str
    grade: Grade
    what: str
    fix: str = ""


class Report(msgspec.Struct, kw_only=True):
    """All results of one rank."""

    attempt: int
    rank: int
    host: str
    findings: list[Finding]
    links: list[Link]
    seconds: float
    node: str = ""
    """Slurm's name of the node, where it has one."""

    @property
    def failed(self) -> list[Finding]:
        """What must not be."""
        return [finding for finding in self.findings if finding.grade is Grade.FAILED]


class PreflightError(LaunchError):
    """A node is not fit for its part of the deployment."""

    def __init__(self, report: Report) -> None:
        lines = [f"  {item.name}: {item.what}; {item.fix}" for item in report.failed]
        names = ",".join(item.name for item in report.failed)
        super().__init__(
            f"node {report.host} (rank {report.rank}) {UNFIT}:\n" + "\n".join(lines) + "\n"
            f"to start all the same: preflight.ignore=[{names}]"
        )
        self.report = report


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a node says of itself; sizes in bytes, `memlock` None without a limit."""

    host: str
    snapshot: Snapshot
    gpus: tuple[GpuState, ...] = ()
    gpus_error: str | None = None
    driver_cuda: str | None = None
    torch_cuda: str | None = None
    gpudirect: bool = True
    memlock: int | None = None
    shm_free: int = SHM_BYTES
    run_free: int = DISK_BYTES
    tmp_free: int = DISK_BYTES
    tmp: str = "/tmp"
    model_error: str | None = None
    port_taken: int | None = None


def gather(recipe: Recipe, leading: bool, run_dir: Path, snapshot: Snapshot, environ: Mapping[str, str]) -> Facts:
    """The facts of this node, whose port clients come to if it is `leading`; blocks for a second or two where nvidia-smi is asked."""
    states: tuple[GpuState, ...] = ()
    error = driver = None
    if recipe.engine.device == "cuda" and recipe.cluster.gpu_vendor == "nvidia":
        try:
            states, driver = gpus.query()
        except LaunchError as failure:
            error = str(failure)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    tmp = environ.get("TMPDIR", tempfile.gettempdir())
    port = recipe.frontend.port
    return Facts(
        host=socket.gethostname(),
        snapshot=snapshot,
        gpus=states,
        gpus_error=error,
        driver_cuda=driver,
        torch_cuda=_torch_cuda(),
        gpudirect=_gpudirect(snapshot),
        memlock=None if soft == resource.RLIM_INFINITY else soft,
        shm_free=_free("/dev/shm"),
        run_free=_free(str(run_dir)),
        tmp_free=_free(tmp),
        tmp=tmp,
        model_error=next(filter(None, map(_model_error, recipe.each)), None),
        port_taken=port if leading and port is not None and not _can_bind(port) else None,
    )


def judge(facts: Facts, recipe: Recipe, plan: Plan, rank: int, visible: Sequence[str] | None) -> list[Finding]:
    """What the facts of a node mean for its part of the plan. Pure."""
    findings = [_model(facts), _disk(facts), _shared_memory(facts, recipe)]
    if facts.port_taken is not None:
        findings.append(
            _failed(
                "port",
                f"port {facts.port_taken} is taken on {facts.host}",
                "leave frontend.port out, or choose another",
            )
        )
    cross = len(peers(plan, rank)) > 0
    if recipe.cluster.fabric.rdma and cross:
        findings += [_rdma(facts, recipe.cluster), _memlock(facts)]
    if recipe.engine.device == "cuda":
        slots = [slot for member in plan.on(rank) for slot in member.slots]
        if slots:
            findings += _gpus(facts, recipe, 1 + max(slots), visible)
        if recipe.cluster.fabric.rdma and any(one.disaggregated for one in recipe.models) and cross:
            findings.append(_direct(facts))
    return [_excused(finding, recipe) for finding in findings]


def judge_links(links: Sequence[Link], recipe: Recipe) -> list[Finding]:
    """What the ways to the peers mean. Pure."""
    findings = []
    asked = recipe.preflight
    for link in links:
        if link.error:
            what = f"rank {link.peer} ({link.host}) cannot be reached at {link.address}: {link.error}"
            fix = f"check that cluster.interface names the fabric's interface on both nodes, or {_without(link.host, recipe.cluster)}"
            findings.append(_failed("peer", what, fix))
            continue
        if link.nixl_error:
            what = f"NIXL moves nothing from rank {link.peer} ({link.host}): {link.nixl_error}"
            fix = "see the finding rdma, cluster.nixl_backends and UCX_NET_DEVICES, or preflight.kv=never to go without the test"
            findings.append(_failed("nixl", what, fix))
        if asked.min_gbit_per_s and link.gbit_per_s < asked.min_gbit_per_s:
            what = f"rank {link.peer} ({link.host}) sends {link.gbit_per_s} Gbit/s over TCP, less than {asked.min_gbit_per_s}"
            findings.append(
                _failed("rate", what, f"lower preflight.min_gbit_per_s, or {_without(link.host, recipe.cluster)}")
            )
        if abs(link.skew_s) > asked.max_skew_s:
            what = f"the clock of rank {link.peer} ({link.host}) is {link.skew_s:+.1f} s off ours, more than {asked.max_skew_s:.0f} s"
            findings.append(
                _failed("clock", what, f"have its time set (chrony, ntp), or {_without(link.host, recipe.cluster)}")
            )
    if links and not findings:
        slowest = min(link.gbit_per_s for link in links)
        latest = max(link.latency_ms for link in links)
        what = f"{len(links)} peers answer within {latest:.2f} ms, at {slowest:.1f} Gbit/s of TCP or more"
        moved = [link.nixl_gbit_per_s for link in links if link.nixl_gbit_per_s is not None]
        what += f", {min(moved):.1f} of NIXL" if moved else ""
        findings.append(Finding(name="peer", grade=Grade.OK, what=what))
    return [_excused(finding, recipe) for finding in findings]


def peers(plan: Plan, rank: int) -> tuple[int, ...]:
    """The ranks that this one's members connect to: those of the prefill engines for a decode engine, node 0 of an engine
    for its others, and rank 0; of more than `MOST_PEERS` the next ones by number."""
    members = plan.on(rank)
    found = {0} | {plan.leader_of(member.engine).rank for member in members}
    pulling = _models(members, Kind.DECODE)
    found |= {member.rank for member in plan.members if member.kind is Kind.PREFILL and member.model in pulling}
    others = sorted(found - {rank})
    after = [peer for peer in others if peer > rank] + [peer for peer in others if peer < rank]
    return tuple(after[:MOST_PEERS])


def between(recipe: Recipe, launcher: Launcher, plan: Plan) -> bool:
    """Whether there is something to test between nodes: ranks that are processes of one machine are not asked."""
    wide = launcher in (Launcher.SLURM, Launcher.ALLOCATION) and plan.ranks + len(plan.joined) > 1
    return wide and recipe.preflight.level is Level.FULL


def moves_kv(recipe: Recipe, plan: Plan, rank: int, peer: int, elsewhere: bool, installed: bool) -> bool:
    """Whether a block is pulled from a peer by NIXL: from ranks with prefill engines, by those with decode engines.

    `elsewhere` says whether the peer is on another host, `installed` whether NIXL is.
    """
    pair = bool(_models(plan.on(rank), Kind.DECODE) & _models(plan.on(peer), Kind.PREFILL))
    wanted = recipe.preflight.kv is When.ALWAYS or (recipe.preflight.kv is When.AUTO and elsewhere and installed)
    return pair and wanted


def offers_kv(recipe: Recipe, plan: Plan, rank: int, installed: bool) -> bool:
    """Whether a rank holds a block ready for others to pull."""
    elsewhere = _models([member for member in plan.members if member.rank != rank], Kind.DECODE)
    wanted = recipe.preflight.kv is When.ALWAYS or (recipe.preflight.kv is When.AUTO and installed)
    return bool(_models(plan.on(rank), Kind.PREFILL) & elsewhere) and wanted


def _models(members: Iterable[Member], kind: Kind) -> set[str]:
    """The models that have engines of that kind among these."""
    return {member.model for member in members if member.kind is kind}


def nixl_installed() -> bool:
    """Whether this environment has NIXL."""
    return importlib.util.find_spec("nixl") is not None


async def examine(
    recipe: Recipe,
    plan: Plan,
    attempt: int,
    rank: int,
    take: Callable[[], Facts],
    visible: Sequence[str] | None,
    test: Callable[[int], Awaitable[Link]] | None,
    gone: Collection[int] = (),
) -> tuple[Report, Facts]:
    """Test this node, and with `test` the way to each of its peers that has not `gone`; the facts come back with the report."""
    begun = time.monotonic()
    ways = [test(peer) for peer in peers(plan, rank) if peer not in gone] if test else []
    facts, links = await asyncio.gather(asyncio.to_thread(take), asyncio.gather(*ways))
    findings = judge(facts, recipe, plan, rank, visible) + judge_links(links, recipe)
    seconds = round(time.monotonic() - begun, 3)
    report = Report(attempt=attempt, rank=rank, host=facts.host, findings=findings, links=list(links), seconds=seconds)
    return report, facts


def table(reports: Sequence[Report]) -> str:
    """The verdict, one line for each rank, and one for everything that is not well."""
    lines = []
    for report in sorted(reports, key=lambda report: report.rank):
        trouble = [item for item in report.findings if item.grade is not Grade.OK]
        verdict = "failed" if report.failed else "ok, with warnings" if trouble else "ok"
        lines.append(
            f"rank {report.rank} on {report.host}: {verdict} ({len(report.findings)} tests, {report.seconds:.1f} s)"
        )
        lines += [f"  {item.grade} {item.name}: {item.what}{f'; {item.fix}' if item.fix else ''}" for item in trouble]
    return "\n".join(lines)


def buses(facts: Facts, visible: Sequence[str] | None) -> tuple[str, ...]:
    """The PCI addresses of the rank's GPUs, in the order of its slots; from sysfs where no driver was asked."""
    if facts.gpus:
        return tuple(state.bus for state in gpus.given(facts.gpus, visible))
    return tuple(gpu.bus for gpu in facts.snapshot.gpus)


# --- single tests ---------------------------------------------------------------------------------------------------


def _model(facts: Facts) -> Finding:
    if facts.model_error:
        return _failed(
            "model", f"{facts.host}: {facts.model_error}", "model.path must be the same readable folder on every node"
        )
    return _ok("model", "readable")


def _disk(facts: Facts) -> Finding:
    if facts.run_free < DISK_BYTES:
        what = f"the run directory has {facts.run_free // MIB} MiB left"
        return Finding(name="disk", grade=Grade.WARNING, what=what, fix="free some space, or choose another runs_dir")
    if facts.tmp_free < DISK_BYTES:
        what = f"{facts.tmp} of {facts.host} has {facts.tmp_free // MIB} MiB left"
        return Finding(name="disk", grade=Grade.WARNING, what=what, fix="set TMPDIR in slurm.setup to a larger disk")
    return _ok("disk", f"{facts.run_free // GIB} GiB for logs, {facts.tmp_free // GIB} GiB in {facts.tmp}")


def _shared_memory(facts: Facts, recipe: Recipe) -> Finding:
    """vLLM's processes pass requests and NCCL its buffers through /dev/shm, which containers make small."""
    if recipe.engine.device == "cuda" and facts.shm_free < SHM_BYTES:
        what = f"/dev/shm of {facts.host} has {facts.shm_free // MIB} MiB left and engines need {SHM_BYTES // MIB}"
        return _failed(
            "shm", what, "give the container a larger one (environment.args=[--shm-size=64g]), or remove old files"
        )
    return _ok("shm", f"{facts.shm_free // MIB} MiB in /dev/shm")


def _rdma(facts: Facts, cluster: Cluster) -> Finding:
    if cluster.fabric in facts.snapshot.has:
        names = [port.name for port in fabric.usable(facts.snapshot, cluster.fabric)] or list(facts.snapshot.cxi)
        return _ok("rdma", f"{cluster.fabric}: {', '.join(names)}")
    ports = [f"{port.name} {port.layer} {'active' if port.active else 'down'}" for port in facts.snapshot.ports]
    seen = ", ".join([*ports, *facts.snapshot.cxi]) or "no RDMA device"
    what = f"cluster {cluster.name} promises {cluster.fabric} and {facts.host} has {seen}: KV cache would go over TCP"
    return _failed("rdma", what, f"{_without(facts.host, cluster)}, or set cluster.fabric to what the nodes have")


def _memlock(facts: Facts) -> Finding:
    if facts.memlock is not None and facts.memlock < MEMLOCK_BYTES:
        what = f"processes on {facts.host} may lock {facts.memlock // 1024} KiB of memory and RDMA needs all of the KV cache"
        fix = (
            "take no limits along from the login node (slurm.sbatch.propagate=NONE); else the site has to raise memlock"
        )
        return _failed("memlock", what, fix)
    return _ok("memlock", "unlimited" if facts.memlock is None else f"{facts.memlock // GIB} GiB")


def _gpus(facts: Facts, recipe: Recipe, wanted: int, visible: Sequence[str] | None) -> list[Finding]:
    cluster, host = recipe.cluster, facts.host
    if cluster.gpu_vendor == "amd":
        count = len(facts.snapshot.gpus)
        if count < wanted:
            return [
                _failed("gpus", f"{host} shows {count} GPUs and its engines need {wanted}", _without(host, cluster))
            ]
        return [_ok("gpus", f"{count} on the PCI bus")]
    if facts.gpus_error:
        return [_failed("gpus", f"{host}: {facts.gpus_error}", _without(host, cluster))]
    mine = gpus.given(facts.gpus, visible)
    if len(mine) < wanted:
        what = f"{host} gives {len(mine)} GPUs and its engines need {wanted}"
        return [_failed("gpus", what, f"ask for them with cluster.gpu_request, or {_without(host, cluster)}")]
    found = [_ok("gpus", f"{wanted} x {mine[0].name}")]
    for gpu in mine[:wanted]:
        where = f"GPU {gpu.index} of {host} ({gpu.bus})"
        if gpu.ecc_errors:
            found.append(
                _failed("ecc", f"{where} has had {gpu.ecc_errors} uncorrected memory errors", _without(host, cluster))
            )
        if gpu.used_bytes > DIRTY_BYTES:
            what = f"{where} has {gpu.used_bytes // MIB} MiB in use by somebody else"
            found.append(_failed("gpu_memory", what, f"end what uses it, or {_without(host, cluster)}"))
        if gpu.mig:
            fix = "ask for whole GPUs"
            found.append(Finding(name="mig", grade=Grade.WARNING, what=f"{where} is split (MIG)", fix=fix))
    if facts.driver_cuda and facts.torch_cuda and _major(facts.torch_cuda) > _major(facts.driver_cuda):
        what = f"torch is built for CUDA {facts.torch_cuda} and the driver of {host} serves up to {facts.driver_cuda}"
        fix = "use a build for the driver's CUDA, or CUDA's forward compatibility libraries in LD_LIBRARY_PATH"
        found.append(_failed("cuda", what, fix))
    return found


def _direct(facts: Facts) -> Finding:
    if facts.gpudirect:
        return _ok("gpudirect", "the network reads and writes GPU memory")
    what = f"{facts.host} has neither nvidia_peermem nor the open driver's dmabuf: KV cache in GPU memory cannot be registered"
    return _failed("gpudirect", what, "the site has to load nvidia_peermem, or install the open kernel modules")


def _failed(name: str, what: str, fix: str) -> Finding:
    return Finding(name=name, grade=Grade.FAILED, what=what, fix=fix)


def _ok(name: str, what: str) -> Finding:
    return Finding(name=name, grade=Grade.OK, what=what)


def _excused(finding: Finding, recipe: Recipe) -> Finding:
    """A failure that the user chose to live with is a warning."""
    if finding.grade is Grade.FAILED and finding.name in recipe.preflight.ignore:
        return msgspec.structs.replace(finding, grade=Grade.WARNING)
    return finding


def _without(host: str, cluster: Cluster) -> str:
    """How to go on without a node."""
    if "exclude" in cluster.refused:
        return "submit again for other nodes"
    return f"submit again with slurm.sbatch.exclude={host}"


def _major(version: str) -> int:
    return int(version.partition(".")[0])


# --- facts ----------------------------------------------------------------------------------------------------------


def _torch_cuda() -> str | None:
    """The CUDA that torch is built for, by its version (`2.13.0+cu130`); torch itself takes seconds to load."""
    try:
        local = importlib.metadata.version("torch").partition("+cu")[2]
    except importlib.metadata.PackageNotFoundError:
        return None
    return f"{local[:-1]}.{local[-1]}" if local.isdigit() and len(local) > 1 else None


def _gpudirect(snapshot: Snapshot) -> bool:
    if snapshot.modules & {"nvidia_peermem", "nv_peer_mem"}:
        return True
    try:
        return "Open Kernel Module" in Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return False


def _free(folder: str) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _model_error(recipe: Recipe) -> str | None:
    """Why the model of this recipe of one cannot be read, or None; the first weights are really read, not only looked at."""
    folder = Path(recipe.model.path)
    try:
        (folder / "config.json").read_bytes()
        if recipe.engine.backend is Backend.VLLM:
            weights = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
            if not weights and recipe.engine.args.get("load_format", "auto") in READ_FORMATS:
                return f"{folder} holds no weights ({', '.join(WEIGHTS)})"
            for path in weights:
                with path.open("rb") as file:
                    if not file.read(MIB):
                        return f"{path} is empty"
    except OSError as error:
        return str(error)
    return None


def _can_bind(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind(("0.0.0.0", port))  # the test must cover every address that the frontend may bind
        except OSError:
            return False
    return True
