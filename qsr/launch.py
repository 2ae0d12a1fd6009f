"""Carry out runs: in this process, in ranks that are started here, or as told by a launcher."""

import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from qsr.build import Stopped, prepare, run
from qsr.checkpoint import FolderMovedError
from qsr.config.load import ConfigError, run_folder
from qsr.config.schema import Config, SlurmCluster
from qsr.failures import record_failure
from qsr.place import find_place
from qsr.processes import RunFailedError, socket_folder, start_ranks
from qsr.runfolder import RunFolder
from qsr.slurm import current_task
from qsr.stopping import StopFlag

Outcome = dict[str, Any] | Stopped


def execute(configs: Sequence[Config]) -> list[Outcome]:
    """Carry out runs one after the other and return what build.run returned for each; runs that
    are finished are not started again, and after one that a signal stopped none is begun.

    Under a launcher such as torchrun or srun this process is one rank; otherwise the ranks are
    started here, once for all runs, and RunFailedError is raised if one of them fails. Raises
    ConfigError if the runs do not ask for the same ranks and device, or two of them are the same
    run.
    """
    ranks = _common_ranks(configs)
    if find_place().launched or ranks == 1:
        return start_ranks(_run_all, ranks, configs)
    # one clear line now, instead of one from every rank
    socket_folder()
    finished = [prepare(config).summary for config in configs]
    todo = [config for config, summary in zip(configs, finished, strict=True) if summary is None]
    flag = StopFlag()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver, sender, flag.passing_on([*_stop_signals(configs), "SIGINT"], sender):
        found = start_ranks(_run_all, ranks, todo, receiver) if todo else []
    if flag.reason == "SIGINT":  # of which the ranks know nothing
        found = [_interrupted(outcome) for outcome in found]
    new = iter(found)
    outcomes = (next(new, None) if summary is None else summary for summary in finished)
    return [outcome for outcome in outcomes if outcome is not None]


def _stop_signals(configs: Sequence[Config]) -> list[str]:
    return [*configs[0].checkpoint.stop_signals, "SIGHUP"]


def _interrupted(outcome: Outcome) -> Outcome:
    if isinstance(outcome, Stopped) and outcome.by_signal:
        return replace(outcome, reason="SIGINT")
    return outcome


def _common_ranks(configs: Sequence[Config]) -> int:
    if len({run_folder(config) for config in configs}) < len(configs):
        raise ConfigError("two of these runs are the same run: list other values")
    wanted = {(number_of_ranks(config), config.cluster.device) for config in configs}
    if len(wanted) > 1:
        asked = " or ".join(f"{ranks} ranks on device {device}" for ranks, device in sorted(wanted))
        raise ConfigError(f"these runs cannot share one launch ({asked}): start them one by one")
    ((ranks, _),) = wanted
    slurm = any(isinstance(config.cluster, SlurmCluster) for config in configs)
    if slurm and (current_task() is None or (ranks > 1 and not find_place().launched)):
        raise ConfigError(
            "a run with cluster=slurm starts in a job: submit it with scripts/submit.py, or take "
            "cluster=local"
        )
    return ranks


def number_of_ranks(config: Config) -> int:
    """cluster.ranks, or one rank per worker, or as many of them as share the machine's GPUs
    evenly; on a Slurm cluster those of a job."""
    if isinstance(config.cluster, SlurmCluster):
        return config.cluster.job_ranks
    if config.cluster.ranks is not None:
        return config.cluster.ranks
    if config.cluster.device == "cpu" or not torch.cuda.is_available():
        return config.workers
    most = max(1, torch.cuda.device_count())
    return next(n for n in range(most, 0, -1) if config.workers % n == 0)


def _run_all(configs: Sequence[Config], launcher: Connection | None = None) -> list[Outcome]:
    outcomes: list[Outcome] = []
    flag = StopFlag(launcher)
    # with a launcher Ctrl-C is for that one
    interrupt = [] if find_place().launched else ["SIGINT"]
    with flag.listening([*_stop_signals(configs), *interrupt]):
        for config in configs:
            outcome = _run(config, flag)
            outcomes.append(outcome)
            if isinstance(outcome, Stopped) and outcome.by_signal:
                break
    return outcomes


def _run(config: Config, flag: StopFlag) -> Outcome:
    try:
        return run(config, flag)
    except (ConfigError, FolderMovedError):
        raise  # nothing that happened to the run, whose folder may be in use by another session
    except Exception as error:
        first = record_failure(RunFolder(run_folder(config)).failure, find_place(), error)
        if first is not None:
            raise RunFailedError(first) from error
        raise
