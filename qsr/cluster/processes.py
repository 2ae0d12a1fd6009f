"""The ranks of one machine as processes that start and end together."""

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
"""Ranks are forked from a server that has imported everything once, which halves the start-up time
of four ranks on two cores."""

GRACE_SECONDS = 3.0
"""After a rank has failed, the others have this long to notice, and the same time again after
SIGTERM (which a training rank treats as a request to stop) before they are killed."""

LOOK_SECONDS = 0.5
"""Polling interval of the launcher: a signal just before it starts waiting does not wake it up, and
is noticed after this time at most."""

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT")
"""Signals that timeout, systemd, Slurm or a terminal may send to a whole process group."""

_LONGEST_FOLDER = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""Maximum length of TMPDIR in bytes: a socket path has at most 107, and multiprocessing appends
this."""


def start_ranks(function: Callable[..., Result], ranks: int, *arguments: Any) -> Result:
    """Call `function(*arguments)`, a module-level function, in every rank and return its result: in
    this process if a launcher started it or there is only one rank; otherwise in `ranks` new
    processes of this machine, returning rank 0's result.

    In the new processes, signals that ask a program to end stay blocked until they are handled
    (`signals.handling`), because they are meant for this process. Raises RunFailedError if a rank
    fails, ClusterError if the ranks cannot be started, KeyboardInterrupt after Ctrl-C. No process
    is left running then, and none outlives this one.
    """
    if find_place().launched or ranks == 1:
        return _call(function, *arguments)
    _start_server()
    # silence torch's failure reports, with their C++ stack traces: qsr prints its own
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.multiprocessing").setLevel(logging.CRITICAL)
    # the rendezvous store runs in this process, which lives as long as any rank
    listener = socket.create_server(("127.0.0.1", 0))  # TCPStore would listen on all interfaces
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
    socket path, as a scheduler's may be. Raises ClusterError if there is none."""
    try:
        own = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ClusterError(f"{error.strerror}: set TMPDIR to a writable folder") from None
    for folder in (own, "/tmp", "/var/tmp"):
        if len(os.fsencode(folder)) <= _LONGEST_FOLDER and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ClusterError(
        f"TMPDIR={own} is too long for a socket path, and /tmp is not writable: set TMPDIR to a "
        f"writable folder with a path of at most {_LONGEST_FOLDER} bytes"
    )


def _start_server() -> None:
    """Start multiprocessing's helper processes with stop signals blocked, because these are meant
    for the ranks. Each rank inherits the mask and keeps it until it handles signals. Ignoring the
    signals instead would hide from the ranks which ones this program was started to ignore."""
    multiprocessing.set_forkserver_preload(["qsr.cluster.fork_server", "qsr.build"])
    before, tempfile.tempdir = tempfile.tempdir, socket_folder()
    try:
        with _signals_waiting():
            resource_tracker.ensure_running()
        with _signals_waiting():  # ensure_running has unblocked some of them
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
    """Reports from the ranks to the launcher, in chronological order. Stored in a memfd, because
    temporary folders may be cleaned up after some days."""

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
        """Append a report, in a single write so that reports of two ranks do not mix."""
        os.write(self._file, pickle.dumps(report))

    def read(self) -> list[dict[str, Any]]:
        reports = []
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            # a rank that was killed while writing leaves an incomplete report
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
    # the variables that torchrun sets
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


def die_with_starter() -> None:
    """Have the kernel kill this process when that dies which started it: its launcher, or a fork
    server, which dies with its own."""
    die_with_parent()
    server, starter = sys.modules.get("qsr.cluster.fork_server"), multiprocessing.parent_process()
    if server is not None:
        alone = os.getppid() != server.PID
    else:
        alone = starter is not None and not starter.is_alive()
    if alone:  # it died before that took effect
        os._exit(1)


def _call(function: Callable[..., Result], *arguments: Any) -> Result:
    if find_place().launched:
        die_with_starter()
    try:
        return function(*arguments)
    finally:
        leave_process_group()


def _first_failure(reports: list[dict[str, Any]], exited: ProcessExitedException) -> str:
    """The message for the first failed rank. A rank killed by a signal has no report, and the
    reports of the others only say that it is missing."""
    if exited.signal_name is not None:
        return f"rank {exited.error_index} was killed by {exited.signal_name}"
    failures = (str(report["failure"]) for report in reports if "failure" in report)
    silent = f"rank {exited.error_index} exited with status {exited.exit_code} without a message"
    return next(failures, silent)
