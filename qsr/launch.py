"""Start a run's ranks: in this process, as processes of this machine, or as told by a launcher."""

import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
    record,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qsr.build import Stopped, prepare, run
from qsr.config.load import ConfigError, run_folder
from qsr.config.schema import Config
from qsr.distributed import launched, leave_process_group
from qsr.stopping import StopFlag, passing_on

Result = TypeVar("Result")


class RunFailedError(RuntimeError):
    """A rank failed; the message is that of the first failure, with its rank."""


_EXPECTED = (
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "DataError",
    "DisagreementError",
    "TrainingError",
)
"""Errors whose message says everything; any other one is shown with its traceback."""


START_METHOD = "forkserver"
"""Ranks are forked from a server that has imported everything once, instead of importing it each by
itself: half of the start-up time of four ranks on two cores."""

Outcome = dict[str, Any] | Stopped


def execute(configs: Sequence[Config]) -> list[Outcome]:
    """Carry out runs one after the other and return what build.run returned for each; runs that
    are finished are not started again, and after one that a signal stopped none is begun.

    Under a launcher such as torchrun this process is one rank; otherwise the ranks are started
    here, once for all runs, and RunFailedError is raised if one of them fails. Raises ConfigError
    if the runs do not ask for the same ranks and device, or two of them are the same run.
    """
    ranks = _common_ranks(configs)
    if launched() or ranks == 1:
        return start_ranks(_run_all, ranks, configs)
    # one clear line now, instead of one from every rank
    finished = [prepare(config).summary for config in configs]
    todo = [config for config, summary in zip(configs, finished, strict=True) if summary is None]
    stop = multiprocessing.get_context(START_METHOD).Event()
    with passing_on(configs[0].checkpoint.stop_signals, stop):
        new = iter(start_ranks(_run_all, ranks, todo, stop) if todo else [])
    outcomes = (next(new, None) if summary is None else summary for summary in finished)
    return [outcome for outcome in outcomes if outcome is not None]


def start_ranks(function: Callable[..., Result], ranks: int, *arguments: Any) -> Result:
    """Call `function(*arguments)`, a function of a module, in every rank, and return what it
    returned: in this process if a launcher started it, or if there is one rank; otherwise in
    `ranks` processes of this machine, of which the first one's result is returned.

    Raises RunFailedError if one of those processes fails.
    """
    if launched() or ranks == 1:
        return _call(function, *arguments)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        run_id=f"qsr-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.1,
        start_method=START_METHOD,
        # of these it dies, with the ranks; what stop_signals names is passed on to them instead
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    # ranks note SIGTERM and do not die of it: of ranks that are left when one has failed, those
    # that do not notice by themselves are killed after so many seconds
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    multiprocessing.set_forkserver_preload(["qsr.build"])
    # its report of a failure is replaced by ours
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launch = elastic_launch(settings, _rank_main)
        results: dict[int, Result] = launch(function, *arguments)
    except SignalException as error:
        raise KeyboardInterrupt(error.sigval.name) from None
    except ChildFailedError as error:
        raise RunFailedError(_describe(*error.get_first_failure())) from None
    return results[0]


def _common_ranks(configs: Sequence[Config]) -> int:
    if len({run_folder(config) for config in configs}) < len(configs):
        raise ConfigError("two of these runs are the same run: list other values")
    wanted = {(number_of_ranks(config), config.cluster.device) for config in configs}
    if len(wanted) > 1:
        asked = " or ".join(f"{ranks} ranks on device {device}" for ranks, device in sorted(wanted))
        raise ConfigError(f"these runs cannot share one launch ({asked}): start them one by one")
    ((ranks, _),) = wanted
    return ranks


def number_of_ranks(config: Config) -> int:
    """cluster.ranks, or one rank per worker, or as many of them as share the machine's GPUs
    evenly."""
    if config.cluster.ranks is not None:
        return config.cluster.ranks
    if config.cluster.device == "cpu" or not torch.cuda.is_available():
        return config.workers
    most = max(1, torch.cuda.device_count())
    return next(n for n in range(most, 0, -1) if config.workers % n == 0)


@record
def _rank_main(function: Callable[..., Result], *arguments: Any) -> Result:
    return _call(function, *arguments)


def _call(function: Callable[..., Result], *arguments: Any) -> Result:
    try:
        return function(*arguments)
    finally:
        leave_process_group()


def _run_all(configs: Sequence[Config], stop: Event | None = None) -> list[Outcome]:
    outcomes: list[Outcome] = []
    flag = StopFlag(stop)
    with flag.listening(configs[0].checkpoint.stop_signals):
        for config in configs:
            outcome = run(config, flag)
            outcomes.append(outcome)
            if isinstance(outcome, Stopped) and outcome.by_signal:
                break
    return outcomes


def _describe(rank: int, failure: ProcessFailure) -> str:
    """The first failure in one line, or with its traceback if it was not foreseen."""
    report = failure.message
    if not isinstance(report, dict):
        return f"rank {rank}: {report}"
    text = report["message"]
    if not text.startswith(_EXPECTED):
        text += "\n" + report["extraInfo"]["py_callstack"]
    return f"rank {rank}: {text}"
