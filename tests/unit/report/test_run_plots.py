"""What is drawn of single runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from qsr.report.collect import Run, read_run
from qsr.report.run_plots import averages_figure, loss_figure, time_figure
from tests.unit.report.conftest import WriteRun

METRICS: list[dict[str, Any]] = [
    {"kind": "train", "step": 50, "epoch": 2.5, "loss": 1.5, "averages": 12},
    {"kind": "eval", "step": 66, "epoch": 3.0, "loss": 0.4, "top1": 90.0, "shadow": True},
    {"kind": "train", "step": 100, "epoch": 4.5, "averages": 24},
    {"kind": "eval", "step": 110, "epoch": 5.0, "loss": 0.3, "top1": 95.0, "shadow": False},
    {"kind": "train", "step": 110, "epoch": 5.0, "loss": 0.5, "averages": 26},
]


@pytest.fixture
def make_run(write_run: WriteRun) -> Any:
    def make(*settings: str, metrics: list[dict[str, Any]] = METRICS, **summary: Any) -> Run:
        values = {"train_images": 1442, "evaluation_seconds": 6.0, "checkpoint_seconds": 0.5}
        folder: Path = write_run(*settings, "epochs=5", **(values | summary))
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)) + "\n")
        return read_run(folder)

    return make


def scattered(axes: Axes) -> list[tuple[list[list[float]], list[str]]]:
    """Places and fills of the marks of each run."""
    return [
        (
            np.asarray(marks.get_offsets()).tolist(),
            [to_hex(tuple(color)) for color in np.asarray(marks.get_facecolor())],
        )
        for marks in axes.collections
        if isinstance(marks, PathCollection)
    ]


def test_losses_over_epochs_with_hollow_marks_within_rounds(make_run: Any) -> None:
    run = make_run("experiment=demo/constant")
    figure = loss_figure({"constant H = 4": run})
    training, validation, error = figure.axes
    color = "#e69f00"
    assert scattered(training) == [([[2.5, 1.5], [5.0, 0.5]], [color, color])]
    assert scattered(validation) == [([[3.0, 0.4], [5.0, 0.3]], ["#ffffff", color])]
    assert scattered(error) == [([[3.0, 10.0], [5.0, 5.0]], ["#ffffff", color])]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "constant $H$ = 4",
        "in the middle of a round",
    ]


def test_averages_as_planned_and_as_counted(make_run: Any) -> None:
    (axes,) = averages_figure({"constant H = 4": make_run("experiment=demo/constant")}).axes
    planned, counted = axes.lines[:2]
    # 110 steps in rounds of 4, the last one of 2
    assert np.asarray(planned.get_xdata()).tolist() == [0, *range(4, 110, 4), 110]
    assert np.asarray(planned.get_ydata()).tolist() == list(range(29))
    assert np.stack(counted.get_data()).T.tolist() == [[50, 12], [100, 24], [110, 26]]


def bars(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Start and width of each run's bar, by the part of the run."""
    found: dict[str, list[tuple[float, float]]] = {}
    for container in axes.containers:
        patches = [patch for patch in container if isinstance(patch, Rectangle)]
        found[str(container.get_label())] = [
            (patch.get_x(), patch.get_width()) for patch in patches
        ]
    return found


def test_time_by_its_parts(make_run: Any) -> None:
    runs = {
        "data parallel": make_run("experiment=demo/parallel"),
        "QSR": make_run("experiment=demo/quadratic", communication_seconds=10.0),
    }
    (axes,) = time_figure(runs).axes
    assert bars(axes) == {
        "computing": [(0, 0), (0, 62)],
        "computing and communication, overlapped": [(0, 72), (62, 0)],
        "communication": [(72, 0), (62, 10)],
        "evaluations": [(72, 6), (72, 6)],
        "checkpoints": [(78, 0.5), (78, 0.5)],
    }
    assert [text.get_text() for text in axes.texts] == ["78.5", "78.5"]
    assert axes.get_xlabel() == "time (seconds)"


@pytest.mark.parametrize(
    ("seconds", "unit", "shown"),
    [(113.0, "seconds", "119.5"), (234.0, "minutes", "4.0"), (7193.5, "hours", "2.0")],
)
def test_the_unit_follows_the_longest_run(
    make_run: Any, seconds: float, unit: str, shown: str
) -> None:
    run = make_run("experiment=demo/quadratic", train_seconds=seconds, communication_seconds=1.0)
    (axes,) = time_figure({"QSR": run}).axes
    assert axes.get_xlabel() == f"time ({unit})"
    assert [text.get_text() for text in axes.texts] == [shown]
