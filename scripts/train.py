#!/usr/bin/env python
"""Train one run, or several one after the other, or go on with them.

    python scripts/train.py experiment=demo/quadratic seed=2 sync.alpha=0.02
    python scripts/train.py experiment=demo/quadratic seed=1,2,3
    torchrun --nproc-per-node 2 scripts/train.py experiment=demo/quadratic seed=2

Settings are those of configs/, described in qsr/config/schema.py; several values give a run each.
Without a launcher the ranks are started here. A run lives in runs/EXPERIMENT/seed_SEED; the same
command goes on with it from its newest checkpoint. Exit status: 0 done, 1 failed, 2 wrong
settings, 75 stopped by a signal (SIGTERM, SIGUSR1, SIGUSR2) with everything saved, 130 interrupted.
"""

import os
import sys
from typing import Any

from qsr.config.load import ConfigError, load_configs, run_folder


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        configs = load_configs(arguments)
    except ConfigError as error:
        return _refuse(error)

    from qsr import launch  # after the settings are known to be right: torch takes seconds
    from qsr.averaging import DisagreementError
    from qsr.build import Stopped
    from qsr.checkpoint import CheckpointError
    from qsr.data import DataError
    from qsr.distributed import ClusterError
    from qsr.monitor import TrainingError

    try:
        outcomes = launch.execute(configs)
    except (ConfigError, DataError, ClusterError) as error:
        return _refuse(error)
    except (launch.RunFailedError, CheckpointError, DisagreementError, TrainingError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "the same command goes on from the newest checkpoint"
        folders = ", ".join(str(run_folder(config)) for config in configs)
        print(f"interrupted; {again}: {folders}", file=sys.stderr)
        return 130
    if os.environ.get("RANK", "0") == "0":
        for config, outcome in zip(configs, outcomes, strict=False):
            folder = str(run_folder(config))
            print(
                f"stopped after step {outcome.step} by {outcome.reason}, everything saved; the "
                f"same command goes on: {folder}"
                if isinstance(outcome, Stopped)
                else _last_line(outcome, folder)
            )
    stopped = any(isinstance(found, Stopped) and found.by_signal for found in outcomes)
    return os.EX_TEMPFAIL if stopped else 0


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


def _refuse(error: Exception) -> int:
    print(f"refused: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
