"""The records of scripts/glyph_evidence.py -> Markdown tables and a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from qsr.report.evidence import estimate_text, p_text
from qsr.report.statistics import compare, estimate, needed_pairs
from qsr.report.style import COLORS, STYLE
from qsr.report.tables import markdown_table

GlyphRecord = Mapping[str, Any]
"""A run: a line of results/evidence/glyphs.jsonl."""

LABELS = {
    "parallel": "data parallel",
    "constant": "constant H = 4",
    "linear": "H ~ 1 / lr",
    "matched": "constant H = 9",
    "quadratic": "QSR",
    "cubic": "cubic",
}
_AVERAGES = {"ema_top1": "EMA 0.999", "uniform_top1": "mean of the last quarter"}
MODELS = {"resnet": "small ResNet", "vit": "small ViT"}
# as in all other figures (rule_colors); only one of two constant rules can have its colour
_COLORS = dict(
    zip(("parallel", "constant", "quadratic", "linear", "cubic", "matched"), COLORS, strict=True)
)
_LABELLED_LEFT = ("parallel", "cubic")
REFERENCE, OTHER = "parallel", "quadratic"
"""The rules to which the others are compared."""
PAPERS_GAIN = 1.12
"""Points of top-1 by which QSR gains over data parallel training, ViT-B on 16 GPUs (abstract)."""


def read_glyphs(results: Path) -> list[GlyphRecord]:
    """The finished runs in the folder results/."""
    return read_records(results / "evidence" / "glyphs.jsonl")


def read_glyph_averages(results: Path) -> list[GlyphRecord]:
    """The runs with averages over time."""
    return read_records(results / "evidence" / "glyphs_averages.jsonl")


def read_glyphs_without_noise(results: Path) -> list[GlyphRecord]:
    """The runs without wrong labels, with averages over time."""
    return read_records(results / "evidence" / "glyphs_without_noise.jsonl")


def read_records(path: Path) -> list[GlyphRecord]:
    """The finished runs in a file of records."""
    text = path.read_text()
    records: list[GlyphRecord] = [json.loads(line) for line in text.splitlines()]
    return [record for record in records if "failed" not in record]


def glyphs_report(records: Sequence[GlyphRecord]) -> str:
    """Both tables, the second with a line that explains it."""
    return f"""\
{glyphs_markdown(records)}
The runs that chose the peak rates, one seed, error %:

