"""The numbers in the sentences of the pages on evidence are those of the records."""

import re
from pathlib import Path

import pytest

from qsr.report.evidence_contrasts import contrasts, read_evidence
from qsr.report.statistics import Estimate, estimate

ROOT = Path(__file__).parents[3]
EVIDENCE = read_evidence(ROOT / "results")
COMPARISONS = {(each.setting, each.other): each.comparison for each in contrasts(EVIDENCE)}
DIGITS, FONTS, VIT = "digits", "unseen fonts, ResNet", "200 digits, ViT"
CLEAN = f"{FONTS}, no noise"
OWN = "digits, own best rates"
KEPT = "data parallel, rate kept, EMA 0.99"


def found(setting: str, other: str) -> Estimate:
    """How much more the other errs than QSR."""
    return COMPARISONS[setting, other].difference


def points(setting: str, other: str) -> str:
    """The size of the difference, in whole points."""
    return f"{abs(found(setting, other).mean):.0f}"


def tenths(setting: str, other: str) -> str:
    return f"{abs(found(setting, other).mean):.1f}"


def interval(setting: str, other: str) -> str:
    return shown(found(setting, other))


def shown(about: Estimate) -> str:
    return f"{abs(about.mean):.1f} ± {about.half_width:.1f}"


def p(setting: str, other: str) -> str:
    return f"{COMPARISONS[setting, other].p:.3f}"


def deep_error(rule: str) -> str:
    (row,) = (row for row in EVIDENCE.deep["rows"] if (row["model"], row["rule"]) == ("vit", rule))
    return shown(estimate([run["error"] for run in row["test"]]))


SENTENCES = {
    "evidence.md": [
        f"by {points(DIGITS, 'data parallel')} points on digits, "
        f"by {interval(FONTS, 'data parallel')} on unseen fonts",
        f"it errs {tenths('digits, no noise', 'data parallel')} points less on digits",
        f"{interval(CLEAN, 'data parallel')} less on unseen fonts",
        f"{interval(VIT, 'data parallel')} points more on a small ViT",
        f"it errs {points(OWN, KEPT)} points less than QSR",
        f"data parallel training is {points(OWN, 'data parallel')} points behind QSR, "
        f"not {points(DIGITS, 'data parallel')}",
        f"is {tenths(FONTS, 'constant H = 9')} points better than the constant rule",
        f"({interval(FONTS, 'data parallel, EMA 0.999')} points between them)",
        f"not established ({interval(FONTS, 'data parallel, EMA 0.999; QSR too')})",
        f"QSR errs less by {interval(CLEAN, 'data parallel')} points "
        f"(p = {p(CLEAN, 'data parallel')})",
        f"training ({interval(CLEAN, 'data parallel, EMA 0.999')})",
        f"by {interval(VIT, 'data parallel')} points (p = {p(VIT, 'data parallel')})",
        f"(by {tenths(VIT, 'constant H')} points, p = {p(VIT, 'constant H')} "
        f"and {p(VIT, 'beta/eta')})",
        f"{deep_error('parallel_recipe')} % errors instead of {deep_error('parallel')} %",
    ],
    "evidence-simulations.md": [
        f"QSR still errs less by {interval(DIGITS, f'{KEPT} (best of 3)')} points",
        f"by {interval(DIGITS, 'H = 4, rate kept, EMA 0.99')} points, with six times",
        f"more than QSR by {interval(OWN, 'data parallel')} points, "
        f"not by {points(DIGITS, 'data parallel')}",
        f"is better than QSR**, by {interval(OWN, KEPT)} points",
        f"errs more by {interval(OWN, 'constant H = 26')} points",
        f"at the same volume**, by {interval(DIGITS, 'linear in the round')} points",
    ],
}


@pytest.mark.parametrize(
    ("page", "sentence"), [(page, each) for page, of in SENTENCES.items() for each in of]
)
def test_the_sentences_have_the_records_numbers(page: str, sentence: str) -> None:
    text = re.sub(r"\s+", " ", (ROOT / "docs" / page).read_text())
    assert sentence in text
