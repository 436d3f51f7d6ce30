"""A member's page for whoever watches it: `/metrics`, `/health` and `/live`, on one port.

Served by threads: a scrape never runs in the loop that serves requests, and `/live` can say that the loop is stuck.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from launch.errors import LaunchError
from workers.engine.metrics import Families
from workers.runtime.keys import presented

log = logging.getLogger(__name__)

MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
CLIENT_TIMEOUT_S = 10.0
CLIENTS = 16
JSON = "application/json"
NO_KEY = b'{"error":"send the API key as Authorization: Bearer <key>"}'


class MetricsPage:
    """The page; `start` it once the engine is up."""

    def __init__(
        self,
        families: Families,
        health: Callable[[], str | None],
        alive: Callable[[], bool],
        admits: Callable[[str], bool],
    ) -> None:
        """Make the page.

        Args:
            families: What `/metrics` shows.
            health: Why the worker does not serve, or None while it does.
            alive: Whether the loop turns.
            admits: Whether a key that was presented, maybe an empty one, may see the metrics.
        """
        self._families = families
        self._health = health
        self._alive = alive
        self._admits = admits
        self._server: ThreadingHTTPServer | None = None
        self._complained = False

    def start(self, address: str, port: int) -> None:
        """Serve, until the process ends or `close`."""
        page = self

        class Handler(BaseHTTPRequestHandler):
            timeout = CLIENT_TIMEOUT_S

            def do_GET(self) -> None:
                page._serve(self, with_body=True)

            def do_HEAD(self) -> None:
                page._serve(self, with_body=False)

            def log_message(self, format: str, *args: Any) -> None:
                log.debug(format, *args)

        self._server = Server((address, port), Handler)
        threading.Thread(target=self._server.serve_forever, name="metrics-page", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()

    def answer(self, path: str, key: str = "") -> tuple[int, str, bytes]:
        """Status, content type and body for a path, asked for with this key."""
        if path == "/metrics":
            return self._metrics() if self._admits(key) else (401, JSON, NO_KEY)
        if path == "/health":
            reason = self._health()
            if reason is None:
                return 200, JSON, b'{"status":"ready"}'
            return 503, JSON, msgspec.json.encode({"status": "unavailable", "reason": reason})
        if path == "/live":
            return (200, JSON, b'{"status":"alive"}') if self._alive() else (503, JSON, b'{"status":"stuck"}')
        return 404, JSON, b'{"error":"there are /metrics, /health and /live"}'

    def _metrics(self) -> tuple[int, str, bytes]:
        try:
            return 200, CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self._families)
        except Exception as error:  # noqa: BLE001  # somebody else's collector: the scrape fails, nothing else
            if not self._complained:
                log.warning("the metrics cannot be shown: %s: %s", type(error).__name__, error)
            self._complained = True
            return 500, JSON, msgspec.json.encode({"error": f"{type(error).__name__}: {error}"})

    def _serve(self, handler: BaseHTTPRequestHandler, with_body: bool) -> None:
        key = presented({name.lower(): value for name, value in handler.headers.items()})
        status, kind, body = self.answer(handler.path.partition("?")[0], key)
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if with_body:
            handler.wfile.write(body)


class Server(ThreadingHTTPServer):
    """A few threads at most; none holds up the end of the process, and a broken client is no news."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._places = threading.Semaphore(CLIENTS)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind, and do not ask the name service for our own name as HTTPServer does: it may take long to answer."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, or close it when too many are open."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The thread of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whatever a client did wrong."""
        log.debug("a request to the metrics page failed: %r", sys.exception())


def own_multiprocess_folder(member: str) -> None:
    """Give the member a folder of its own below PROMETHEUS_MULTIPROC_DIR, empty; does nothing where that is not set.

    prometheus_client adds up whatever lies in the folder: other members' metrics, and those of this member's last life.
    Call it before an engine, or anything else that counts, is made.

    Raises:
        LaunchError: The folder cannot be made or written.
    """
    root = os.environ.get(MULTIPROCESS_FOLDER)
    if root is None:
        return
    folder = Path(root) / member
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        probe = folder / "probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LaunchError(
            f"{MULTIPROCESS_FOLDER}={root} cannot be written ({error}): point it at a folder of this node that can, "
            f"or leave it unset, which is enough for vLLM's metrics"
        ) from error
    os.environ[MULTIPROCESS_FOLDER] = str(folder)


def process_families() -> Families:
    """vLLM's and Python's metrics of this process, in multiprocess mode read from its files.

    The same choice as vLLM's `get_prometheus_registry` (0.32), without importing vLLM.
    """
    if os.environ.get(MULTIPROCESS_FOLDER) is None:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # ships partly typed
    return registry
