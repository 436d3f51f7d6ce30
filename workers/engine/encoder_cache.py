"""What an encode engine has made of images, on its way to the engine that computes the prompt: one file each in a shared folder.

vLLM 0.32's own connector of this kind, with what it lacks for more than debugging: a file is there whole or not at all
(a reader of half a file ends its engine), its name comes from a digest (vLLM's own follows the `uuid` that a client names its
image with, out of the folder if that says so), and the folder does not grow for ever. Engines import this module by name
(`ec_connector_module_path`); it runs in their processes, not in the worker's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
from vllm.distributed.ec_transfer.ec_connector.example_connector import ECExampleConnector

SUFFIX = ".safetensors"
TENSOR = "ec_cache"  # vLLM's name for it
# A file that was asked for this recently may be about to be read.
SETTLED_S = 600.0


class FileEncoderCache(ECExampleConnector):  # type: ignore[misc]  # mypy does not follow vLLM here
    """vLLM's ECExampleConnector, made safe; `max_bytes` in its extra configuration bounds the folder."""

    def __init__(self, vllm_config: Any, role: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        self._folder = Path(self._storage_path)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._max_bytes = int(vllm_config.ec_transfer_config.get_from_extra_config("max_bytes", 0))

    def save_caches(self, encoder_cache: dict[str, Any], mm_hash: str, **unused: Any) -> None:
        """Store what the encoder made of one image; see ECConnectorBase."""
        if not self.is_producer:
            return
        path = self._path(mm_hash)
        if path.exists():
            os.utime(path)
            return
        content = safetensors.torch.save({TENSOR: encoder_cache[mm_hash].detach().cpu()})
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
            file.write(content)
        Path(file.name).rename(path)
        prune(self._folder, self._max_bytes)

    def has_cache_item(self, identifier: str) -> bool:
        """Whether it is there; what is asked for stays a while. See ECConnectorBase."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path(identifier))
            return True
        return False

    def _path(self, mm_hash: str) -> Path:
        return self._folder / f"{hashlib.sha256(mm_hash.encode()).hexdigest()}{SUFFIX}"

    def _generate_filename_debug(self, mm_hash: str) -> str:
        """Where vLLM's own code reads."""
        return str(self._path(mm_hash))


def prune(folder: Path, max_bytes: int, settled_s: float = SETTLED_S) -> None:
    """Delete the files that were asked for longest ago until the rest fits, but none that may be about to be read."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another encode engine prunes too
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    excess = sum(size for _, size, _ in found) - max_bytes
    for when, size, path in sorted(found):
        if excess <= 0 or time.time() - when < settled_s:
            return
        path.unlink(missing_ok=True)
        excess -= size
