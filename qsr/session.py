"""From runs to an exit status: carries them out and says in a line what came of each."""

import sys
from collections.abc import Sequence
from typing import Any

from qsr.averaging import DisagreementError
from qsr.build import Stopped
from qsr.checkpoint import CheckpointError
from qsr.config.load import ConfigError, run_folder
from qsr.config.schema import Config
from qsr.data import DataError
from qsr.distributed import ClusterError, LostRankError
from qsr.launch import execute
from qsr.monitor import TrainingError
from qsr.place import find_place
from qsr.processes import RunFailedError
from qsr.slurm import stopped_status

_FAILURES = (RunFailedError, CheckpointError, DisagreementError, LostRankError, TrainingError)


def carry_out(configs: Sequence[Config]) -> int:
    """Carry out the runs, as launch.execute does, and return what this process is to exit with: 0
    done, 1 failed, 2 refused, 130 interrupted; for a run that a signal stopped, see
    slurm.stopped_status."""
    try:
        find_place()  # what the launcher says must make sense before anything else does
        outcomes = execute(configs)
    except (ConfigError, DataError) as error:
        if find_place().local_rank == 0:  # the others of this machine see the same
            print(f"refused: {error}", file=sys.stderr)
        return 2
    except ClusterError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except _FAILURES as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "the same command goes on from the newest checkpoint"
        folders = ", ".join(str(run_folder(config)) for config in configs)
        print(f"interrupted; {again}: {folders}", file=sys.stderr)
        return 130
    if find_place().rank == 0:
        for config, outcome in zip(configs, outcomes, strict=False):
            folder = str(run_folder(config))
            print(
                f"stopped after step {outcome.step} by {outcome.reason}, everything saved; the "
                f"same command goes on: {folder}"
                if isinstance(outcome, Stopped)
                else _last_line(outcome, folder),
                flush=True,
            )
    stopped = any(isinstance(found, Stopped) and found.by_signal for found in outcomes)
    return stopped_status() if stopped else 0


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
