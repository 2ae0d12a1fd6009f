"""Settings of a Slurm cluster: what a job is asked for, and what is refused before."""

import re
from typing import Any

import pytest

from qsr.config.load import CONFIG_DIR, ConfigError, load_config, to_dict
from qsr.config.schema import SlurmCluster

SLURM = ["experiment=demo/quadratic", "cluster=slurm"]
CPUS = [*SLURM, "cluster.gpus_per_node=0", "cluster.ranks_per_node=2"]
"""Four workers on one node of two ranks."""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # how many ranks
        ([*CPUS, "cluster.nodes=3"], "cluster.nodes=3 x 2 ranks per node = 6 ranks do not divide "
         "workers=4: every rank holds the same number of workers; try 1 or 2 or 4 ranks"),
        (SLURM, "cluster.nodes=1 x 8 ranks per node = 8 ranks do not divide workers=4"),
        ([*SLURM, "cluster.gpus_per_node=2", "cluster.ranks_per_node=4"], "cluster.ranks_per_node=4"
         " exceeds cluster.gpus_per_node=2: every rank needs a GPU of its own"),
        ([*SLURM, "cluster.gpus_per_node=0"], "cluster.gpus_per_node=0 needs cluster.ranks_per_"),
        ([*CPUS, "cluster.ranks=4"], "cluster.ranks=4, but cluster.nodes x ranks per node = 2: "
         "leave out cluster.ranks"),
        # names, with the right one
        ([*CPUS, "cluster.partion=gpu"], "cluster.partion is not a setting of cluster.launcher="
         "slurm; did you mean cluster.partition?"),
        ([*CPUS, "+cluster.time_limit=60"], "did you mean cluster.time_limit_minutes?"),
        (["experiment=demo/quadratic", "cluster.partition=gpu"], "cluster.partition is not a "
         "setting of cluster.launcher=local"),
        # values
        ([*CPUS, "cluster.signal=SIGINT"], "cluster.signal='SIGINT': input should be 'SIGUSR1', "
         "'SIGUSR2' or 'SIGTERM'"),
        ([*CPUS, "checkpoint.stop_signals=[SIGTERM]"], "cluster.signal=SIGUSR2 is not in "
         "checkpoint.stop_signals: add it, or the run would end without a checkpoint"),
        ([*CPUS, "cluster.signal_lead_seconds=70000"], "cluster.signal_lead_seconds=70000"),
        ([*CPUS, "cluster.time_limit_minutes=5"], "cluster.signal_lead_seconds=300 is not shorter "
         "than cluster.time_limit_minutes=5: the job would be told to stop as soon as it starts"),
        ([*CPUS, "cluster.memory_gb=0"], "cluster.memory_gb=0"),
        ([*CPUS, "+cluster.environment.A-B=1"], "cluster.environment"),
        # what has a setting of its own
        ([*CPUS, "cluster.sbatch={nodes: 2}"], "cluster.sbatch.nodes: set cluster.nodes"),
        ([*CPUS, "cluster.sbatch={ntasks_per_node: 4}"], "cluster.sbatch.ntasks_per_node: set "
         "cluster.ranks_per_node"),
        ([*CPUS, "cluster.sbatch={exclusive: true, signal: KILL@5}"], "cluster.sbatch.signal: set "
         "cluster.signal and cluster.signal_lead_seconds"),
        ([*CPUS, "cluster.sbatch={array: 1-3}"], "cluster.sbatch.array: list values, as in "
         "seed=1,2,3, and set cluster.parallel"),
        (["experiment=demo/quadratic", "cluster.parallel=2"], "cluster.parallel is not a setting "
         "of cluster.launcher=local"),
        ([*CPUS, "cluster.parallel=0"], "cluster.parallel=0: input should be greater than or"),
    ],
)  # fmt: skip
def test_wrong_settings_get_one_clear_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        (["cluster.gpus_per_node=4"], 4),  # one per GPU
        (["cluster.gpus_per_node=2", "cluster.nodes=2"], 4),
        (["cluster.gpus_per_node=8", "cluster.ranks_per_node=2"], 2),
        # on CPUs a node's GPUs are no limit
        (["cluster.gpus_per_node=1", "cluster.ranks_per_node=2", "cluster.device=cpu"], 2),
        (["cluster.gpus_per_node=0", "cluster.ranks_per_node=1", "cluster.nodes=4"], 4),
        (["cluster.gpus_per_node=4", "cluster.ranks=4"], 4),
    ],
)
def test_ranks_of_a_job(overrides: list[str], ranks: int) -> None:
    cluster = load_config([*SLURM, *overrides]).cluster
    assert isinstance(cluster, SlurmCluster)
    assert cluster.job_ranks == ranks


def test_the_shortest_time_limit() -> None:
    load_config([*CPUS, "cluster.time_limit_minutes=1", "cluster.signal_lead_seconds=59"])


README = (CONFIG_DIR.parent / "slurm" / "README.md").read_text()
PAGE = (CONFIG_DIR.parent / "docs" / "cluster.md").read_text()


def settings() -> dict[str, Any]:
    return to_dict(load_config(CPUS))


def test_the_pages_name_settings_that_exist() -> None:
    names = set(re.findall(r"`(cluster|checkpoint|data)\.(\w+)`", README + PAGE))
    assert len(names) > 10
    known = settings()
    assert [f"{group}.{name}" for group, name in sorted(names) if name not in known[group]] == []


def test_the_readme_tells_the_defaults() -> None:
    rows = re.findall(r"^\| [^|]+ \| (\d+) (?:s|min) \| `cluster\.(\w+)` \|", README, re.MULTILINE)
    assert len(rows) == 3
    assert [(name, settings()["cluster"][name]) for _, name in rows] == [
        (name, float(value)) for value, name in rows
    ]
