"""From runs to an exit status: carries them out and says in a line what came of each."""

from collections.abc import Sequence
from typing import Any

from qsr.build import Stopped
from qsr.cluster.place import find_place
from qsr.cluster.slurm import stopped_status
from qsr.config.load import run_folder
from qsr.config.schema import Config
from qsr.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    DataError,
    DisagreementError,
    FolderMovedError,
    LostRankError,
    RunFailedError,
    TrainingError,
)
from qsr.launch import Failed, Outcome, execute
from qsr.output import say, warn

_FAILURES = (
    *(RunFailedError, CheckpointError, DisagreementError, FolderMovedError, LostRankError),
    TrainingError,
)


def carry_out(configs: Sequence[Config]) -> int:
    """Carry out the runs, as launch.execute does, and return what this process is to exit with: 0
    done, 1 failed, 2 refused, 130 interrupted; for a run that a signal stopped, see
    `stopped_by_signal`. Of a list: 1 if one of them failed, or was refused when its turn came."""
    try:
        find_place()  # what the launcher says must make sense before anything else does
        outcomes = execute(configs)
    except (ConfigError, DataError) as error:
        if find_place().local_rank == 0:  # the others of this machine see the same
            warn(f"refused: {error}")
        return 2
    except ClusterError as error:
        warn(f"refused: {error}")
        return 2
    except _FAILURES as error:
        warn(f"failed: {error}")
        return 1
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
