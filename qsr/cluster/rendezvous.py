"""Rendezvous: how the ranks of a Slurm job find each other.

torchrun has its own rendezvous; srun only starts processes. So rank 0 opens a store and gives its
address to ranks that ask at a port derived from the job's number, restarts and step. Another
program, or processes left over from an earlier start of the job, may occupy that port, so there is
a sequence of ports, and both sides send the name of their attempt. Any program may connect and send
nothing, or send slowly: each connection gets a few seconds, and all are served concurrently. (The
store itself does not listen on that port, because TCPStore waits forever for a silent client.)
"""

import asyncio
import contextlib
import errno
import socket
import threading
import time

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from qsr.cluster.slurm import SlurmTask

_PORTS = 8
"""Number of ports to try; if all are taken, something else is wrong."""
_REPLY_SECONDS = 3.0
"""How long the other side may take to send its name."""
_LINE_BYTES = 200
"""Maximum length of a line; names are shorter."""
_OPEN = 256
"""Maximum of open connections at rank 0: the next one closes the oldest, whose rank asks again."""


def meet(task: SlurmTask, timeout_seconds: float) -> Store:
    """Collective: the store of this attempt, for init_process_group.

    Raises OSError with a one-line message if rank 0 finds no free port, or if another rank does not
    find rank 0 within `timeout_seconds`.
    """
    if task.rank == 0:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        answer = f"{task.attempt} {store.port}\n".encode()
        serving = _serve(_listen(task), f"{task.attempt}\n".encode(), answer)
        run = threading.Thread(target=asyncio.run, args=(serving,), name="rendezvous", daemon=True)
        run.start()  # for the life of the process
    else:
        port = _search(task, timeout_seconds)
        store = TCPStore(task.first_node, port, is_master=False, wait_for_workers=False)
    return PrefixStore(task.attempt, store)


def _listen(task: SlurmTask) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    for number in range(_PORTS):
        try:
            address = ("", task.port(number))
            return socket.create_server(address, family=family, dualstack_ipv6=both)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    ports = ", ".join(str(task.port(number)) for number in range(_PORTS))
    raise OSError(
        f"none of the ports {ports} is free on {task.first_node}: check for leftover processes"
    )


async def _serve(listener: socket.socket, question: bytes, answer: bytes) -> None:
    """Send the store's address to every client that names this attempt, concurrently."""
    talks: dict[asyncio.Task[None], None] = {}  # oldest first

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # a closed connection, a timeout, a line that is too long
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(_REPLY_SECONDS):
                if await reader.readline() == question:
                    writer.write(answer)
                    await writer.drain()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talk = asyncio.create_task(reply(reader, writer))
        talks[talk] = None

        def end(ended: asyncio.Task[None]) -> None:
            talks.pop(ended, None)
            writer.close()

        talk.add_done_callback(end)
        if len(talks) > _OPEN:
            oldest = next(iter(talks))
            del talks[oldest]
            oldest.cancel()

    server = await asyncio.start_server(begin, sock=listener, limit=_LINE_BYTES)
    await server.serve_forever()


def _search(task: SlurmTask, timeout_seconds: float) -> int:
    try:
        socket.getaddrinfo(task.first_node, None)
    except socket.gaierror as error:
        raise OSError(
            f"the name of the job's first node, {task.first_node}, cannot be resolved "
            f"({error.strerror}): nodes must be able to resolve each other's names"
        ) from None
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        for number in range(_PORTS):
            with contextlib.suppress(OSError):  # nothing listens, or another program does
                port = _ask(task, task.port(number))
                if port is not None:
                    return port
        time.sleep(0.1)
    raise OSError(
        f"rank 0 was not found on {task.first_node} within {timeout_seconds:.0f} s: check its log, "
        f"and whether a firewall blocks connections between the nodes"
    )


def _ask(task: SlurmTask, port: int) -> int | None:
    """The port of this attempt's store, if the program at `port` is rank 0 of this attempt."""
    deadline = time.monotonic() + _REPLY_SECONDS
    with socket.create_connection((task.first_node, port), _REPLY_SECONDS) as connection:
        connection.sendall(f"{task.attempt}\n".encode())
        reply = b""
        while not reply.endswith(b"\n") and len(reply) < _LINE_BYTES:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            part = connection.recv(_LINE_BYTES)
            if not part:
                return None
            reply += part
    name, _, store = reply.decode(errors="replace").rstrip("\n").partition(" ")
    found = int(store) if store.isascii() and store.isdigit() else 0
    return found if name == task.attempt and 0 < found < 2**16 else None
