"""The ranks of a machine as processes: started together, ended together."""

import contextlib
import fcntl
import logging
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import DupFd
from typing import Any, TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from qsr.cluster.failures import describe
from qsr.cluster.group import leave_process_group
from qsr.cluster.place import OWN_RUN, find_place
from qsr.cluster.slurm import die_with_parent
from qsr.errors import ClusterError, RunFailedError
from qsr.output import guard

Result = TypeVar("Result")

START_METHOD = "forkserver"
"""Ranks are forked from a server that has imported everything once, instead of importing it each by
itself: half of the start-up time of four ranks on two cores."""

GRACE_SECONDS = 3.0
"""When a rank has failed the others have so long to notice by themselves, and as long again after
SIGTERM, which a rank in training takes for a wish to stop. Then they are killed."""

LOOK_SECONDS = 0.5
"""A signal that comes just before the launcher begins to wait for the ranks is seen so much later:
what waits is not woken by it."""

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT")
"""What a process group may get as a whole, from timeout, systemd, Slurm or a terminal."""

_LONGEST_FOLDER = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""Bytes; a socket's path has at most 107, and this is what multiprocessing puts below TMPDIR."""


def start_ranks(function: Callable[..., Result], ranks: int, *arguments: Any) -> Result:
    """Call `function(*arguments)`, a function of a module, in every rank, and return what it
    returned: in this process if a launcher started it, or if there is one rank; otherwise in
    `ranks` processes of this machine, of which the first one's result is returned.

    Those processes do not notice the signals that ask a program to end until they listen to them
    (`stopping.handling`): it is this process that is asked. Raises RunFailedError if one of them
    fails, ClusterError if they cannot be started, KeyboardInterrupt after Ctrl-C. No process is
    left then, and none outlives this one.
    """
    if find_place().launched or ranks == 1:
        return _call(function, *arguments)
    _start_server()
    # these reports of a failure are replaced by ours; c10d's come with a stack of C++
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.multiprocessing").setLevel(logging.CRITICAL)
    # the ranks meet at a store of this process: it lives as long as any of them
    listener = socket.create_server(("127.0.0.1", 0))  # by itself it would listen on all networks
    port = listener.getsockname()[1]
    store = TCPStore(
        "localhost", port, None, True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    with _Reports() as reports:
        processes = start_processes(
            _rank_main,
            (ranks, store.port, f"{OWN_RUN}{secrets.token_hex(8)}", reports, function, arguments),
            nprocs=ranks,
            join=False,
            start_method=START_METHOD,
        )
        try:
            while not processes.join(LOOK_SECONDS, GRACE_SECONDS):
                pass
        except ProcessExitedException as error:
            raise RunFailedError(_first_failure(reports.read(), error)) from None
        finally:
            for process in processes.processes:
                process.kill()
        (returned,) = (report["returned"] for report in reports.read())
        result: Result = returned
        return result


def socket_folder() -> str:
    """The folder for the fork server's socket: TMPDIR, or a shorter one if that is too long for a
    socket, as those of a scheduler may be. Raises ClusterError if there is none."""
    try:
        own = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ClusterError(
            f"{error.strerror}: set TMPDIR to a folder that can be written"
        ) from None
    for folder in (own, "/tmp", "/var/tmp"):
        if len(os.fsencode(folder)) <= _LONGEST_FOLDER and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ClusterError(
        f"TMPDIR={own} is too long for a socket's path, and /tmp cannot be written: set TMPDIR to "
        f"a folder of at most {_LONGEST_FOLDER} bytes"
    )


def _start_server() -> None:
    """Start the processes that live beside the ranks. What asks the whole group to end is for the
    ranks: these, and each rank until it listens, keep the signals waiting. Ignoring them instead
    would hide from the ranks what this program was started to ignore."""
    multiprocessing.set_forkserver_preload(["qsr.cluster.fork_server", "qsr.build"])
    before, tempfile.tempdir = tempfile.tempdir, socket_folder()
    try:
        with _signals_waiting():
            resource_tracker.ensure_running()
        with _signals_waiting():  # which that has ended for some
            forkserver.ensure_running()
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def _signals_waiting() -> Iterator[None]:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.Signals[name] for name in _SIGNALS])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Reports:
    """What the ranks tell the launcher, in the order in which they did: a file in memory, because
    files in a temporary folder are removed after some days."""

    def __init__(self) -> None:
        self._file = os.memfd_create("qsr-reports")
        fcntl.fcntl(self._file, fcntl.F_SETFL, os.O_APPEND)

    def __enter__(self) -> "_Reports":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def __getstate__(self) -> Any:
        return DupFd(self._file)

    def __setstate__(self, file: Any) -> None:
        self._file = file.detach()

    def write(self, **report: Any) -> None:
        """One write: reports of two ranks do not mix."""
        os.write(self._file, pickle.dumps(report))

    def read(self) -> list[dict[str, Any]]:
        reports = []
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            # a rank that was killed while it wrote has left a part
            with contextlib.suppress(EOFError, pickle.UnpicklingError):
                while True:
                    reports.append(pickle.load(file))
        return reports


def _rank_main(
    rank: int,
    ranks: int,
    port: int,
    attempt: str,
    reports: _Reports,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    guard()
    # what torchrun would tell
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": attempt}
    try:
        returned = _call(function, *arguments)
    except Exception as error:
        reports.write(failure=describe(rank, error))
        sys.exit(1)
    if rank == 0:
        reports.write(returned=returned)


def _call(function: Callable[..., Result], *arguments: Any) -> Result:
    if find_place().launched:
        die_with_parent()
        launcher = multiprocessing.parent_process()
        if launcher is not None and not launcher.is_alive():  # it was gone before that held
            os._exit(1)
    try:
        return function(*arguments)
    finally:
        leave_process_group()


def _first_failure(reports: list[dict[str, Any]], exited: ProcessExitedException) -> str:
    """A rank that a signal killed could not tell; the others fail of its absence."""
    if exited.signal_name is not None:
        return f"rank {exited.error_index} was ended by {exited.signal_name}"
    failures = (str(report["failure"]) for report in reports if "failure" in report)
    silent = f"rank {exited.error_index} ended with status {exited.exit_code}, without a word"
    return next(failures, silent)