{rates_markdown(records)}"""


def glyphs_markdown(records: Sequence[GlyphRecord]) -> str:
    """One row per rule: means over seeds with 95 % intervals, the paired differences to data
    parallel training and to QSR with p of a t-test, and the number of seeds with which the test
    against data parallel training finds, with a probability of 80 %, a difference of the paper's
    size."""
    runs = compared(records)
    return markdown_table(pd.DataFrame([_row(rule, runs) for rule in LABELS if rule in runs]))


def averages_markdown(studies: Sequence[Sequence[GlyphRecord]]) -> str:
    """One row per study and rule: errors of the last model and of the averages over time, means
    over the seeds that all rules of the study have."""
    rows = []
    for records in studies:
        for rule, runs in of_all_rules(records).items():
            noise = runs[0]["noise"]
            rows.append(
                {
                    "wrong labels": f"{100 * noise:g} %" if noise else "none",
                    "rule": LABELS[rule],
                    "seeds": f"{len(runs)}",
                    "last model": estimate_text(estimate(errors_of(runs))),
                    **{
                        label: estimate_text(estimate(errors_of(runs, key)))
                        if key in runs[0]
                        else ""
                        for key, label in _AVERAGES.items()
                    },
                }
            )
    return markdown_table(pd.DataFrame(rows))


def of_all_rules(records: Sequence[GlyphRecord]) -> dict[str, list[GlyphRecord]]:
    """As `compared`, the seeds that all rules have."""
    runs = compared(records)
    seeds = set.intersection(*({run["seed"] for run in of} for of in runs.values()))
    return {rule: [run for run in of if run["seed"] in seeds] for rule, of in runs.items()}


def has_comparison(records: Sequence[GlyphRecord]) -> bool:
    """Whether there are several seeds of the rules to which the others are compared."""
    return {REFERENCE, OTHER} <= compared(records).keys()


def compared(records: Sequence[GlyphRecord]) -> dict[str, list[GlyphRecord]]:
    """By rule, in order of the seeds: the runs of the network, noise and rate that have several
    seeds."""
    found: dict[str, list[GlyphRecord]] = {}
    several = {_setting(record) for record in records if record["seed"] > 1}
    for record in sorted(records, key=lambda record: record["seed"]):
        if _setting(record) in several:
            found.setdefault(record["rule"], []).append(record)
    return found


def _setting(record: GlyphRecord) -> tuple[Any, ...]:
    return record["model"], record["noise"], record["rate_factor"]


def _row(rule: str, runs: Mapping[str, Sequence[GlyphRecord]]) -> dict[str, str]:
    errors = errors_of(runs[rule])
    change, other = (compare(errors, errors_of(runs[name])) for name in (REFERENCE, OTHER))
    seeds = needed_pairs(PAPERS_GAIN, change.deviation)
    return {
        "rule": LABELS[rule],
        "volume %": f"{100 * runs[rule][0]['volume']:.1f}",
        "error %": estimate_text(estimate(errors)),
        "at the best step": estimate_text(
            estimate([100 - record["best_top1"] for record in runs[rule]])
        ),
        "minus data parallel": "" if rule == REFERENCE else estimate_text(change.difference),
        "p": "" if rule == REFERENCE else p_text(change.p),
        "minus QSR": "" if rule == OTHER else estimate_text(other.difference),
        "p of that": "" if rule == OTHER else p_text(other.p),
        f"seeds for {PAPERS_GAIN} points": "" if seeds is None or rule == REFERENCE else f"{seeds}",
    }


def errors_of(runs: Sequence[GlyphRecord], key: str = "top1") -> list[float]:
    """In percent, of the last model or, by `key`, of an average over time."""
    return [100 - record[key] for record in runs]


def rates_markdown(records: Sequence[GlyphRecord]) -> str:
    """One row per network and peak rate, with the first seed of the rules that were tried at all
    rates."""
    first = [record for record in records if record["seed"] == 1]
    rates = {(record["model"], record["rate"]) for record in first}
    tried = [
        rule
        for rule in LABELS
        if {(r["model"], r["rate"]) for r in first if r["rule"] == rule} == rates
    ]
    lines = []
    for model, rate in sorted(rates):
        errors = {
            LABELS[record["rule"]]: f"{100 - record['top1']:.2f}"
            for record in first
            if (record["model"], record["rate"]) == (model, rate)
        }
        cells = {LABELS[rule]: errors[LABELS[rule]] for rule in tried}
        lines.append({"network": MODELS[model], "peak rate": f"{rate:g}", **cells})
    return markdown_table(pd.DataFrame(lines))


def glyphs_figure(records: Sequence[GlyphRecord]) -> Figure:
    """Error on the unseen fonts during training and at its end, over the rules' communication.
    Lines and dots are means over the seeds, bars 95 % intervals by Student's t."""
    runs = compared(records)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        during, after = figure.subplots(1, 2)
        for rule, of_rule in runs.items():
            steps = [row["step"] for row in of_rule[0]["evaluations"]]
            curves = [[100 - row["top1"] for row in run["evaluations"]] for run in of_rule]
            during.plot(steps, np.mean(curves, axis=0), color=_COLORS[rule])
            final = estimate(errors_of(of_rule))
            volume = 100 * of_rule[0]["volume"]
            after.errorbar(volume, final.mean, final.half_width, fmt="o", color=_COLORS[rule])
            after.annotate(
                LABELS[rule],
                (volume, final.mean),
                (-7, 0) if rule in _LABELLED_LEFT else (7, 0),
                textcoords="offset points",
                va="center",
                ha="right" if rule in _LABELLED_LEFT else "left",
                color=_COLORS[rule],
            )
        # the first evaluations are far above the last
        limits = (
            min(map(min, map(errors_of, runs.values()))) - 0.5,
            max(errors_of(runs[REFERENCE])) + 1.5,
        )
        during.set(xlabel="step", ylabel="error on unseen fonts (%)", ylim=limits)
        after.set(xlabel="volume (%)", xscale="log", xlim=(6, 130), ylim=limits)
        after.set_xticks([10, 20, 50, 100], ["10", "20", "50", "100"])
        after.minorticks_off()
    return figure
