"""The table of the deep networks, from a record that can be worked out by hand."""

import json
from typing import Any

import pytest

from qsr.config.load import CONFIG_DIR
from qsr.report.evidence_deep import deep_markdown, deep_report, rates_markdown
from qsr.report.statistics import compare, needed_pairs


def row(rule: str, errors: list[float], traces: list[float], rate: float = 0.2) -> dict[str, Any]:
    tuning = [
        {"rate": tried, "seed": seed, "error": 10 * tried + seed, "hessian_trace": 2.0 / tried}
        for tried in (0.1, 0.2, 0.4)
        for seed in (1, 2)
    ]
    test = [
        {
            "volume": 0.125,
            "error": error,
            "train_error": 0.0,
            "hessian_trace": trace,
            "hessian_trace_error": deviation,
        }
        for error, trace, deviation in zip(errors, traces, (3.0, 4.0, 0.0), strict=True)
    ]
    return {"model": "resnet", "rule": rule, "rate": rate, "tuning": tuning, "test": test}


RECORD = {
    "rows": [
        row("constant", [4.0, 4.0, 6.0], [10.0, 12.0, 14.0], rate=0.4),
        row("quadratic", [3.0, 2.0, 3.0], [10.0, 11.0, 15.0]),
    ]
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def test_the_table_by_hand() -> None:
    """Differences of 1, 2 and 3 points: 2 +- 4.303 * 1 / sqrt(3), t = 2 sqrt(3) = 3.46 of two
    degrees of freedom, p = 0.074. The errors of the estimates: sqrt((9 + 16) / 3)."""
    head, _, constant, qsr = map(cells, deep_markdown(RECORD).splitlines())
    found = dict(zip(head, constant, strict=True))
    assert found == {
        "model": "small ResNet",
        "rule": "constant H",
        "peak rate": "0.4 (edge)",
        "volume %": "12.5",
        "test error %": "4.67 ± 2.87",
        "tr(Hessian)": "12.00 ± 4.97",
        "error of its estimate": "2.89",
        "train error %": "0.00 ± 0.00",
        "error minus QSR's": "2.00 ± 2.48",
        "p": "0.074",
        "tr(H) minus QSR's": "0.00 ± 2.48",
        "p of tr(H)": "1",
        "seeds for 0.5 points": "34",
        "seeds for the difference": "5",
    }
    assert dict(zip(head, qsr, strict=True)) == {
        **dict.fromkeys(head, ""),
        "model": "small ResNet",
        "rule": "QSR",
        "peak rate": "0.2",
        "volume %": "12.5",
        "test error %": "2.67 ± 1.43",
        "tr(Hessian)": "12.00 ± 6.57",
        "error of its estimate": "2.89",
        "train error %": "0.00 ± 0.00",
    }


def test_the_committed_table_is_that_of_the_committed_record() -> None:
    folder = CONFIG_DIR.parent / "results" / "evidence"
    record = json.loads((folder / "deep.json").read_text())
    assert (folder / "deep.md").read_text() == deep_report(record)
    assert "small ResNet | QSR " in deep_report(record)


def test_all_rules_at_the_same_rates() -> None:
    """Means over the seeds 1 and 2 of 10 rate + seed, and of 2 / rate."""
    head, _, *lines = map(cells, rates_markdown(RECORD).splitlines())
    assert head == ["model", "peak rate", "constant H", "QSR"]
    assert lines == [
        ["small ResNet", "0.1", "2.50 / 20.0", "2.50 / 20.0"],
        ["small ResNet", "0.2", "3.50 / 10.0", "3.50 / 10.0"],
        ["small ResNet", "0.4", "5.50 / 5.0", "5.50 / 5.0"],
    ]


@pytest.mark.parametrize(
    ("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (1.5, 6), (2.0, 5)]
)
def test_needed_pairs_as_tables_of_power_say(effect: float, pairs: int) -> None:
    """Two-sided paired t-test, 5 %, power 80 %: G*Power's numbers."""
    assert needed_pairs(3 * effect, 3.0) == pairs
    assert needed_pairs(-3 * effect, 3.0) == pairs


def test_needed_pairs_at_the_borders() -> None:
    assert needed_pairs(0.0, 1.0) is None
    assert needed_pairs(1.0, float("nan")) is None
    assert needed_pairs(1.0, 0.0) == 2


def test_the_deviation_of_differences() -> None:
    assert compare([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]).deviation == 1.0
