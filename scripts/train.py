#!/usr/bin/env python
"""Train one run, or several one after the other, or go on with them.

    python scripts/train.py experiment=demo/quadratic seed=2 sync.alpha=0.02
    python scripts/train.py experiment=demo/quadratic seed=1,2,3
    torchrun --nproc-per-node 2 scripts/train.py experiment=demo/quadratic seed=2

Settings are those of configs/, described in qsr/config/schema.py; several values give a run each.
Without a launcher the ranks are started here. A run lives in runs/EXPERIMENT/seed_SEED; the same
command goes on with it from its newest checkpoint. Exit status: 0 done, 1 failed (of several runs
the others are carried out all the same), 2 wrong settings, 75 stopped by a signal (SIGTERM,
SIGUSR1, SIGUSR2, SIGHUP) with everything saved, 130 interrupted: the first Ctrl-C saves
everything, the second ends at once.
"""

from qsr.cluster.slurm import leave_when_signalled
from qsr.config.load import load_configs
from qsr.errors import showing_errors
from qsr.output import program


@showing_errors
def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    leave_when_signalled()
    configs = load_configs(arguments)

    from qsr.session import carry_out  # after the settings are known to be right: torch is slow

    return carry_out(configs)


if __name__ == "__main__":
    program(main)
