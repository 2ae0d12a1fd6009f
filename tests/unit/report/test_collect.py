"""Run folders written by hand -> records, tables and pictures."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch

from qsr.config import schema
from qsr.config.load import load_config, to_dict
from qsr.core.plan import Plan
from qsr.core.rules import ConstantRule, QuadraticRule
from qsr.core.schedules import CosineSchedule
from qsr.errors import ReportError
from qsr.report.collect import (
    Run,
    group_by_label,
    read_run,
)
from qsr.report.plots import accuracy_figure, schedule_figure
from qsr.report.style import save
from qsr.report.symbols import typeset
from qsr.report.tables import averages_table_markdown, rule_table, rule_table_markdown
from tests.support import SYNC

# 1,442 images in batches of 64: 22 steps an epoch, 4 epochs
STEPS = 88
SCHEDULE = CosineSchedule(peak_lr=0.2, final_lr=1e-6, warmup_steps=22, total_steps=STEPS)
PLANS = {
    "constant H = 4": Plan(SCHEDULE, ConstantRule(4)),
    "QSR, H_base = 4, alpha = 0.4": Plan(SCHEDULE, QuadraticRule(4, 0.4)),
}
SETTINGS = {
    "constant H = 4": ["sync=constant", "sync.h=4"],
    "QSR, H_base = 4, alpha = 0.4": ["sync=quadratic", "sync.h_base=4", "sync.alpha=0.4"],
}


@cache
def base_config(label: str) -> schema.Config:
    settings = ["epochs=4", "schedule.peak_lr=0.2", "schedule.warmup_epochs=1", *SETTINGS[label]]
    return load_config(["experiment=demo/parallel", *settings])


def write_run(root: Path, label: str, seed: int, top1: float, **summary: float) -> Path:
    """A run folder; its evaluations rise to `top1` in equal steps from 0."""
    config = replace(base_config(label), seed=seed)
    folder = root / f"{config.sync.rule}_{seed}"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    rows: list[dict[str, Any]] = []
    for epoch in (1, 2, 3, 4):
        rows.append({"kind": "train", "step": 22 * epoch, "loss": 1.0 / epoch})
        rows.append({"kind": "eval", "step": 22 * epoch, "top1": top1 * epoch / 4, "loss": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = PLANS[label]
    values = {
        "seed": seed,
        "train_images": 1442,
        "top1": top1,
        "averages": plan.num_rounds,
        "volume": plan.volume,
        "bytes_sent_per_worker": 1_500_000 * plan.num_rounds,
        "train_seconds": 10.0 + seed,
    }
    (folder / "summary.json").write_text(json.dumps(values | summary))
    return folder


@pytest.fixture
def groups(tmp_path: Path) -> dict[str, list[Run]]:
    """Two rules; three seeds of the first and one of the second."""
    constant, quadratic = PLANS
    folders = [
        write_run(tmp_path, constant, 1, 90.0, communication_seconds=2.0),
        write_run(tmp_path, quadratic, 1, 92.0),
        write_run(tmp_path, constant, 2, 91.0, communication_seconds=3.0),
        write_run(tmp_path, constant, 3, 95.0, communication_seconds=7.0),
    ]
    return group_by_label([read_run(folder) for folder in folders])


def test_a_run_is_what_its_folder_holds(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "QSR, H_base = 4, alpha = 0.4", 2, 90.0)
    run = read_run(folder)
    assert run.folder == folder
    assert (run.config.seed, run.config.epochs) == (2, 4)
    assert run.config.sync == schema.QuadraticSync(**SYNC, rule="quadratic", h_base=4, alpha=0.4)
    assert run.summary["top1"] == 90.0
    assert len(run.metrics) == 8
    assert run.evaluations() == [
        {"kind": "eval", "step": 22 * epoch, "top1": 22.5 * epoch, "loss": 0.5}
        for epoch in (1, 2, 3, 4)
    ]
    assert run.label == "QSR, H_base = 4, alpha = 0.4"
    assert list(run.plan.rounds()) == list(PLANS[run.label].rounds())


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "constant H = 4", 1, 90.0)
    (folder / "summary.json").unlink()
    with pytest.raises(ReportError, match="constant_1 holds no finished run"):
        read_run(folder)
    with pytest.raises(ReportError, match="nowhere holds no finished run"):
        read_run(tmp_path / "nowhere")


def test_seeds_are_grouped_in_order_of_first_appearance(groups: dict[str, list[Run]]) -> None:
    seeds = {label: [run.config.seed for run in runs] for label, runs in groups.items()}
    assert list(seeds.items()) == [
        ("constant H = 4", [1, 2, 3]),
        ("QSR, H_base = 4, alpha = 0.4", [1]),
    ]


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        (["sync=parallel"], "data parallel"),
        (["sync=every_step", "sync.average=parameters"], "local, H = 1"),
        (["sync=power", "sync.h_base=2", "sync.coefficient=0.5", "sync.exponent=3"],
         "H_base = 2, (0.5/lr)^3"),
        (["sync=post_local", "sync.switch_epoch=3", "sync.h=8"],
         "post-local from epoch 3, H = 8"),
        (["sync=swap", "sync.switch_epoch=3"], "SWAP from epoch 3"),
        (["sync=stagewise", "sync.h=4"], "stagewise doubling from H = 4"),
        (["sync=growing", "sync.h_base=2", "sync.growth=0.5"], "H = 2 + 0.5 x round"),
    ],
)  # fmt: skip
def test_rules_in_words(settings: list[str], label: str) -> None:
    assert load_config(["experiment=demo/parallel", *settings]).sync.label == label


def test_the_table_holds_means_and_the_spread_over_seeds(groups: dict[str, list[Run]]) -> None:
    constant, quadratic = rule_table(groups).to_dict("records")
    assert constant == {
        "rule": "constant H = 4",
        "seeds": 3,
        "top1_mean": pytest.approx(92.0),
        # (4 + 1 + 9) / (3 - 1) = 7
        "top1_std": pytest.approx(7**0.5),
        "averages": 22,
        "volume": 0.25,
        "bytes_sent_per_worker": 33_000_000,
        "train_seconds": 12.0,
        "communication_seconds": 4.0,
    }
    assert quadratic["seeds"] == 1
    assert quadratic["top1_mean"] == 92.0
    assert quadratic["averages"] == PLANS["QSR, H_base = 4, alpha = 0.4"].num_rounds < 22
    # one seed has no spread, and nothing was measured
    assert np.isnan(quadratic["top1_std"])
    assert np.isnan(quadratic["communication_seconds"])


def table_of_two_rows() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "rule": ["data parallel", "QSR"],
            "seeds": [1, 3],
            "top1_mean": [93.456, 94.0],
            "top1_std": [float("nan"), 0.125],
            "averages": [330.0, 42.0],
            "volume": [1.0, 42 / 330],
            "bytes_sent_per_worker": [1.5e8, 19_080_000.0],
            "train_seconds": [12.34, 9.0],
            "communication_seconds": [float("nan"), 0.25],
        }
    )


def test_averages_and_bytes_beside_the_plan(tmp_path: Path) -> None:
    label = "constant H = 4"
    run = read_run(write_run(tmp_path, label, 1, 90.0, bytes_sent_per_worker=10_303_656))
    planned = {"averages": 23, "bytes_sent_per_worker": 10_301_544_000}
    run = replace(run, summary=run.summary | {"planned": planned})
    text = averages_table_markdown({label: run})
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()]
    assert rows[0] == [
        *("run", "steps", "averages planned", "averages made", "volume %"),
        *("MB per worker, planned", "MB per worker, sent"),
    ]
    assert rows[2:] == [[label, "88", "23", "22", "25.0", "10,301.544", "10.304"]]


def test_markdown_to_the_letter() -> None:
    assert rule_table_markdown(table_of_two_rows()) == (
        "| rule          | seeds | top-1 %      | rounds | volume % | MB sent per worker "
        "| training s | of it communication s |\n"
        "|---------------|-------|--------------|--------|----------|--------------------"
        "|------------|-----------------------|\n"
        "| data parallel | 1     | 93.46        | 330    | 100.0    | 150.0              "
        "| 12.3       | -                     |\n"
        "| QSR           | 3     | 94.00 ± 0.12 | 42     | 12.7     | 19.1               "
        "| 9.0        | 0.2                   |\n"
    )


def test_what_no_run_measured_is_a_dash(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path, "constant H = 4", seed, 90.0)) for seed in (1, 2)]
    table = rule_table(group_by_label(runs))
    assert "communication_seconds" not in table
    last = rule_table_markdown(table).splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")] == [
        "constant H = 4", "2", "90.00 ± 0.00", "22", "25.0", "33.0", "11.5", "-",
    ]  # fmt: skip


def line_data(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def test_the_schedule_is_drawn_as_planned(groups: dict[str, list[Run]]) -> None:
    rates, rounds = schedule_figure(groups).axes
    (line,) = rates.lines
    assert line_data(line)[1] == [SCHEDULE(step) for step in range(STEPS)]

    stairs = [patch for patch in rounds.patches if isinstance(patch, StepPatch)]
    assert len(stairs) == len(rounds.lines) == len(PLANS)
    for patch, marks, (label, plan) in zip(stairs, rounds.lines, PLANS.items(), strict=True):
        lengths = [round_.length for round_ in plan.rounds()]
        ends = [round_.end for round_ in plan.rounds()]
        values, edges, _ = patch.get_data()
        assert list(values) == lengths
        assert list(edges) == [0, *ends]
        assert line_data(marks) == (ends, lengths)
        volume = 100 * len(lengths) / STEPS
        assert (
            patch.get_label() == f"{typeset(label)}: {len(lengths)} rounds, volume {volume:.1f} %"
        )
        assert patch.get_edgecolor() == pytest.approx(line_rgba(marks))
    assert rounds.get_yscale() == "log"


def line_rgba(line: Line2D) -> Any:
    patch = StepPatch([1], [0, 1])
    patch.set_edgecolor(line.get_color())
    return patch.get_edgecolor()


def test_accuracy_is_drawn_with_mean_and_range(groups: dict[str, list[Run]]) -> None:
    left, right = accuracy_figure(groups).axes
    constant, quadratic = left.lines
    # over averages, not over steps: H = 4 has 5, 11, 16 and 22 of them after 1 to 4 epochs
    assert line_data(constant)[0] == [5, 11, 16, 22]
    ends = [round_.end for round_ in PLANS["QSR, H_base = 4, alpha = 0.4"].rounds()]
    averages = [sum(end <= step for end in ends) for step in (22, 44, 66, 88)]
    assert line_data(quadratic)[0] == averages
    for line in (constant, quadratic):  # the constant rule's seeds reach 92 % on average
        assert line_data(line)[1] == pytest.approx([77.0, 54.0, 31.0, 8.0])
    assert [text.get_text() for text in left.texts] == ["22 averages", f"{len(ends)} averages"]
    band = left.collections[0].get_paths()[0].vertices
    # at the last step the seeds' errors are 10, 9 and 5
    at_end = np.asarray(band)[np.asarray(band)[:, 0] == 22][:, 1]
    assert (at_end.min(), at_end.max()) == pytest.approx((5.0, 10.0))

    seeds, mean, single, single_mean = right.lines
    assert line_data(seeds)[1] == [90.0, 91.0, 95.0]
    left_most, middle, right_most = line_data(seeds)[0]  # side by side
    assert left_most < middle < right_most
    assert middle == pytest.approx(25.0)
    assert line_data(mean) == ([25.0], [92.0])
    volume = 100 * PLANS["QSR, H_base = 4, alpha = 0.4"].volume
    assert line_data(single_mean) == ([volume], [92.0])
    assert line_data(single)[1] == [92.0]


@pytest.mark.parametrize("draw", [schedule_figure, accuracy_figure])
def test_the_same_picture_gives_the_same_files(
    tmp_path: Path, groups: dict[str, list[Run]], draw: Any
) -> None:
    for name in ("first", "second"):
        figure: Figure = draw(groups)
        save(figure, tmp_path / name)
    for suffix in (".svg", ".png"):
        first, second = ((tmp_path / name).with_suffix(suffix) for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_pictures_are_written_in_both_formats(tmp_path: Path, groups: dict[str, list[Run]]) -> None:
    save(schedule_figure(groups), tmp_path / "schedule")
    svg = (tmp_path / "schedule.svg").read_text()
    assert svg.rstrip().endswith("</svg>")
    assert "<dc:date>" not in svg
    pixels = mpl.image.imread(tmp_path / "schedule.png")
    assert pixels.shape[:2] == (752, 1024)  # 6.4 x 4.7 inches at 160 dots an inch
    assert np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 50


def test_more_rules_than_colours_are_all_drawn(groups: dict[str, list[Run]]) -> None:
    run = groups["constant H = 4"][0]
    many = {f"rule {number}": [run] for number in range(8)}
    assert len(schedule_figure(many).axes[1].lines) == 8
    assert len(accuracy_figure(many).axes[0].lines) == 8


def test_runs_that_differ_in_more_than_seed_and_rule_make_no_table(
    groups: dict[str, list[Run]],
) -> None:
    run, other = groups["constant H = 4"][:2]
    other = replace(other, config=replace(other.config, global_batch=128))
    with pytest.raises(ReportError, match="global_batch"):
        group_by_label([run, other])
