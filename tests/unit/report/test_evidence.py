"""Tables and pictures of the simulations, from small records and from those committed."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.lines import Line2D

from qsr.config.load import CONFIG_DIR
from qsr.core.drift import psi
from qsr.report.evidence import drift_markdown, read_simulations, simulation_markdown
from qsr.report.evidence_controls import draw
from qsr.report.evidence_plots import (
    AT_PEAK,
    PAPER_WORKERS,
    multiplier_figure,
    paper_plans,
    sensitivity_figure,
    simulation_figure,
)

RESULTS = CONFIG_DIR.parent / "results" / "evidence" / "simulations"


def rule(volume: float, test: list[float | None], trace: list[float | None]) -> dict[str, Any]:
    return {
        "volume": volume,
        "diverged": sum(value is None for value in test),
        "test_error": test,
        "hessian_trace": trace,
    }


RECORD = {
    "config": {"seeds": 3, "problem": {"kind": "diagonal"}},
    "rules": {
        "QSR": rule(0.039, [1.0, 2.0, 3.0], [10.0, 10.0, 10.0]),
        "constant H": rule(0.25, [2.0, 4.0, None], [20.0, 22.0, None]),
        "constant H = 8": rule(0.125, [None, None, None], [None, None, None]),
    },
}


def test_a_rule_a_row() -> None:
    """QSR: 2 +- t(2) / sqrt(3), t(2) = 4.303. Constant H: pairs differ by 1 and 2, 1.5 +- 12.706 *
    0.5; t = 3 of one degree of freedom has p = 0.205."""
    assert simulation_markdown(RECORD).splitlines() == [
        "| rule           | volume | test error   | tr(Hessian) | diverged | difference to QSR | "
        "QSR better | p   |",
        "|----------------|--------|--------------|-------------|----------|-------------------|-"
        "-----------|-----|",
        "| QSR            | 0.039  | 2.00 ± 2.48  | 10.0 ± 0.0  |          |                   | "
        "           |     |",
        "| constant H     | 0.250  | 3.00 ± 12.71 | 21.0 ± 12.7 | 1 of 3   | 1.50 ± 6.35       | "
        "2 of 2     | 0.2 |",
        "| constant H = 8 | 0.125  |              |             | 3 of 3   |                   | "
        "           |     |",
    ]


def drift(h: int, multiplier: float, slow: float, discrete: float, noise: float) -> dict[str, Any]:
    return {
        "valley": "one eigenvalue", "workers": 8, "h": h, "lr": 0.02, "noise": noise,
        "multiplier": multiplier, "standard_error": 0.01 * multiplier,
        "predicted_continuous": slow, "predicted_discrete": discrete,
    }  # fmt: skip


def test_the_drift_beside_its_predictions() -> None:
    """Data parallel training, which is the reference, and more noise do not count."""
    rows = [
        drift(1, 1.0, 1.5, 1.0, 0.05),
        drift(2, 1.5, 2.0, 1.5, 0.05),
        drift(8, 4.0, 4.0, 3.9, 0.05),
        drift(8, 1.0, 4.0, 3.9, 2.0),
    ]
    (line,) = drift_markdown({"rows": rows}).splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "one eigenvalue", "0.02", "8", "2 to 8", "1.50 to 4.00", "1.0%", "25.0%", "2.6%",
    ]  # fmt: skip


def test_the_committed_records_have_the_effect_and_its_limits() -> None:
    """What docs/evidence-simulations.md says of them."""
    records = read_simulations(RESULTS)
    for name in ("digits_mlp", "digits_mlp_second_split", "diagonal"):
        rules = records[name]["rules"]
        for quantity in ("test_error", "hessian_trace"):
            mean = {n: sum(of[quantity]) / len(of[quantity]) for n, of in rules.items()}
            order = ["data parallel", "constant H", "beta/eta", "QSR", "cubic"]
            assert sorted(mean, key=lambda n: -mean[n]) == order, (name, quantity)
    alone = list(records["digits_mlp_one_worker"]["rules"].values())
    assert all(of["test_error"] == alone[0]["test_error"] for of in alone)
    small = [row for row in records["drift"]["rows"] if row["noise"] == 0.05]
    for row in small:
        assert row["multiplier"] == pytest.approx(row["predicted_discrete"], rel=0.05)


def test_pictures_are_drawn_beside_the_records(tmp_path: Path) -> None:
    evidence = RESULTS.parent
    shutil.copytree(evidence, tmp_path / "evidence", ignore=shutil.ignore_patterns("*.png"))
    draw(tmp_path)
    drawn = {path.relative_to(tmp_path / "evidence") for path in tmp_path.rglob("*.png")}
    expected = {path.relative_to(evidence) for path in evidence.rglob("*.png")}
    assert drawn == expected - {Path("glyphs.png")}  # drawn by scripts/glyph_evidence.py
    assert len(drawn) == 7


def test_the_rules_of_a_simulation_are_in_its_picture() -> None:
    figure = simulation_figure(read_simulations(RESULTS)["digits_mlp"])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["data parallel", "constant $H$", r"$\beta/\eta$", "QSR", "cubic"]
    note = figure.axes[1].get_title(loc="right")
    assert note == "squares: means with 95 % CI, dots: 16 seeds"


def test_what_diverged_is_said_with_its_rules() -> None:
    left, right = sensitivity_figure(read_simulations(RESULTS)).axes
    assert [text.get_text() for text in left.texts if text.get_text()] == [
        "10 of 16 diverged with\nconstant $H$, $\\beta/\\eta$, QSR, cubic"
    ]
    assert [text.get_text() for text in right.texts if text.get_text()] == [
        "3 of 16\ndiverged", "16 of 16\ndiverged",
    ]  # fmt: skip


def values(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_ydata(), dtype=float)


def test_what_the_rules_make_of_the_multiplier() -> None:
    """After the decay nothing is left of a constant H, a constant part of beta/eta, all of QSR, a
    round of which goes no further along the minima than at the peak."""
    rate, multiplier, moved = multiplier_figure(paper_plans(), PAPER_WORKERS, AT_PEAK).axes
    assert np.max(values(rate.lines[0])) == 1.0
    late = -300  # of 2,000 points: before the last, cut round
    gains = {str(line.get_label()): float(values(line)[late]) for line in multiplier.lines}
    along = dict(zip(gains, (float(values(line)[late]) for line in moved.lines), strict=True))
    assert gains["data parallel"] == 1.0
    assert gains["constant $H$"] < 1.6
    assert gains[r"$\beta/\eta$"] == pytest.approx(1 + 15 * psi(AT_PEAK), rel=0.03)
    assert gains["QSR"] > 14
    assert 0.7 < along["QSR"] <= 1.0  # within a round the rate falls
    assert along[r"$\beta/\eta$"] < 0.1
    assert along["cubic"] > 4
