"""Executes runs one after another (in this process, in ranks started here, or as a rank of a
launcher), prints one line of outcome per run and returns the exit status.

If a run of a list fails, the others still run: each has its own process group, and its own
processes if the ranks are started here.
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
from qsr.config.planning import even_ranks
from qsr.config.schema import Config, SlurmCluster
from qsr.errors import (
    INTERRUPTED,
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
    """A failed run of a list; running the same command tries it again."""

    folder: str
    reason: str
    """One line."""


Outcome = dict[str, Any] | Stopped | Failed


def carry_out(configs: Sequence[Config]) -> int:
    """Execute the runs, report the outcomes and return the exit status of this process: 0 done,
    1 failed, 2 refused, 130 interrupted; for a run stopped by a signal, see `stopped_by_signal`.
    For a list: 1 if any run failed, or was refused when its turn came."""
    try:
        find_place()  # check the launcher's variables first
        outcomes = execute(configs)
    except QsrError as error:
        # an error that every process of a machine finds is printed once
        if not isinstance(error, ConfigError | DataError) or find_place().local_rank == 0:
            warn(error.line())
        return error.exit_status
    except KeyboardInterrupt:
        again = "run the same command to resume from the newest checkpoint"
        folders = ", ".join(str(run_folder(config)) for config in configs)
        warn(f"interrupted; {again}: {folders}")
        return INTERRUPTED
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    if find_place().rank == 0:
        for config, outcome in zip(configs, outcomes, strict=False):
            if isinstance(outcome, Failed):
                continue
            folder = str(run_folder(config))
            say(
                f"stopped after step {outcome.step} by {outcome.reason}, everything is saved; run "
                f"the same command to resume: {folder}"
                if isinstance(outcome, Stopped)
                else _last_line(outcome, folder)
            )
        if failed:
            warn(_summary_of(failed, len(configs)))
    return stopped_by_signal(outcomes) or (1 if failed else 0)


def stopped_by_signal(outcomes: Sequence[Outcome]) -> int:
    """The exit status of this process if a signal stopped one of these runs (130 after Ctrl-C,
    otherwise see slurm.stopped_status); 0 if not."""
    by = [found.reason for found in outcomes if isinstance(found, Stopped) and found.by_signal]
    if "SIGINT" in by:
        return INTERRUPTED
    return stopped_status() if by else 0


def _summary_of(failed: Sequence[Failed], runs: int) -> str:
    head = f"failed: {len(failed)} of {runs} runs; run the same command to try them again:"
    return "\n".join([head, *(f"  {run.folder}: {run.reason}" for run in failed)])


def _last_line(summary: dict[str, Any], folder: str) -> str:
    return (
        f"top-1 {summary['top1']:.2f} %  {summary['averages']} averages in {summary['steps']} "
        f"steps (volume {100 * summary['volume']:.1f} %)  {folder}\n{_beside_the_plan(summary)}"
    )


def _beside_the_plan(summary: dict[str, Any]) -> str:
    """The measured values, each with the planned value in brackets."""
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
    """Execute runs one after the other and return the result of build.run for each. Finished runs
    are not started again; after a run was stopped by a signal, no further run is started.

    Under a launcher such as torchrun or srun this process is one rank; otherwise new ranks are
    started for each run. If a single run fails, its error is raised (RunFailedError if it happened
    in ranks started here). In a list of runs, each failure is reported on stderr when it happens,
    and the other runs are still executed. Raises ConfigError or DataError, before anything starts,
    if the settings or data of any run are wrong, if the runs need different ranks or devices, or if
    two of them are the same run.
    """
    ranks, launched = _common_ranks(configs), find_place().launched
    own_ranks = ranks > 1 and not launched
    if own_ranks:
        socket_folder()
    if len(configs) > 1 and not launched:
        _check_all(configs)
    flag, signals = StopFlag(), _stop_signals(configs)
    if not own_ranks:
        # under a launcher, Ctrl-C is handled by the launcher
        with flag.listening(signals if launched else [*signals, "SIGINT"]):
            return _one_by_one(configs, lambda config: start_ranks(_run, ranks, config, flag), flag)
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def in_own_ranks(config: Config) -> dict[str, Any] | Stopped:
        finished = prepare(config).summary  # report errors once here, not from every rank
        return finished or start_ranks(_run_listening, ranks, config, receiver)

    with receiver, sender, flag.passing_on([*signals, "SIGINT"], sender):
        outcomes = _one_by_one(configs, in_own_ranks, flag)
    if flag.reason == "SIGINT":  # the ranks do not know which signal it was
        outcomes = [_interrupted(outcome) for outcome in outcomes]
    return outcomes


def complete(configs: Sequence[Config], what: str) -> int:
    """Execute the runs of a script that reports on all of them: 0 if all are complete, otherwise
    the exit status after a signal. Prints `what`. Raises RunFailedError if a run failed."""
    finished = sum(RunFolder(run_folder(c)).summary.exists() for c in configs)
    print(f"{len(configs)} runs: {what}; {finished} already finished", flush=True)
    outcomes = execute(configs)
    raise_failures(outcomes)
    status = stopped_by_signal(outcomes)
    if status:
        warn("stopped, everything is saved; run the same command to resume")
    return status


def raise_failures(outcomes: Sequence[Outcome]) -> None:
    """Raise RunFailedError if any of these runs failed."""
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    if failed:
        raise RunFailedError("; ".join(f"{run.folder}: {run.reason}" for run in failed))


def _check_all(configs: Sequence[Config]) -> None:
    for config in configs:
        with contextlib.suppress(FolderInUseError):  # the folder may be free when its turn comes
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
    """Report the failure now, because the other runs may take days."""
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
        raise ConfigError("two of these runs are the same: list each value once")
    wanted = {(number_of_ranks(config), config.cluster.device) for config in configs}
    if len(wanted) > 1:
        asked = " or ".join(f"{ranks} ranks on device {device}" for ranks, device in sorted(wanted))
        raise ConfigError(
            f"these runs need different ranks or devices ({asked}): start them separately"
        )
    ((ranks, _),) = wanted
    slurm = any(isinstance(config.cluster, SlurmCluster) for config in configs)
    if slurm and (current_task() is None or (ranks > 1 and not find_place().launched)):
        raise ConfigError(
            "a run with cluster=slurm must start in a Slurm job: submit it with qsr submit, "
            "or use cluster=local"
        )
    return ranks


def number_of_ranks(config: Config) -> int:
    """Number of ranks to start: those of the job on a Slurm cluster, or cluster.ranks if set;
    otherwise one per shard on the CPU, or `even_ranks` for the number of GPUs."""
    if isinstance(config.cluster, SlurmCluster):
        return config.cluster.job_ranks
    if config.cluster.ranks is not None:
        return config.cluster.ranks
    if (
        config.ranks_per_worker > 1
        or config.cluster.device == "cpu"
        or not torch.cuda.is_available()
    ):
        return config.shards
    most = max(1, torch.cuda.device_count())
    return even_ranks(config.workers, most)


def _run_listening(config: Config, launcher: Connection) -> dict[str, Any] | Stopped:
    flag = StopFlag(launcher)
    with flag.listening(_stop_signals([config])):
        return _run(config, flag)


def _run(config: Config, flag: StopFlag) -> dict[str, Any] | Stopped:
    try:
        return run(config, flag)
    except (ConfigError, FolderMovedError):
        raise  # not a failure of the run; another session may be using its folder
    except Exception as error:
        first = record_failure(RunFolder(run_folder(config)).failure, find_place(), error)
        if first is not None:
            raise RunFailedError(first) from error
        raise
