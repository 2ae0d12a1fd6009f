"""Every question's comparison with QSR: by hand, and for the committed records."""

import pytest

from qsr.config.load import CONFIG_DIR
from qsr.report.evidence import read_simulations
from qsr.report.evidence_answers import answers_markdown, questions_markdown
from qsr.report.evidence_contrasts import Contrast, contrasts, read_evidence
from qsr.report.evidence_controls import answers_figure, rates_figure, relative
from qsr.report.evidence_glyphs import read_glyph_averages
from qsr.report.statistics import needed_pairs

ROOT = CONFIG_DIR.parent
RESULTS = ROOT / "results"
BETTER = Contrast(
    "Is it?", "Other rules", "here", "a", [12.0, 14.0, 13.0, None], [10.0, 11.0, 12.0, 9.0]
)
UNKNOWN = Contrast("Is it?", "Other rules", "here", "b", [1.0, 2.0], [2.0, 1.0], points=False)
GONE = Contrast("And this?", "Equal time", "there", "c", [None, None], [2.0, 1.0])
WORSE = Contrast("And this?", "Equal time", "there", "d", [2.0, 1.0], [4.0, 3.0])


def test_the_table_by_hand() -> None:
    """Differences of 2, 3 and 1 points: 2 +- 4.303 / sqrt(3), t = 2 sqrt(3) of two degrees of
    freedom has p = 0.074; so it is not established. Of 1 and -1: 0 +- 12.7."""
    _, _, *lines = answers_markdown([BETTER, UNKNOWN, GONE, WORSE]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == [
        "Is it?", "here", "a", "2.00 ± 2.48 points", "0.074", "3", str(needed_pairs(2.0, 1.0)),
        str(needed_pairs(1.12, 1.0)), "not established",
        "[Other rules](evidence-simulations.md#other-rules)",
    ]  # fmt: skip
    assert rows[1] == ["", "here", "b", "0.00 ± 12.71", "1", "2", "", "", "not established",
                       "[Other rules](evidence-simulations.md#other-rules)"]  # fmt: skip
    assert rows[2] == ["And this?", "there", "c", "", "", "0", "", "", "the other diverged",
                       "[Equal time](evidence-simulations.md#equal-time)"]  # fmt: skip
    # both pairs differ by 2: no t-test, but an interval of no width
    assert rows[3][3:] == ["-2.00 ± 0.00 points", "", "2", "2", "2", "QSR worse",
                           "[Equal time](evidence-simulations.md#equal-time)"]  # fmt: skip


def test_the_questions_by_hand() -> None:
    _, _, *lines = questions_markdown([BETTER, UNKNOWN, GONE, WORSE]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows == [
        ["Is it?", "in 0 of 2", "", "here, a: 2.00 ± 2.48; here, b: 0.00 ± 12.71",
         "[Other rules](evidence-simulations.md#other-rules)"],
        ["And this?", "in 0 of 2", "there, d: -2.00 ± 0.00", "",
         "[Equal time](evidence-simulations.md#equal-time)"],
    ]  # fmt: skip


def test_differences_relative_to_the_others_error() -> None:
    """Of the pairs in which neither diverged: 2 of 13; and 2 of QSR's 3.5."""
    assert relative(BETTER).mean == pytest.approx(100 * 2 / 13)
    assert relative(BETTER).half_width == pytest.approx(100 * 2.484 / 13, rel=1e-3)
    assert relative(WORSE).mean == pytest.approx(-100 * 2 / 3.5)


def recorded() -> list[Contrast]:
    return contrasts(read_evidence(RESULTS))


def test_the_recorded_comparisons() -> None:
    found = recorded()
    first = found[0]
    assert (first.setting, first.other, first.answer) == ("digits", "data parallel", "QSR better")
    assert first.comparison.difference.mean == pytest.approx(11.07, abs=0.005)
    vit = next(c for c in found if (c.setting, c.other) == ("200 digits, ViT", "data parallel"))
    assert vit.answer == "QSR worse"
    assert vit.comparison.difference.mean == pytest.approx(-1.24, abs=0.005)


def test_averages_over_time_of_the_glyph_runs_are_compared_by_seed() -> None:
    found = {c.other: c.comparison for c in recorded() if c.setting == "unseen fonts, ResNet"}
    runs = {(run["rule"], run["seed"]): run for run in read_glyph_averages(RESULTS)}
    for name, of_qsr in (("", "top1"), ("; QSR too", "ema_top1")):
        differences = [
            runs["quadratic", seed][of_qsr] - runs["parallel", seed]["ema_top1"]
            for seed in range(1, 6)
        ]
        seen = found[f"data parallel, EMA 0.999{name}"]
        assert seen.pairs == 5
        assert seen.difference.mean == pytest.approx(sum(differences) / 5)


def test_the_figure_has_a_row_for_each() -> None:
    (axes,) = answers_figure([BETTER, UNKNOWN, GONE, WORSE]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "a · here", "b · here", "d · there",
    ]  # fmt: skip
    assert [text.get_text() for text in axes.texts] == ["Is it?", "And this?"]


def test_chosen_rates_are_marked() -> None:
    record = read_simulations(RESULTS / "evidence" / "simulations")["digits_mlp_rates"]
    (axes,) = rates_figure(record).axes
    rings = [line for line in axes.lines if line.get_fillstyle() == "none"]
    chosen = [about["peak_lr"] for about in record["rules"].values()]
    assert [float(line.get_xdata()[0]) for line in rings] == chosen  # type: ignore[index,arg-type]
