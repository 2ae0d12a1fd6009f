"""Carry out runs one after another: in this process, in ranks that are started here, or as told by
a launcher; and say in a line what came of each, down to the exit status.

A run of a list that fails does not keep the others from running: each has a process group, and
where the ranks are started here also processes, of its own.
"""

import contextlib
import multiprocessing
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
from qsr.cluster.slurm import current_task, stopped_status
from qsr.config.load import run_folder
from qsr.config.schema import Config, SlurmCluster
from qsr.errors import (
    REFUSED,
    ConfigError,
    DataError,
    FolderInUseError,
    FolderMovedError,
    QsrError,
    RunFailedError,
)
from qsr.output import say, warn
from qsr.run.folder import RunFolder


@dataclass(frozen=True)
class Failed:
    """A run of a list that did not come to its end; the same command tries it again."""

    folder: str
    reason: str
    """One line."""


Outcome = dict[str, Any] | Stopped | Failed


def carry_out(configs: Sequence[Config]) -> int:
    """Carry out the runs, as `execute` does, and return what this process is to exit with: 0
    done, 1 failed, 2 refused, 130 interrupted; for a run that a signal stopped, see
    `stopped_by_signal`. Of a list: 1 if one of them failed, or was refused when its turn came."""
    try:
        find_place()  # what the launcher says must make sense before anything else does
        outcomes = execute(configs)
    except QsrError as error:
        # what every process of a machine finds, one of them says
        if not isinstance(error, ConfigError | DataError) or find_place().local_rank == 0:
            warn(error.line())
        return error.exit_status
    except KeyboardInterrupt:
        again = "the same command goes on from the newest checkpoint"
        folders = ", ".join(str(run_folder(config)) for config in configs)
        warn(f"interrupted; {again}: {folders}")
        return 130
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    if find_place().rank == 0:
        for config, outcome in zip(configs, outcomes, strict=False):
            if isinstance(outcome, Failed):
                continue
            folder = str(run_folder(config))
            say(
                f"stopped after step {outcome.step} by {outcome.reason}, everything saved; the "
                f"same command goes on: {folder}"
                if isinstance(outcome, Stopped)
                else _last_line(outcome, folder)
            )
        if failed:
            warn(_summary_of(failed, len(configs)))
    return stopped_by_signal(outcomes) or (1 if failed else 0)


def stopped_by_signal(outcomes: Sequence[Outcome]) -> int:
    """0 if no signal stopped these runs, or else what this process is to exit with: 130 after
    Ctrl-C, otherwise see slurm.stopped_status."""
    by = [found.reason for found in outcomes if isinstance(found, Stopped) and found.by_signal]
    if "SIGINT" in by:
        return 130
    return stopped_status() if by else 0


def _summary_of(failed: Sequence[Failed], runs: int) -> str:
    head = f"failed: {len(failed)} of {runs} runs, which the same command tries again:"
    return "\n".join([head, *(f"  {run.folder}: {run.reason}" for run in failed)])


def _last_line(summary: dict[str, Any], folder: str) -> str:
    return (
        f"top-1 {summary['top1']:.2f} %  {summary['averages']} averages in {summary['steps']} "
        f"steps (volume {100 * summary['volume']:.1f} %)  {folder}\n{_beside_the_plan(summary)}"
    )


def _beside_the_plan(summary: dict[str, Any]) -> str:
    """What was measured, and in brackets what the plan had said of it."""
    planned = summary["planned"]
    measures = {
        "averages": ("averages", 1, ",.0f"),
        "bytes_sent_per_worker": ("MB sent per worker", 1e6, ",.1f"),
        "train_seconds": ("s of training", 1, ",.1f"),
        "communication_seconds": ("s of it communication", 1, ",.2f"),
    }
    texts = []
    for name, (words, unit, digits) in measures.items():
        if name in summary:
            plan = f" (plan {planned[name] / unit:{digits}})" if name in planned else ""
            texts.append(f"{summary[name] / unit:{digits}} {words}{plan}")
    return "measured: " + ", ".join(texts)


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
    refused = isinstance(error, QsrError) and error.exit_status == REFUSED
    text = str(error) if refused else describe(find_place().rank, error)
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
