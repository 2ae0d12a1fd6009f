"""Comparisons with QSR -> Markdown tables: a row for each question, and one for each comparison."""

from collections.abc import Iterator, Sequence

import pandas as pd

from qsr.report.evidence import estimate_text, p_text
from qsr.report.evidence_contrasts import Contrast
from qsr.report.evidence_glyphs import PAPERS_GAIN
from qsr.report.statistics import needed_pairs
from qsr.report.tables import markdown_table

_PAGES = {"Unseen fonts": "evidence.md", "Deep networks": "evidence.md"}
"""Of headings that are not in docs/evidence-simulations.md."""


def questions_markdown(found: Sequence[Contrast]) -> str:
    """One row per question: how many comparisons QSR wins, and all that it does not, with the
    other's error minus QSR's."""
    rows = []
    for question in dict.fromkeys(contrast.question for contrast in found):
        asked = [contrast for contrast in found if contrast.question == question]
        rows.append(
            {
                "question": question,
                "QSR errs less": f"in {_count_of(asked, 'QSR better')} of {len(asked)}",
                "QSR errs more": _listed(asked, "QSR worse"),
                "not established": _listed(asked, "not established"),
                "where": ", ".join(dict.fromkeys(map(_link, asked))),
            }
        )
    return markdown_table(pd.DataFrame(rows))


def _count_of(asked: Sequence[Contrast], answer: str) -> int:
    return sum(contrast.answer == answer for contrast in asked)


def _listed(asked: Sequence[Contrast], answer: str) -> str:
    return "; ".join(
        f"{contrast.setting}, {contrast.other}: {estimate_text(contrast.comparison.difference)}"
        for contrast in asked
        if contrast.answer == answer
    )


def answers_markdown(found: Sequence[Contrast]) -> str:
    """One row per comparison: the other's error minus QSR's with its 95 % interval, p of the paired
    t-test, the pairs, and the pairs with which the test finds, with a probability of 80 %, the
    difference that was seen, and one of the paper's size."""
    return markdown_table(pd.DataFrame([*_rows(found)]))


def _rows(found: Sequence[Contrast]) -> Iterator[dict[str, str]]:
    asked = ""
    for contrast in found:
        about = contrast.comparison
        difference = estimate_text(about.difference)
        yield {
            "question": "" if contrast.question == asked else contrast.question,
            "setting": contrast.setting,
            "against": contrast.other,
            "its error minus QSR's": difference
            + (" points" if contrast.points and difference else ""),
            "p": p_text(about.p),
            "pairs": f"{about.pairs}",
            "pairs for this difference": _count(
                needed_pairs(about.difference.mean, about.deviation)
            ),
            f"for {PAPERS_GAIN} points": _count(
                needed_pairs(PAPERS_GAIN, about.deviation) if contrast.points else None
            ),
            "answer": contrast.answer,
            "where": _link(contrast),
        }
        asked = contrast.question


def _link(contrast: Contrast) -> str:
    page = _PAGES.get(contrast.where, "evidence-simulations.md")
    return f"[{contrast.where}]({page}#{anchor(contrast.where)})"


def _count(pairs: int | None) -> str:
    return "" if pairs is None else f"{pairs:,}"


def anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    return heading.lower().replace(" ", "-")
