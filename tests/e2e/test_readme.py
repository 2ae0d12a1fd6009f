"""The README's code runs, and its commands exist."""

import re
import runpy
from pathlib import Path

import pytest

from qsr.config.load import load_config, load_configs, run_folder
from qsr.planner.forecast import forecast

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_plan_in_your_own_code() -> None:
    section = README.partition("## The plan, in your own code")[2].partition("Schedules:")[0]
    names: dict[str, object] = {}
    exec("\n".join(line[4:] for line in section.splitlines()), names)
    numbers = re.search(r"# (\d+), ([\d.]+)", section)
    assert numbers is not None
    plan = names["plan"]
    assert str(plan.num_rounds) == numbers[1]  # type: ignore[attr-defined]
    assert f"{plan.volume:.5f}" == numbers[2]  # type: ignore[attr-defined]


def test_the_demo_averages_as_often_as_the_readme_says() -> None:
    from qsr.config.planning import make_plan

    counts = {}
    for name in ("parallel", "quadratic"):
        config = load_config([f"experiment=demo/{name}"])
        counts[name] = make_plan(config, 1442).num_rounds
    text = " ".join(README.split())
    expected = (
        f"QSR averages {counts['quadratic']} times in {counts['parallel']} steps where data "
        f"parallel training does so {counts['parallel']} times"
    )
    assert expected in text


def test_every_preparing_command_is_accepted() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "prepare.py"))
    commands = (README + (ROOT / "docs" / "data.md").read_text()).replace("\\\n", " ")
    found = re.findall(r"^    python scripts/prepare\.py ([^#\n]+)", commands, re.MULTILINE)
    assert len(found) == 6
    for command in found:
        script["_parser"]().parse_args(command.split())


def test_every_training_command_is_accepted() -> None:
    commands = README.replace("\\\n", " ")
    found = re.findall(r"scripts/train\.py (.+)", commands)
    assert len(found) == 5
    folders = {run_folder(c) for command in found for c in load_configs(command.split())}
    assert len(folders) == 6  # ours and torchrun's are the same run, one command gives three
    for path in re.findall(r"\]\(([a-z][\w./-]+)\)", README):
        assert (ROOT / path.partition("#")[0]).exists(), path


@pytest.mark.parametrize("page", ["README.md", "docs/planning.md", "docs/reproduction.md"])
def test_every_command_with_an_experiment_is_accepted(page: str) -> None:
    commands = (ROOT / page).read_text().replace("\\\n", " ")
    names = "train|plan|submit|doctor"
    found = re.findall(rf"scripts/({names})\.py (experiment=[a-z][^#\n`]*)", commands)
    assert len(found) >= 3
    for script, command in found:
        # a calibration writes this profile
        configs = load_configs(command.replace("cluster=mine", "").split())
        if script == "plan":
            assert all(forecast(config).plan.num_rounds > 0 for config in configs)
