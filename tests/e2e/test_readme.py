"""The README's code runs, its commands exist, and its links and those of docs/ lead somewhere."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr.cli import prepare
from qsr.config.load import load_config, load_configs, run_folder
from qsr.planner.forecast import forecast
from qsr.train.model_file import Description

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DATA = (ROOT / "docs" / "data.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "slurm" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_rule_in_your_own_loop() -> None:
    """As it stands, with ten batches."""
    section = README.partition("## The rule in your own loop\n")[2].partition("H follows")[0]
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.008)
    evaluated: list[torch.nn.Module] = []
    names: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        "loss": torch.nn.functional.cross_entropy,
        "loader": [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))] * 10,
        "evaluate": evaluated.append,
    }
    exec(_code(section), names)
    assert names["sync"].summary()["h"] == 4
    assert names["sync"].averages == 2
    assert evaluated == [model]


def test_the_plan_in_python() -> None:
    section = README.partition("In Python, with any schedule")[2].partition("\n**")[0]
    names: dict[str, Any] = {}
    exec(_code(section), names)
    numbers = re.search(r"# (\d+), ([\d.]+)", section)
    assert numbers is not None
    plan = names["plan"]
    assert str(plan.num_rounds) == numbers[1]
    assert f"{plan.volume:.5f}" == numbers[2]


def _code(section: str) -> str:
    return "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))


def test_the_demo_averages_as_often_as_the_readme_says() -> None:
    from qsr.config.planning import make_plan

    counts = {}
    for name in ("parallel", "quadratic"):
        config = load_config([f"experiment=demo/{name}"])
        counts[name] = make_plan(config, 1442).num_rounds
    text = " ".join(README.split())
    expected = (
        f"QSR averages {counts['quadratic']} times in {counts['parallel']} steps, data parallel "
        f"training {counts['parallel']} times"
    )
    assert expected in text


def test_every_preparing_command_is_accepted() -> None:
    commands = DATA.replace("\\\n", " ")
    found = re.findall(r"^    python scripts/prepare\.py ([^#\n]+)", commands, re.MULTILINE)
    assert len(found) == 6
    for command in found:
        prepare.parser(Path("data")).parse_args(command.split())


def test_every_training_command_is_accepted() -> None:
    commands = (README + DATA).replace("\\\n", " ")
    # those that end with ... are not whole
    found = re.findall(r"scripts/train\.py (.+[^.\n])$", commands, re.MULTILINE)
    assert len(found) == 6
    folders = {run_folder(c) for command in found for c in load_configs(command.split())}
    assert len(folders) == 7  # ours and torchrun's are the same run, one command gives three


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https:"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name) if name else page
            assert target.exists(), link
            assert not anchor or anchor in headings(target), link


def test_the_page_of_the_run_folder_has_every_field() -> None:
    text = (ROOT / "docs" / "run-folder.md").read_text()
    metrics, summary, model = text.partition("## metrics.jsonl")[2].split("\n## ")
    run = ROOT / "results" / "runs" / "demo" / "quadratic" / "seed_1"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"train", "eval"}
    named = {field for row in rows for field in row}
    assert named <= set(re.findall(r"`(\w+)`", metrics))
    assert json.loads((run / "summary.json").read_text()).keys() <= set(
        re.findall(r"`(\w+)`", summary)
    )
    fields = {field.name for field in dataclasses.fields(Description)}
    assert fields <= set(re.findall(r"`(\w+)`", model))
    data = json.loads((run / "data.json").read_text())
    assert data.keys() <= set(re.findall(r"`(\w+)`", text))


@pytest.mark.parametrize("page", ["README.md", "docs/planning.md", "docs/reproduction.md"])
def test_every_command_with_an_experiment_is_accepted(page: str) -> None:
    commands = (ROOT / page).read_text().replace("\\\n", " ")
    names = "train|plan|submit|doctor"
    found = re.findall(rf"scripts/({names})\.py (experiment=[a-z][^#\n`]*)", commands)
    assert len(found) >= 2
    for script, command in found:
        # a calibration writes this profile
        configs = load_configs(command.replace("speed=mine", "").split())
        if script == "plan":
            assert all(forecast(config).plan.num_rounds > 0 for config in configs)
