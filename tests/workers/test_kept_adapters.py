"""What a worker keeps of its adapters is read by the one that is started in its place, and by no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.engine.kept_adapters import KeptAdapters

FOLDERS = {"poet": "/lora/poet", "clerk": "/lora/clerk"}


def test_what_was_kept_is_read_again(tmp_path: Path) -> None:
    """The last of it; by a worker of the same launch."""
    path = tmp_path / "adapters" / "decode-0.json"
    KeptAdapters(path, 1.5).write({"poet": "/elsewhere"})
    KeptAdapters(path, 1.5).write(FOLDERS)

    assert KeptAdapters(path, 1.5).read() == FOLDERS
    assert KeptAdapters(path, 2.5).read() == {}
    assert KeptAdapters(tmp_path / "none.json", 1.5).read() == {}


@pytest.mark.parametrize("content", [b"", b"{", b'{"submitted_at":1.5}', b'{"submitted_at":1.5,"adapters":{"a":1}}'])
def test_a_broken_file_is_no_file(tmp_path: Path, content: bytes) -> None:
    """The worker starts all the same."""
    path = tmp_path / "decode-0.json"
    path.write_bytes(content)

    assert KeptAdapters(path, 1.5).read() == {}


def test_a_full_disk_costs_the_memory_of_adapters_alone(tmp_path: Path) -> None:
    """Not the adapters, nor the worker."""
    blocked = tmp_path / "file"
    blocked.touch()
    kept = KeptAdapters(blocked / "decode-0.json", 1.5)
    kept.write(FOLDERS)

    assert kept.read() == {}
