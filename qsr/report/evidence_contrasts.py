"""All records of the evidence -> comparisons with QSR, for every question of a sceptic."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qsr.report.evidence import Record, finite, read_simulations, unit
from qsr.report.evidence_deep import DeepRecord, read_deep
from qsr.report.evidence_glyphs import (
    GlyphRecord,
    compared,
    errors_of,
    of_all_rules,
    read_glyph_averages,
    read_glyphs,
    read_glyphs_without_noise,
)
from qsr.report.statistics import Comparison, compare, estimate

Errors = Sequence[float | None]
"""Of the seeds, in order; None: the run diverged."""


class Evidence(NamedTuple):
    """All records."""

    simulations: Mapping[str, Record]
    glyphs: Sequence[GlyphRecord]
    glyph_averages: Sequence[GlyphRecord]
    """Runs on the glyphs with averages over time."""
    glyphs_without_noise: Sequence[GlyphRecord]
    """The same without wrong labels."""
    deep: DeepRecord


def read_evidence(results: Path) -> Evidence:
    """The records in the folder results/."""
    return Evidence(
        read_simulations(results / "evidence" / "simulations"),
        read_glyphs(results),
        read_glyph_averages(results),
        read_glyphs_without_noise(results),
        read_deep(results),
    )


@dataclass(frozen=True)
class Contrast:
    """Another arm against QSR on the same seeds."""

    question: str
    where: str
    """Heading in docs/evidence-simulations.md, or in docs/evidence.md."""
    setting: str
    other: str
    other_errors: Errors
    qsr_errors: Errors
    points: bool = True
    """Whether errors are in percent."""

    @property
    def comparison(self) -> Comparison:
        """The other's error minus QSR's, on the seeds with which neither diverged."""
        return compare(self.other_errors, self.qsr_errors)

    @property
    def answer(self) -> str:
        """Which of both errs less, if the 95 % interval leaves no doubt."""
        found = self.comparison.difference
        if math.isnan(found.mean):
            return "the other diverged"
        if not abs(found.mean) > found.half_width:  # also where there is one pair
            return "not established"
        return "QSR better" if found.mean > 0 else "QSR worse"


@dataclass(frozen=True)
class _Question:
    """Arms of a simulation, each against QSR; several names in one: the one with the lowest mean
    error, which is chosen on the seeds that are reported and so is in favour of the other."""

    question: str
    where: str
    study: str
    others: tuple[str | tuple[str, ...], ...]
    qsr: str = "QSR"


EFFECT = "Does QSR err less than data parallel training?"
RECIPE = "Is it the recipe?"
AVERAGING = "Is it weight averaging?"
NOISE = "Is it there without label noise?"
RATE = "Is it the learning rate?"
COMMUNICATION = "Is it there at equal communication?"
TIME = "Is it there at equal time?"
EXPONENT = "Is the exponent 2 the best?"
RULES = "Are other rules as good?"

_AVERAGES = ("EMA 0.9", "EMA 0.99", "EMA 0.999", "last quarter", "last half")
_KEPT = ("rate kept", "rate kept, EMA 0.99", "rate kept, last half")
_QUESTIONS = (
    _Question(EFFECT, "Results", "digits_mlp", ("data parallel",)),
    _Question(EFFECT, "Results", "digits_mlp_second_split", ("data parallel",)),
    _Question(EFFECT, "Results", "diagonal", ("data parallel",)),
    _Question(AVERAGING, "Weight averaging", "digits_mlp_averages", (_AVERAGES, _KEPT)),
    _Question(AVERAGING, "Weight averaging", "diagonal_averages", (_AVERAGES, _KEPT)),
    _Question(NOISE, "Controls", "digits_mlp_no_noise", ("data parallel",)),
    _Question(
        RATE, "The learning rate", "digits_mlp_rates", ("data parallel", "rate kept, EMA 0.99")
    ),
    _Question(
        COMMUNICATION,
        "Rivals at the same communication",
        "digits_mlp_rivals_low_rate",
        ("constant H = 26", "beta x 1.95"),
    ),
    _Question(COMMUNICATION, "The learning rate", "digits_mlp_rates", ("constant H = 26",)),
    _Question(
        TIME,
        "Equal time",
        "digits_mlp_same_time",
        ("data parallel, r = 1", "data parallel, r = 4"),
    ),
    _Question(TIME, "Equal time", "digits_mlp_same_time", ("data parallel",), "QSR, r = 1"),
    _Question(TIME, "Equal time", "digits_mlp_same_time", ("data parallel",), "QSR, r = 4"),
    _Question(EXPONENT, "Results", "digits_mlp", ("beta/eta", "cubic")),
    _Question(EXPONENT, "Results", "diagonal", ("beta/eta", "cubic")),
    _Question(EXPONENT, "The learning rate", "digits_mlp_rates", ("beta/eta", "cubic")),
    _Question(
        RULES,
        "Other rules",
        "digits_mlp_other_rules",
        ("linear in the round", "stagewise doubling", "AdaComm"),
    ),
    _Question(RULES, "The learning rate", "digits_mlp_rates", ("constant H", "DiLoCo")),
    _Question(RULES, "Weight averaging", "digits_mlp_averages", ("H = 4, rate kept, EMA 0.99",)),
    _Question(RULES, "Weight averaging", "diagonal_averages", ("H = 8, rate kept, EMA 0.99",)),
)
_SETTINGS = {
    "digits_mlp": "digits",
    "digits_mlp_second_split": "digits, second split",
    "digits_mlp_averages": "digits",
    "digits_mlp_no_noise": "digits, no noise",
    "digits_mlp_rates": "digits, own best rates",
    "digits_mlp_rivals_low_rate": "digits, low rate",
    "digits_mlp_same_time": "digits",
    "digits_mlp_other_rules": "digits",
    "diagonal": "diagonal",
    "diagonal_averages": "diagonal",
}
FONTS = "unseen fonts, ResNet"
_GLYPHS = {
    "parallel": EFFECT,
    "matched": COMMUNICATION,
    "linear": EXPONENT,
    "cubic": EXPONENT,
    "constant": RULES,
}
_GLYPH_OTHERS = {
    "parallel": "data parallel",
    "matched": "constant H = 9",
    "linear": "H ~ 1 / lr",
    "cubic": "cubic",
    "constant": "constant H = 4",
}
_GLYPH_AVERAGES = (
    (EFFECT, "data parallel, on a CPU", "top1", "top1"),
    (AVERAGING, "data parallel, EMA 0.999", "ema_top1", "top1"),
    (AVERAGING, "data parallel, last quarter", "uniform_top1", "top1"),
    (AVERAGING, "data parallel, EMA 0.999; QSR too", "ema_top1", "ema_top1"),
)
"""What is compared of the runs with averages over time: the model of data parallel training, and
that of QSR."""
_GLYPHS_WITHOUT_NOISE = (
    (NOISE, "data parallel", "top1", "top1"),
    (AVERAGING, "data parallel, EMA 0.999", "ema_top1", "top1"),
    (AVERAGING, "data parallel, EMA 0.999; QSR too", "ema_top1", "ema_top1"),
)
_DEEP = {
    "parallel": (NOISE, "data parallel"),
    "parallel_recipe": (RECIPE, "data parallel, its recipe"),
    "linear": (EXPONENT, "beta/eta"),
    "constant": (RULES, "constant H"),
}
_ORDER = (EFFECT, RECIPE, AVERAGING, NOISE, RATE, COMMUNICATION, TIME, EXPONENT, RULES)


def contrasts(evidence: Evidence) -> list[Contrast]:
    """All comparisons, by question."""
    found = [
        *_simulated(evidence.simulations),
        *_of_glyphs(evidence.glyphs),
        *_of_glyph_averages(evidence.glyph_averages, FONTS, _GLYPH_AVERAGES),
        *_of_glyph_averages(
            evidence.glyphs_without_noise, f"{FONTS}, no noise", _GLYPHS_WITHOUT_NOISE
        ),
        *_of_deep(evidence.deep),
    ]
    return sorted(found, key=lambda contrast: _ORDER.index(contrast.question))


def _simulated(simulations: Mapping[str, Record]) -> Iterator[Contrast]:
    for asked in _QUESTIONS:
        record = simulations[asked.study]
        rules = record["rules"]
        for others in asked.others:
            names = (others,) if isinstance(others, str) else others
            name = min(names, key=lambda each: _mean(rules[each]["test_error"]))
            best = f" (best of {len(names)})" if len(names) > 1 else ""
            parallel = "data parallel, " if name in (*_AVERAGES, *_KEPT) else ""
            qsr = "" if asked.qsr == "QSR" else f"; QSR in its time, {asked.qsr[5:]}"
            yield Contrast(
                asked.question,
                asked.where,
                _SETTINGS[asked.study],
                parallel + name + best + qsr,
                rules[name]["test_error"],
                rules[asked.qsr]["test_error"],
                points=bool(unit(record)),
            )


def _mean(errors: Errors) -> float:
    mean = estimate(finite(errors)).mean
    return math.inf if math.isnan(mean) else mean


def _of_glyphs(records: Sequence[GlyphRecord]) -> Iterator[Contrast]:
    runs = compared(records)
    for rule, question in _GLYPHS.items():
        errors = errors_of(runs[rule]), errors_of(runs["quadratic"])
        yield Contrast(question, "Unseen fonts", FONTS, _GLYPH_OTHERS[rule], *errors)


def _of_glyph_averages(
    records: Sequence[GlyphRecord], setting: str, asked: Sequence[tuple[str, str, str, str]]
) -> Iterator[Contrast]:
    runs = of_all_rules(records)
    for question, name, of_other, of_qsr in asked:
        errors = errors_of(runs["parallel"], of_other), errors_of(runs["quadratic"], of_qsr)
        yield Contrast(question, "Unseen fonts", setting, name, *errors)


def _of_deep(record: DeepRecord) -> Iterator[Contrast]:
    errors = {
        (row["model"], row["rule"]): [run["error"] for run in row["test"]] for row in record["rows"]
    }
    for (model, rule), of in errors.items():
        if rule in _DEEP:
            question, other = _DEEP[rule]
            setting = {"resnet": "200 digits, ResNet", "vit": "200 digits, ViT"}[model]
            yield Contrast(
                question, "Deep networks", setting, other, of, errors[model, "quadratic"]
            )
