"""Carry out runs: in this process, in ranks that are started here, or as told by a launcher.

A run of a list that fails does not keep the others from running: each has a process group, and
where the ranks are started here also processes, of its own.
"""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from qsr.build import Stopped, prepare, run
from qsr.cluster.failures import describe, record_failure
from qsr.cluster.place import find_place
from qsr.cluster.processes import socket_folder, start_ranks
from qsr.cluster.signals import StopFlag
from qsr.cluster.slurm import current_task
from qsr.config.load import run_folder
from qsr.config.schema import Config, SlurmCluster
from qsr.errors import (
    ClusterError,
    ConfigError,
    DataError,
    FolderInUseError,
    FolderMovedError,
    RunFailedError,
)
from qsr.output import warn
from qsr.run.folder import RunFolder


@dataclass(frozen=True)
class Failed:
    """A run of a list that did not come to its end; the same command tries it again."""

    folder: str
    reason: str
    """One line."""


Outcome = dict[str, Any] | Stopped | Failed


def execute(configs: Sequence[Config]) -> list[Outcome]:
    """Carry out runs one after the other and return what build.run returned for each; runs that
    are finished are not started again, and after one that a signal stopped none is begun.

    Under a launcher such as torchrun or srun this process is one rank; otherwise the ranks are
    started here, anew for each run. One run raises what it fails of, RunFailedError if that
    happened in ranks that were started here. Of several each failure is told on stderr when it
    happens, and the others are carried out. Raises ConfigError or DataError, before anything
    starts, if settings or data of one of them are wrong, if the runs do not ask for the same ranks
    and device, or if two of them are the same run.
    """
    ranks, launched = _common_ranks(configs), find_place().launched
    own_ranks = ranks > 1 and not launched
    if own_ranks:
        socket_folder()
    if len(configs) > 1 and not launched:
        _check_all(configs)
    flag, signals = StopFlag(), _stop_signals(configs)
    if not own_ranks:
        # with a launcher Ctrl-C is for that one
        with flag.listening(signals if launched else [*signals, "SIGINT"]):
            return _one_by_one(configs, lambda config: start_ranks(_run, ranks, config, flag), flag)
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def in_own_ranks(config: Config) -> dict[str, Any] | Stopped:
        finished = prepare(config).summary  # one clear line, instead of one from every rank
        return finished or start_ranks(_run_listening, ranks, config, receiver)

    with receiver, sender, flag.passing_on([*signals, "SIGINT"], sender):
        outcomes = _one_by_one(configs, in_own_ranks, flag)
    if flag.reason == "SIGINT":  # of which the ranks know nothing
        outcomes = [_interrupted(outcome) for outcome in outcomes]
    return outcomes


def raise_failures(outcomes: Sequence[Outcome]) -> None:
    """Raise RunFailedError if there are failed runs among these."""
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    if failed:
        raise RunFailedError("; ".join(f"{run.folder}: {run.reason}" for run in failed))


def _check_all(configs: Sequence[Config]) -> None:
    for config in configs:
        with contextlib.suppress(FolderInUseError):  # it may be free when its turn comes
            prepare(config)


def _one_by_one(
    configs: Sequence[Config],
    carry_out: Callable[[Config], dict[str, Any] | Stopped],
    flag: StopFlag,
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for config in configs:
        try:
            outcome: Outcome = carry_out(config)
        except Exception as error:
            if len(configs) == 1:
                raise
            outcome = _tell(config, error)
        outcomes.append(outcome)
        told_to_stop = isinstance(outcome, Failed) and flag.reason is not None
        if told_to_stop or (isinstance(outcome, Stopped) and outcome.by_signal):
            break
    return outcomes


def _tell(config: Config, error: Exception) -> Failed:
    """Say now what failed: the others may take days."""
    refused = isinstance(error, ConfigError | DataError | ClusterError)
    text = str(error)
    if not refused and not isinstance(error, RunFailedError):  # which says of which rank it is
        trace = "".join(traceback.format_exception(error))
        text = describe(find_place().rank, f"{type(error).__name__}: {error}", trace)
    folder, word = str(run_folder(config)), "refused" if refused else "failed"
    if find_place().local_rank == 0:
        warn(f"{word}: {folder}: {text}")
    return Failed(folder, text.partition("\n")[0])


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


def _run_listening(config: Config, launcher: Connection) -> dict[str, Any] | Stopped:
    flag = StopFlag(launcher)
    with flag.listening(_stop_signals([config])):
        return _run(config, flag)


def _run(config: Config, flag: StopFlag) -> dict[str, Any] | Stopped:
    try:
        return run(config, flag)
    except (ConfigError, FolderMovedError):
        raise  # nothing that happened to the run, whose folder may be in use by another session
    except Exception as error:
        first = record_failure(RunFolder(run_folder(config)).failure, find_place(), error)
        if first is not None:
            raise RunFailedError(first) from error
        raise
