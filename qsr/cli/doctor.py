"""Check whether a run would start here, by trying everything that it needs.

    qsr doctor experiment=demo/quadratic
    qsr doctor experiment=vit_b16_b4096/quadratic_h4 cluster=slurm cluster.nodes=2
    srun --nodes=2 --ntasks-per-node=8 qsr doctor experiment=...

Takes the settings of `qsr train`; without an experiment it takes demo/quadratic, and of a list of
runs the first. Checks the device,
the data, the network, the plan, the run folder, the free space for checkpoints, decoding, a
training pass, whether the loader keeps up with it (if not, what it is short of and the setting to
change), wandb, and an all-reduce between the ranks: those of a launcher, such as srun in an
allocation, or processes started here. With cluster=slurm on a login node, checks what is possible
there. Exit status: 0 all checks passed, 1 a check failed, 2 wrong settings.
"""

import shlex
from typing import NoReturn

from qsr.cli.options import answer, read
from qsr.cluster.slurm import current_task
from qsr.config.schema import SlurmCluster
from qsr.errors import showing_errors
from qsr.output import program


@showing_errors
def main(arguments: list[str]) -> int:
    if not any(word.lstrip("+").startswith("experiment=") for word in arguments):
        arguments = [*arguments, "experiment=demo/quadratic"]
    line = read(arguments)
    status = answer(line, __doc__)
    if status is not None:
        return status
    config, *others = line.configs()
    if others:
        print(f"for the first of {len(others) + 1} runs, {config.experiment} seed {config.seed}:")

    from qsr.cluster.processes import start_ranks
    from qsr.errors import ClusterError, RunFailedError
    from qsr.ops.doctor import examine, examine_login_node
    from qsr.session import number_of_ranks

    try:
        if isinstance(config.cluster, SlurmCluster) and current_task() is None:
            well = examine_login_node(config)
            print(
                "to check the nodes as well: "
                f"{_on_the_nodes(config.cluster)} {shlex.join(arguments)}"
            )
            return 0 if well else 1
        return 0 if start_ranks(examine, number_of_ranks(config), config) else 1
    except (ClusterError, RunFailedError) as error:
        print(f"FAIL  {error}", flush=True)
        return 1


def _on_the_nodes(cluster: SlurmCluster) -> str:
    options = {
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.tasks_per_node,
        "gpus-per-node": cluster.gpus_per_node or None,
        "cpus-per-task": cluster.cpus_per_task,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
    }
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    python = [cluster.container or "", cluster.python or "python", "-m qsr doctor"]
    return " ".join(["srun", shlex.join([*words, *cluster.srun_arguments]), *filter(None, python)])


def run() -> NoReturn:
    """Run it with the command line's arguments; exits."""
    program(main)
