"""Plans of experiments, beside the paper."""

from dataclasses import replace
from pathlib import Path

import pytest

from qsr.errors import ConfigError
from qsr.report.paper import Reference, ReferenceRow, read_reference
from qsr.report.plans import experiment_plan, volume_table_markdown
from tests.unit.report.conftest import plan_of


def test_an_experiment_has_a_plan() -> None:
    plan = experiment_plan("demo/quadratic")
    assert (plan.total_steps, plan.num_rounds) == (330, 38)
    assert experiment_plan("demo/quadratic", "epochs=30").total_steps == 660
    with pytest.raises(ConfigError, match="no such file in configs"):
        experiment_plan("demo/quadratc")
    with pytest.raises(ConfigError, match=r"set data\.train_images=N"):
        experiment_plan("demo/quadratic", "data.train_images=null")


def rows_of_the_table(rows: list[ReferenceRow]) -> list[list[str]]:
    lines = volume_table_markdown(rows, plan_of).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_volumes_are_compared_to_the_digit_where_they_are_verified(reference: Path) -> None:
    row = read_reference(reference)[1]
    published = (
        Reference(11.5, "D"),
        Reference(11.6, "D"),
        Reference(11.5, "R"),
        Reference(99.0, "R"),
        None,
    )
    head, _, *lines = rows_of_the_table([replace(row, volume_percent=one) for one in published])
    assert head == [
        *("table", "experiment", "alpha", "steps", "rounds", "longest H"),
        *("volume %, plan", "volume %, paper", "equal"),
    ]
    assert lines[0][:7] == ["1b", "`demo/quadratic`", "0.4375", "330", "38", "78", "11.5"]
    assert [line[7:] for line in lines] == [
        ["11.5 [D]", "yes"],
        ["11.6 [D]", "NO"],
        ["11.5 (unverified)", "not compared"],
        ["99.0 (unverified)", "not compared"],
        ["-", "-"],
    ]
