"""A path of real IP packets from this process to a network namespace, on which each may be lost, late, or come twice.

What netem does in a kernel that has it. Two tun devices are the ends, and this process carries the packets between them; so
what TCP makes of such a path is the kernel's own doing. Behind the far end a process passes every connection back to this
machine over a Unix socket, which knows no namespaces: `python -m tests.packets ADDRESS PORT SOCKET`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

NEAR, FAR = (f"10.78.{os.getpid() % 256}.{end}" for end in (1, 2))
PORT = 7000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MAX_PACKET = 2048
UP_S = 20.0

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Fate = Callable[[], tuple[float, ...]]
"""What becomes of a packet: when each of its copies arrives, in seconds from now; none for one that is lost."""


def can_carry_packets() -> bool:
    """Whether this machine lets us make tun devices and network namespaces."""
    return os.geteuid() == 0 and os.access("/dev/net/tun", os.W_OK) and shutil.which("ip") is not None


class Packets:
    """The packets between two tun devices; `fate` may be changed at any time, and what came of it is counted."""

    def __init__(self, near: int, far: int) -> None:
        self.fate: Fate = lambda: (0.0,)
        self.passed = self.lost = self.doubled = self.overtaken = 0
        self._sent = 0
        self._last = 0
        loop = asyncio.get_running_loop()
        loop.add_reader(near, self._forward, near, far)
        loop.add_reader(far, self._forward, far, near)

    def _forward(self, source: int, target: int) -> None:
        loop = asyncio.get_running_loop()
        packet = os.read(source, MAX_PACKET)
        copies = self.fate()
        self._sent += 1
        self.lost += not copies
        self.doubled += len(copies) > 1
        for delay_s in copies:
            loop.call_later(delay_s, self._deliver, target, packet, self._sent)

    def _deliver(self, target: int, packet: bytes, number: int) -> None:
        with contextlib.suppress(OSError):  # the far end is gone, or its queue is full: lost, as on any path
            os.write(target, packet)
        self.passed += 1
        self.overtaken += number < self._last
        self._last = max(self._last, number)


@contextlib.asynccontextmanager
async def packets_to(port: int) -> AsyncIterator[tuple[Packets, str]]:
    """A path to a port of this machine; yields its packets and the address (host and port) at its far end."""
    tag = f"bt{os.getpid() % 100000}"
    with contextlib.ExitStack() as stack:
        socket = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bt"))) / "back"
        near, far = (stack.enter_context(_tun(f"{tag}{end}")) for end in "nf")
        _ip("netns", "add", tag)
        stack.callback(_ip, "netns", "del", tag)
        _ip("link", "set", f"{tag}f", "netns", tag)
        for where, device, address in (([], f"{tag}n", NEAR), (["-n", tag], f"{tag}f", FAR)):
            _ip(*where, "addr", "add", f"{address}/30", "dev", device)
            _ip(*where, "link", "set", device, "up")
        packets = Packets(near, far)
        for end in (near, far):
            stack.callback(asyncio.get_running_loop().remove_reader, end)
        back = await asyncio.start_unix_server(
            lambda *ends: _relay(ends, asyncio.open_connection("127.0.0.1", port)), socket
        )
        argv = ["ip", "netns", "exec", tag, sys.executable, "-m", "tests.packets", FAR, str(PORT), str(socket)]
        process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
        try:
            assert process.stdout
            async with asyncio.timeout(UP_S):
                await process.stdout.readline()
            yield packets, f"{FAR}:{PORT}"
        finally:
            process.kill()
            await process.wait()
            back.close()


@contextlib.contextmanager
def _tun(name: str) -> Iterator[int]:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
        yield device
    finally:
        os.close(device)  # and with it the device goes


def _ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True, capture_output=True)


async def _relay(ends: Ends, onward: Awaitable[Ends]) -> None:
    """Pass what comes over a connection on over another one, and back, until one side ends it."""
    (reader, writer), there = ends, await onward

    async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                target.write(data)
        target.close()

    await asyncio.gather(pass_on(reader, there[1]), pass_on(there[0], writer))


async def _far_end(address: str, port: str, socket: str) -> None:
    server = await asyncio.start_server(
        lambda *ends: _relay(ends, asyncio.open_unix_connection(socket)), address, int(port)
    )
    print("up", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_far_end(*sys.argv[1:]))
