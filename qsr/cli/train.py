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

from qsr.cli.usage import show_help
from qsr.cluster.slurm import leave_when_signalled
from qsr.config.load import load_configs
from qsr.errors import showing_errors
from qsr.output import program


@showing_errors
def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        return show_help(__doc__)
    leave_when_signalled()
    configs = load_configs(arguments)

    from qsr.session import carry_out  # imports torch, which is slow

    return carry_out(configs)


def run() -> NoReturn:
    """Run it with the command line's arguments; exits."""
    program(main)
