"""docs/cluster.md as a user follows it, where there is no Slurm; tests/slurm has one."""

import re
from pathlib import Path

import pytest

from qsr.cli import doctor, plan, submit
from qsr.cli.options import read
from qsr.config.load import load_config, to_dict
from qsr.config.schema import SlurmCluster
from tests.cluster_page import PAGE, SITE, commands


@pytest.fixture(autouse=True)
def _own_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "qsr" / "cluster").mkdir(parents=True)
    (tmp_path / "qsr" / "cluster" / "mine.yaml").write_text(SITE)


def test_the_page_is_read_in_minutes() -> None:
    assert len(PAGE.split()) < 900


def test_each_line_of_the_site_is_a_setting_that_arrives() -> None:
    line = read(["experiment=vit_b16_b4096/quadratic_h4", "cluster=mine"])
    cluster = line.config().cluster
    assert isinstance(cluster, SlurmCluster)
    assert (cluster.name, cluster.partition, cluster.account) == ("mine", "gpu", "lab")
    assert (cluster.nodes, cluster.gpus_per_node, cluster.cpus_per_task) == (2, 8, 8)
    assert cluster.setup == ("source /shared/env/bin/activate",)
    assert (cluster.python, cluster.network_interface) == ("python", "ib0")
    assert cluster.sbatch == {"exclusive": True}
    # the rest is as in configs/cluster/slurm.yaml
    bare = to_dict(load_config(["experiment=vit_b16_b4096/quadratic_h4", "cluster=slurm",
                                "cluster.nodes=2"]))["cluster"]  # fmt: skip
    own = to_dict(line.config())["cluster"]
    differ = {name for name in own if own[name] != bare[name]}
    changed = {"name", "partition", "account", "setup", "python", "network_interface", "sbatch"}
    assert differ == changed
    # the line for Apptainer
    container = re.search(r"`container: (.+?)`", PAGE)
    assert container is not None
    given = read([*line.settings, f"cluster.container='{container[1]}'"]).config().cluster
    assert isinstance(given, SlurmCluster)
    assert given.container == "apptainer exec --nv --bind /shared image.sif"


def test_the_trial_and_the_runs_are_submitted(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial, runs = commands("submit")
    here = [f"data.root={digits}", f"runs_dir={tmp_path / 'runs'}"]
    assert submit.main(["--dry-run", *trial, *here]) == 0
    batch = capsys.readouterr().out
    assert "  330 steps in 15 epochs" in batch
    wanted = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--partition=gpu",
              "--time=10", "--exclusive", "--account=lab")  # fmt: skip
    assert [option for option in wanted if f"#SBATCH {option}\n" not in batch] == []
    assert "\nsource /shared/env/bin/activate\n" in batch
    assert "\nexport NCCL_SOCKET_IFNAME=ib0\n" in batch
    own = f"runs_dir={tmp_path / 'runs'}"
    assert submit.main(["--dry-run", *runs, own, "speed=paper_2x8"]) == 0
    assert "; 60.60 hours in total (fitted), 969.6 GPU hours\n" in capsys.readouterr().out
    # a profile of other numbers of ranks
    assert submit.main(["--dry-run", *trial, *here, "speed=paper_2x8"]) == 0
    assert "no hours: the job has 2 x 2 ranks, but speed=paper_2x8 is about 2 x 8 ranks" in (
        capsys.readouterr().out
    )


def test_the_doctor_prints_the_line_that_asks_the_nodes(
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (words,) = commands("doctor")
    here = [f"data.root={digits}", f"runs_dir={tmp_path / 'runs'}", "tracking=none"]
    assert doctor.main([*words, *here]) == 1  # without Slurm
    *_, last = capsys.readouterr().out.splitlines()
    assert "srun --nodes=2 --ntasks-per-node=2 --gpus-per-node=2 " in last


def test_the_calibration_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = commands("plan")
    name, settings = words.pop(), words[1:]
    assert (words[0], name) == ("calibrate", "name=mine")
    assert plan.main([*settings, "--json"]) == 0
    assert plan.main([*words, "name=paper_2x8"]) == 2  # as the page's, but for the name
    assert "choose another name" in capsys.readouterr().err
