"""Train or resume one run, or several one after another.

    qsr train experiment=demo/quadratic seed=2 sync.alpha=0.5
    qsr train experiment=demo/quadratic seed=1,2,3
    torchrun --nproc-per-node 2 -m qsr train experiment=demo/quadratic seed=2

The settings are those in configs/, described in qsr/config/schema.py; a list of values makes one
run per value. Without a launcher the ranks are started here. A run is stored in
runs/EXPERIMENT/seed_SEED; run the same command to resume it from its newest checkpoint. Exit
status: 0 done, 1 failed (if one of several runs fails, the others still run), 2 wrong settings, 75
stopped by a signal (SIGTERM, SIGUSR1, SIGUSR2, SIGHUP) with everything saved, 130 interrupted: the
first Ctrl-C saves everything, the second exits immediately.
"""

from typing import NoReturn

from qsr.cli.options import answer, read
from qsr.cluster.slurm import leave_when_signalled
from qsr.errors import showing_errors
from qsr.output import program


@showing_errors
def main(arguments: list[str]) -> int:
    line = read(arguments)
    status = answer(line, __doc__)
    if status is not None:
        return status
    leave_when_signalled()
    configs = line.configs()

    from qsr.session import carry_out  # imports torch, which is slow

    return carry_out(configs)


def run() -> NoReturn:
    """Run it with the command line's arguments; exits."""
    program(main)
