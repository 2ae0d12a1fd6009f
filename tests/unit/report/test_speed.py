"""Tables and pictures of benchmarks, from small records."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsr.config.load import CONFIG_DIR
from qsr.report.speed import (
    SPEED_TABLES,
    delay_markdown,
    read_benchmarks,
    scale_markdown,
    slow_link_markdown,
    speed_markdown,
)
from qsr.report.speed_plots import average_figure, scale_figure, slow_link_figure

BENCH = CONFIG_DIR.parent / "results" / "bench"


def value(median: float) -> dict[str, Any]:
    return {"median": median, "quartiles": [median - 0.01, median + 0.02], "repetitions": 3}


def method(relative: float, predicted: float, deviation: float) -> dict[str, Any]:
    return {
        "relative": value(relative),
        "predicted_relative": value(predicted),
        "ratio_to_prediction": value(1 + deviation),
    }


SLOW_LINK = {
    "shares": [
        {
            "share": None,
            "measured_share": value(0.012),
            "rate_mbit_per_second": None,
            "published_relative": None,
            "methods": {"blocking": method(1, 1, 0.01), "QSR": method(0.991, 0.989, -0.004)},
        },
        {
            "share": 0.27,
            "measured_share": value(0.265),
            "rate_mbit_per_second": 1234.5,
            "published_relative": 20.2 / 26.7,
            "methods": {"blocking": method(1, 1, 0.01), "QSR": method(0.77, 0.76, -0.021)},
        },
    ]
}


def test_a_link_a_row() -> None:
    assert slow_link_markdown(SLOW_LINK).splitlines() == [
        "| communication | link         | QSR           | the paper's QSR | off prediction |",
        "|---------------|--------------|---------------|-----------------|----------------|",
        "| 1.2 %         | not limited  | 0.991 (0.989) |                 | -0.4 to +1.0 % |",
        "| 26.5 %        | 1,234 Mbit/s | 0.770 (0.760) | 0.757           | -2.1 to +1.0 % |",
    ]


def test_the_picture_of_links_holds_what_was_measured() -> None:
    axes = slow_link_figure(SLOW_LINK).axes[0]
    (bars,) = axes.containers
    assert np.asarray(bars[0].get_xydata()).tolist() == [[1.2, 0.991], [26.5, 0.77]]
    (paper,) = [line for line in axes.lines if line.get_label() == "the paper's QSR"]
    assert np.asarray(paper.get_xydata()).tolist() == [[27, 20.2 / 26.7]]


def scale_row(workers: int, link: str, lost: float) -> dict[str, Any]:
    return {
        "network": "ViT",
        "link": link,
        "workers": workers,
        "steps_lost_per_1000": lost,
        "steps_lost_per_1000_data_parallel_blocking": 10 * lost,
    }


def test_workers_by_links() -> None:
    per_worker = {"slow": 1 / 2, "fast": 1 / 8}
    rows = [scale_row(n, link, n * each) for link, each in per_worker.items() for n in (2, 4096)]
    assert scale_markdown({"modelled": rows}).splitlines() == [
        "| workers | ViT, slow | ViT, fast |",
        "|---------|-----------|-----------|",
        "| 2       | 1.00      | 0.25      |",
        "| 4,096   | 2048.00   | 512.00    |",
    ]


def test_every_seed_of_a_delay() -> None:
    record = {"seeds": [1, 2], "by_delay": {"0": {"mean": 90.5, "top1": [90.0, 91.0]}}}
    assert delay_markdown(record).splitlines() == [
        "| delay (steps) | top-1, mean % | seed 1 | seed 2 |",
        "|---------------|---------------|--------|--------|",
        "| 0             | 90.50         | 90.00  | 91.00  |",
    ]


def test_the_machine_is_named_below(tmp_path: Path) -> None:
    about = {"gpu": None, "cpu": "Some CPU", "cores": 2, "packages": {"torch": "2.15.0"}}
    record = {"environment": about, "seeds": [1], "by_delay": {"0": {"mean": 9.0, "top1": [9.0]}}}
    (tmp_path / "delay.json").write_text(json.dumps(record))
    (tmp_path / "checkpoint.json").write_text("{}")  # its numbers stand in a text
    assert read_benchmarks(tmp_path) == {"delay": record}
    table = speed_markdown("delay", record)
    assert table.endswith("|\n\nRecorded on Some CPU, 2 cores, torch 2.15.0.\n")


@pytest.mark.parametrize("name", SPEED_TABLES)
def test_what_is_recorded_can_be_shown(name: str) -> None:
    record = read_benchmarks(BENCH)[name]
    rows = speed_markdown(name, record).splitlines()
    assert len(rows) >= 4
    draw = {"slow_link": slow_link_figure, "average": average_figure, "scale": scale_figure}
    if name in draw:
        assert draw[name](record).axes
