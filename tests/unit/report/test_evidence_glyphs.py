"""The tables of the study of unseen fonts, from records that can be worked out by hand."""

from pathlib import Path
from typing import Any

import pytest

from qsr.report.evidence_glyphs import (
    LABELS,
    glyphs_figure,
    glyphs_markdown,
    has_comparison,
    rates_markdown,
    read_glyphs,
)

RESULTS = Path(__file__).parents[3] / "results"


def run(rule: str, seed: int, error: float, **changes: Any) -> dict[str, Any]:
    values = {"model": "resnet", "noise": 0.2, "rate_factor": 1.0, "rate": 0.2, "volume": 0.25}
    about = {"rule": rule, "seed": seed, "top1": 100 - error, "best_top1": 101 - error}
    evaluations = [{"step": 10, "top1": 50.0}, {"step": 20, "top1": 100 - error}]
    return values | about | {"evaluations": evaluations} | changes


RECORDS = [
    *(run("parallel", seed, error, volume=1.0) for seed, error in ((1, 12.0), (2, 14.0))),
    *(run("quadratic", seed, error) for seed, error in ((2, 11.0), (1, 10.0))),
    *(run(rule, 1, 20.0, rate_factor=2.0, rate=0.4) for rule in ("parallel", "quadratic")),
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rules_are_compared_by_seed() -> None:
    """Differences are -2 and -3: half the interval is 12.706 x 0.5; t = -5 with one degree of
    freedom has p = 0.1257."""
    _, _, parallel, qsr = map(cells, glyphs_markdown(RECORDS).splitlines())
    assert parallel == ["data parallel", "100.0", "13.00 ± 12.71", "12.00 ± 12.71", "", "",
                        "2.50 ± 6.35", "0.13", ""]  # fmt: skip
    assert qsr[:8] == ["QSR", "25.0", "10.50 ± 6.35", "9.50 ± 6.35", "-2.50 ± 6.35", "0.13", "", ""]
    assert int(qsr[8]) > 2


def test_the_runs_that_chose_the_rates() -> None:
    assert list(map(cells, rates_markdown(RECORDS).splitlines()[2:])) == [
        ["small ResNet", "0.2", "12.00", "10.00"],
        ["small ResNet", "0.4", "20.00", "20.00"],
    ]


def test_a_single_seed_is_no_comparison() -> None:
    assert has_comparison(RECORDS)
    assert not has_comparison(RECORDS[4:])


def test_the_recorded_study_has_all_rules_with_five_seeds() -> None:
    records = read_glyphs(RESULTS)
    lines = glyphs_markdown(records).splitlines()[2:]
    assert [cells(line)[0] for line in lines] == list(LABELS.values())
    _, after = glyphs_figure(records).axes
    assert {text.get_text() for text in after.texts} == set(LABELS.values())
    parallel = [r for r in records if r["rule"] == "parallel" and r["rate_factor"] == 1.0]
    assert len([r for r in parallel if r["model"] == "resnet"]) == 5
    points = [bars[0].get_xydata()[0] for bars in after.containers]
    assert any(point == pytest.approx((100.0, 13.93), abs=0.005) for point in points)
