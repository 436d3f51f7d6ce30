"""The model on each node's own disk: whole or not at all, read once where nodes share the work, gone on with after a cut."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.compose import read
from launch.errors import ConfigError
from slurm import mpich, stage, staging
from slurm.broadcast import Ring, copy_alone, from_folder, share_out
from slurm.channels import socket_ring
from slurm.stage import Standing
from slurm.weights import JOURNAL, PIECE, Copy, File, Listing, Piece, StagingError, digest, listing, pieces, read_piece
from tests.deployments import deployed
from tests.slurm_cluster import SlurmCluster

SECRET = b"of the deployment"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Files of several pieces, of one, and of none; and a link, as in a snapshot of Hugging Face."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    random_bytes = random.Random(1).randbytes
    (folder / "config.json").write_bytes(b"{}")
    (folder / "empty").write_bytes(b"")
    (folder / "sub" / "a.safetensors").write_bytes(random_bytes(2 * PIECE + 5))
    (tmp_path / "blob").write_bytes(random_bytes(PIECE))
    (folder / "b.safetensors").symlink_to(tmp_path / "blob")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_bytes(b"x")
    return folder


def same(copy: Copy, source: Path) -> bool:
    """Whether every file of the model is in the copy, byte for byte."""
    return all((copy.folder / file.name).read_bytes() == (source / file.name).read_bytes() for file in copy.asked.files)


def filled(scratch: Path, source: Path) -> Copy:
    """A whole copy."""
    copy = Copy(scratch, listing(source))
    assert copy.try_claim()
    copy_alone(copy, from_folder(source), lambda size: None)
    copy.finish()
    copy.release()
    return copy


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def broadcast(copies: list[Copy], source: Callable[[Piece], bytearray]) -> list[str]:
    """Every copy's part in a ring over real sockets, each in a thread; what failed."""
    addresses = [("127.0.0.1", port) for port in free_ports(len(copies))]
    shares = share_out(copies[0].pieces, [frozenset(copy.noted) for copy in copies])
    failures: list[str] = []

    def part(place: int) -> None:
        try:
            with socket_ring(addresses, place, SECRET, 20) as channel:
                Ring(copies[place], source, shares, place, len(copies), channel, lambda size: None).run()
        except StagingError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=part, args=(place,)) for place in range(len(copies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return failures


# --- a copy -----------------------------------------------------------------------------------------------------------


def test_a_copy_has_the_files_and_not_the_hidden_ones(model: Path, tmp_path: Path) -> None:
    """Links are followed, empty files are there, and the second look costs no reading."""
    copy = filled(tmp_path / "disk", model)
    again = Copy(tmp_path / "disk", listing(model))

    assert [file.name for file in copy.asked.files] == ["b.safetensors", "config.json", "empty", "sub/a.safetensors"]
    assert same(copy, model)
    assert not (copy.folder / "b.safetensors").is_symlink()
    assert again.whole()
    assert again.missing() == []


def test_another_state_of_the_model_is_another_copy(model: Path, tmp_path: Path) -> None:
    """A file that was replaced by one of the same size changes the folder's name."""
    before = Copy(tmp_path, listing(model))
    (model / "config.json").write_bytes(b"[]")
    os.utime(model / "config.json", ns=(1, 1))

    assert Copy(tmp_path, listing(model)).folder != before.folder


def test_an_interrupted_copy_goes_on_where_it_ended(model: Path, tmp_path: Path) -> None:
    """Pieces that were written are not read from the source again, those that do not read back as written are."""
    first = Copy(tmp_path / "disk", listing(model))
    assert first.try_claim()
    source = from_folder(model)
    for piece in first.pieces[:3]:
        content = source(piece)
        first.put(piece, content, digest(content))
    first.release()
    with (first.folder / first.pieces[1].name).open("r+b") as file:  # what a crash of the node may do
        file.seek(first.pieces[1].offset)
        file.write(b"??")
    with (first.folder / JOURNAL).open("ab") as journal:  # and a line that was cut
        journal.write(b'{"number":3,"dig')

    second = Copy(tmp_path / "disk", listing(model))
    assert second.try_claim()
    second.recover()
    assert [piece.number for piece in second.missing()] == [1, 3, 4]
    copy_alone(second, source, lambda size: None)
    second.finish()

    assert second.whole()
    assert same(second, model)


def test_only_one_writes_and_a_dead_one_no_longer_counts(model: Path, tmp_path: Path) -> None:
    """Another process holds the claim until it ends, however it ends."""
    code = (
        "import sys, time; from pathlib import Path; from slurm.weights import Copy, listing\n"
        "copy = Copy(Path(sys.argv[1]), listing(Path(sys.argv[2])))\n"
        "print(copy.try_claim(), flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "disk"), str(model)]
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert other.stdout
    copy = Copy(tmp_path / "disk", listing(model))

    assert other.stdout.readline() == "True\n"
    assert not copy.try_claim()
    other.kill()
    other.wait()
    other.stdout.close()
    assert copy.try_claim()
    copy.release()


def test_a_disk_that_is_too_small_is_refused_with_the_sizes(model: Path, tmp_path: Path) -> None:
    """Before anything is written."""
    huge = Listing(str(model), (File("a", 10**18),), "x" * 32)
    copy = Copy(tmp_path, Listing(huge.source, (), huge.identity))
    assert copy.try_claim()
    copy.pieces = (Piece(0, "a", 0, 10**18),)

    with pytest.raises(
        StagingError, match=r"GB free and the model needs 1000000000\.0 GB more: set cluster.local_scratch"
    ):
        copy.check_room()


def test_a_copy_that_lacks_a_piece_is_never_called_whole(model: Path, tmp_path: Path) -> None:
    """Nor one with a file that was cut."""
    copy = Copy(tmp_path / "disk", listing(model))
    assert copy.try_claim()
    with pytest.raises(StagingError, match="5 of 5 pieces of the model are missing"):
        copy.finish()
    copy.release()
    whole = filled(tmp_path / "other", model)
    os.truncate(whole.folder / "b.safetensors", 5)

    assert not copy.whole()
    assert not Copy(tmp_path / "other", listing(model)).whole()


def test_a_model_that_shrinks_meanwhile_is_an_error(model: Path) -> None:
    """And not a copy of zeros."""
    last = pieces(listing(model))[-1]
    os.truncate(model / last.name, last.offset)

    with pytest.raises(StagingError, match="it was changed meanwhile"):
        read_piece(model, last)


# --- a broadcast ------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 9), max_size=20),
    have=st.lists(st.frozensets(st.integers(0, 19)), min_size=2, max_size=5),
)
def test_every_piece_that_somebody_lacks_has_one_reader(sizes: list[int], have: list[frozenset[int]]) -> None:
    """Who has it on its own disk reads it there; nobody reads much more of the shared file system than the others."""
    found = [Piece(number, "f", 0, size) for number, size in enumerate(sizes)]
    shares = share_out(found, have)
    load = Counter({place: 0 for place in range(len(have))})
    for share in shares:
        load[share.reader] += 0 if share.local else share.piece.size

    assert [share.piece for share in shares] == [p for p in found if not all(p.number in numbers for numbers in have)]
    for share in shares:
        owners = [place for place, numbers in enumerate(have) if share.piece.number in numbers]
        assert share.local == bool(owners)
        assert not owners or share.reader in owners
    if not any(share.local for share in shares):
        assert max(load.values()) - min(load.values()) <= 9


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_a_broadcast_reads_every_piece_once(nodes: int, model: Path, tmp_path: Path) -> None:
    """All together; afterwards every node has the whole model."""
    reads: Counter[int] = Counter()
    real = from_folder(model)

    def source(piece: Piece) -> bytearray:
        reads[piece.number] += 1
        return real(piece)

    copies = [Copy(tmp_path / f"n{place}", listing(model)) for place in range(nodes)]
    assert all(copy.try_claim() for copy in copies)
    failures = broadcast(copies, source)
    for copy in copies:
        copy.finish()

    assert failures == []
    assert reads == Counter({piece.number: 1 for piece in copies[0].pieces})
    assert all(same(copy, model) for copy in copies)


def test_nodes_that_have_pieces_give_them_to_those_that_lack_them(model: Path, tmp_path: Path) -> None:
    """The shared file system is read only for what nobody has."""
    copies = [Copy(tmp_path / f"n{place}", listing(model)) for place in range(3)]
    assert all(copy.try_claim() for copy in copies)
    real = from_folder(model)
    for place, numbers in enumerate([(0, 1, 2, 3), (3,), ()]):
        for number in numbers:
            content = real(copies[0].pieces[number])
            copies[place].put(copies[0].pieces[number], content, digest(content))
    reads: list[int] = []

    def source(piece: Piece) -> bytearray:
        reads.append(piece.number)
        return real(piece)

    failures = broadcast(copies, source)
    for copy in copies:
        copy.finish()

    assert failures == []
    assert reads == [4]
    assert all(same(copy, model) for copy in copies)


def test_a_neighbour_that_goes_ends_the_broadcast_for_all_and_what_came_is_kept(model: Path, tmp_path: Path) -> None:
    """Nobody waits for ever, and nobody takes part of a model for the whole."""
    copies = [Copy(tmp_path / f"n{place}", listing(model)) for place in range(3)]
    assert all(copy.try_claim() for copy in copies)
    real = from_folder(model)

    def source(piece: Piece) -> bytearray:
        if piece.number == 4:
            raise StagingError("the file system is gone")
        return real(piece)

    failures = broadcast(copies, source)
    assert len(failures) == 3
    assert any("the file system is gone" in failure for failure in failures)
    for copy in copies:
        copy.recover()
        copy_alone(copy, real, lambda size: None)
        copy.finish()

    assert all(same(copy, model) for copy in copies)


def test_strangers_do_not_get_into_the_ring(tmp_path: Path) -> None:
    """One that connects first and does not know the secret is closed; the neighbour still comes in."""
    addresses = [("127.0.0.1", port) for port in free_ports(2)]

    def lie(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(32)
            connection.sendall(bytes(64))

    with socket.create_server(addresses[1]) as fake:
        liar = threading.Thread(target=lie, args=(fake,))
        liar.start()
        with pytest.raises(StagingError, match="is no member of this deployment"):
            socket_ring(addresses, 0, SECRET, 2).__enter__()
        liar.join(20)

    got: list[bytes] = []

    def neighbour() -> None:
        with socket_ring(addresses, 1, SECRET, 20) as channel:
            got.append(channel.receive_header())

    thread = threading.Thread(target=neighbour)
    thread.start()
    deadline = time.monotonic() + 20
    while True:
        try:
            stranger = socket.create_connection(addresses[1], 5)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
    stranger.sendall(bytes(32))
    stranger.sendall(bytes(32))  # a proof that proves nothing
    with socket_ring(addresses, 0, SECRET, 20) as channel:
        channel.send(bytes(32), b"")
        thread.join(20)
    stranger.close()

    assert got == [bytes(32)]


# --- decisions of the agent ---------------------------------------------------------------------------------------------


def standing(rank: int, claimed: bool = True, identity: str = "m", have: tuple[tuple[int, int], ...] = ()) -> Standing:
    """What a rank says."""
    return Standing(
        attempt=1, rank=rank, host="h", address="127.0.0.1", port=1, scratch="/s", identity=identity, claimed=claimed,
        have=list(have),
    )  # fmt: skip


def test_the_ring_is_those_who_write_a_copy_of_the_same_model() -> None:
    """In the order of ranks, however their words came."""
    found = [standing(3), standing(0, claimed=False), standing(2, identity="other"), standing(1)]

    assert [item.rank for item in stage.group(found)] == [1, 3]
    assert stage.group([]) == []


@given(st.frozensets(st.integers(0, 40)))
def test_ranges_say_what_is_there(found: frozenset[int]) -> None:
    """In short, and without loss."""
    assert stage.numbers(standing(0, have=tuple(stage.ranges(list(found))))) == found


@pytest.mark.parametrize(
    ("written", "environ", "expected"),
    [
        ("/tmp", {}, "/tmp"),
        ("$TMPDIR/x", {"TMPDIR": "/scratch/7"}, "/scratch/7/x"),
        ("$A.b", {"A": "/a"}, "/a.b"),
    ],
)
def test_the_scratch_folder_is_read_as_a_shell_would(written: str, environ: dict[str, str], expected: str) -> None:
    """Its variables are those of the node."""
    asked = read(["+recipe=tiny_agg", "weights.stage=local", f"cluster.local_scratch='{written}'"]).recipe

    assert staging.scratch(asked, environ) == expected


def test_a_variable_that_is_not_set_is_named() -> None:
    """And not an empty part of a path."""
    asked = read(["+recipe=tiny_agg", "weights.stage=local", "cluster.local_scratch='$NOWHERE/x'"]).recipe

    with pytest.raises(StagingError, match="NOWHERE"):
        staging.scratch(asked, {})


def test_staging_without_a_disk_of_the_nodes_is_refused() -> None:
    """Before the queue."""
    with pytest.raises(ConfigError, match=r"weights.stage=local needs cluster.local_scratch=<folder"):
        read(["+recipe=tiny_agg", "weights.stage=local"])


def test_prefill_and_decode_need_the_same_path() -> None:
    """Engines compare it; engines that do not talk to each other may have any."""
    words = ["weights.stage=local", "cluster.local_scratch=/s"]
    apart, alike = (read([f"+recipe={name}", *words]).recipe for name in ("tiny_disagg", "tiny_agg"))
    found = [standing(0), msgspec.structs.replace(standing(1), scratch="/other")]

    with pytest.raises(StagingError, match="cluster.local_scratch is /other on rank 1, /s on rank 0"):
        staging.refuse_other_places(apart, found)
    staging.refuse_other_places(apart, found[:1])
    staging.refuse_other_places(alike, found)


def test_the_commands_of_mpiexec_are_taken_once_all_are_printed() -> None:
    """As MPICH 5.0 prints them for the launcher `manual`."""
    line = "HYDRA_LAUNCH: /x/bin/hydra_pmi_proxy --control-port 10.0.0.1:34375 --rmk user --proxy-id 1 "

    assert mpich.printed_commands(line) is None
    assert mpich.printed_commands(f"{line}\nHYDRA_LAUNCH_END\n") == [
        ["/x/bin/hydra_pmi_proxy", "--control-port", "10.0.0.1:34375", "--rmk", "user", "--proxy-id", "1"]
    ]


def test_a_snapshot_of_hugging_face_is_a_commit(tmp_path: Path) -> None:
    """By its branch or by its name, without a network; one that is not there comes with the command that fetches it."""
    cache = tmp_path / "hub" / "models--owner--name"
    snapshot = cache / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    code = "import sys; from launch.compose import snapshot\nfor each in sys.argv[1:]: print(snapshot(each))"
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")}
    names = ["hf:owner/name", f"hf:owner/name@{'a' * 40}"]
    found = subprocess.run([sys.executable, "-c", code, *names], check=True, capture_output=True, text=True, env=env)
    absent = subprocess.run(
        [sys.executable, "-c", code, "hf:owner/name@v2"], check=False, capture_output=True, text=True, env=env
    )

    assert found.stdout.splitlines() == [str(snapshot)] * 2
    assert "`hf download owner/name --revision v2`" in absent.stderr


# --- on a real Slurm ----------------------------------------------------------------------------------------------------


def worker_of(run: Path, rank: int) -> int | None:
    """The process that copies the model for a rank."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"slurm.stage" in words and str(run).encode() in words and words[-2] == str(rank).encode():
            return int(entry.name)
    return None


@pytest.mark.slurm
@pytest.mark.timeout(200)
def test_a_broadcast_that_is_cut_is_finished_by_every_node_and_then_served(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster
) -> None:
    """Four nodes of a real job: one's copying process is killed in the middle. All go on from what they have, engines read
    the copies, and the next launch copies nothing."""
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model.iterdir():
        if file.is_file():
            (model / file.name).write_bytes(file.read_bytes())
    for index in range(4):
        with (model / f"padding-{index}").open("wb") as padding:
            padding.truncate(8 * PIECE)
    words = [
        *(
            "+recipe=tiny_agg",
            "roles.aggregated.replicas=4",
            "engine.backend=echo",
            "cluster=slurm_cpu",
            "cluster.interface=lo",
            f"model.path={model}",
        ),
        *("weights.stage=broadcast", "weights.transport=sockets", f"cluster.local_scratch={tmp_path}/$SLURMD_NODENAME"),
    ]
    run = tmp_path / "runs" / "staged"
    journals = tmp_path / "n3"
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not killed:
            pid = worker_of(run, 2)
            if pid and any(path.stat().st_size for path in journals.glob(f"*/{JOURNAL}")):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.005)

    thread = threading.Thread(target=kill)
    thread.start()
    with deployed(tmp_path, *words, name="staged", env=cluster.env) as running:
        thread.join()
        answer = running.client.completions.create(model="tiny", prompt="once", max_tokens=4)
        places = [
            dict(item.partition(b"=")[::2] for item in Path(f"/proc/{member.pid}/environ").read_bytes().split(b"\0"))
            for record in running.run.ranks(1).values()
            for name, member in record.members.items()
            if name.startswith("aggregated")
        ]
        logs = [(running.run.logs(1) / f"weights-{rank}.log").read_text() for rank in range(4)]
        agents = "".join(path.read_text() for path in running.run.logs(1).glob("*_log.out"))
    with deployed(tmp_path, *words, name="staged", env=cluster.env) as running:
        again = list(running.run.logs(2).glob("weights-*.log"))

    assert killed
    assert answer.usage
    copies = [Copy(tmp_path / f"n{node}", listing(model)) for node in (1, 2, 3, 4)]
    assert all(copy.whole() and same(copy, model) for copy in copies)
    assert {place[b"BATON_MODEL_PATH"] for place in places} == {str(copy.folder).encode() for copy in copies}
    assert agents.count("copies what it lacks from") == 4
    assert all("GB/s" in log for log in logs)
    came = [json.loads((copy.folder / stage.PROGRESS).read_bytes()) for copy in copies]
    assert all(0 < item["came"] < item["total"] == item["there"] for item in came)
    assert again == []
