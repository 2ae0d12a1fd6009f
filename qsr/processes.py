"""The ranks of a machine as processes: started together, ended together."""

import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from qsr.distributed import leave_process_group
from qsr.failures import describe, read_failure, record_failure
from qsr.place import OWN_RUN, find_place
from qsr.slurm import die_with_parent
from qsr.stopping import handling

Result = TypeVar("Result")

START_METHOD = "forkserver"
"""Ranks are forked from a server that has imported everything once, instead of importing it each by
itself: half of the start-up time of four ranks on two cores."""

GRACE_SECONDS = 3.0
"""When a rank has failed the others have so long to notice by themselves, and as long again after
SIGTERM, which a rank in training takes for a wish to stop. Then they are killed."""


class RunFailedError(RuntimeError):
    """A rank failed; the message is that of the first failure, with its rank."""


def start_ranks(function: Callable[..., Result], ranks: int, *arguments: Any) -> Result:
    """Call `function(*arguments)`, a function of a module, in every rank, and return what it
    returned: in this process if a launcher started it, or if there is one rank; otherwise in
    `ranks` processes of this machine, of which the first one's result is returned.

    Raises RunFailedError if one of those processes fails, KeyboardInterrupt after Ctrl-C or
    SIGHUP. No process is left then.
    """
    if find_place().launched or ranks == 1:
        return _call(function, *arguments)
    multiprocessing.set_forkserver_preload(["qsr.build"])
    # these reports of a failure are replaced by ours; c10d's come with a stack of C++
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.multiprocessing").setLevel(logging.CRITICAL)
    # the ranks meet at a store of this process: it lives as long as any of them
    listener = socket.create_server(("127.0.0.1", 0))  # by itself it would listen on all networks
    port = listener.getsockname()[1]
    store = TCPStore(
        "localhost", port, None, True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    with (
        tempfile.TemporaryDirectory(prefix=OWN_RUN) as folder,
        handling(["SIGHUP"], _interrupt),
    ):
        results = Path(folder)
        processes = start_processes(
            _rank_main,
            (ranks, store.port, results, function, arguments),
            nprocs=ranks,
            join=False,
            start_method=START_METHOD,
        )
        try:
            while not processes.join(grace_period=GRACE_SECONDS):
                pass
        except ProcessExitedException as error:
            raise RunFailedError(_first_failure(results, error)) from None
        finally:
            for process in processes.processes:
                process.kill()
        returned: Result = pickle.loads((results / "returned").read_bytes())
        return returned


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _rank_main(
    rank: int,
    ranks: int,
    port: int,
    results: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    threading.Thread(target=_die_with_the_launcher, daemon=True).start()
    # what torchrun would tell
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": results.name}
    try:
        returned = _call(function, *arguments)
    except Exception as error:
        record_failure(results / "failure.json", find_place(), error)
        sys.exit(1)
    if rank == 0:
        (results / "returned").write_bytes(pickle.dumps(returned))


def _die_with_the_launcher() -> None:
    """The kernel's way is no use here: the parent is the fork server, which stays for the ranks."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _call(function: Callable[..., Result], *arguments: Any) -> Result:
    if find_place().launched:
        die_with_parent()
    try:
        return function(*arguments)
    finally:
        leave_process_group()


def _first_failure(results: Path, exited: ProcessExitedException) -> str:
    """A rank that a signal killed could not tell; the others fail of its absence."""
    if exited.signal_name is not None:
        return f"rank {exited.error_index} was ended by {exited.signal_name}"
    failure = read_failure(results / "failure.json")
    if failure is None:
        return f"rank {exited.error_index} ended with status {exited.exit_code}, without a word"
    of_another = failure["error"].removeprefix(f"{RunFailedError.__name__}: ")
    if of_another != failure["error"]:
        return str(of_another)
    return describe(failure["rank"], failure["error"], failure["traceback"])
