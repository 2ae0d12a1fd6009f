"""The record of scripts/deep_evidence.py -> a Markdown table."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qsr.report.evidence import estimate_text, p_text
from qsr.report.statistics import compare, estimate, needed_pairs
from qsr.report.tables import markdown_table

DeepRecord = Mapping[str, Any]
"""The record that scripts/deep_evidence.py wrote: results/evidence/deep.json."""

REFERENCE = "quadratic"
LABELS = {
    "parallel": "data parallel",
    "parallel_recipe": "data parallel, its recipe",
    "constant": "constant H",
    "linear": "beta / lr",
    "quadratic": "QSR",
}
MODELS = {"resnet": "small ResNet", "vit": "small ViT"}
HALF_A_POINT = 0.5


def read_deep(results: Path) -> DeepRecord:
    """Read the record in the folder results/."""
    record: DeepRecord = json.loads((results / "evidence" / "deep.json").read_text())
    return record


def deep_report(record: DeepRecord) -> str:
    """results/evidence/deep.md: both tables, each with a line that explains it."""
    study = record["study"]
    return f"""\
Each rule at the peak rate that was best for it on the tuning images, {len(study["seeds"])} seeds, \
tested on other images;
± the 95 % interval over seeds; p of paired t-tests, not corrected for their number.

{deep_markdown(record)}
All rules at the same peak rates: mean error % on the tuning images / tr(Hessian), \
{len(study["tuning_seeds"])} seeds.

{rates_markdown(record)}"""


def deep_markdown(record: DeepRecord) -> str:
    """One row per model and rule, each at the peak rate that was best for it on the tuning images:
    means and 95 % intervals over seeds, and the paired differences from QSR with p of a t-test.
    "Error of its estimate" is the standard error of one run's tr(Hessian) over its probes. The last
    columns are the numbers of seeds with which such a test finds, with a probability of 80 %, a
    difference of half a point of test error, and the difference that was seen.
    """
    return markdown_table(pd.DataFrame([_row(row, record) for row in record["rows"]]))


def rates_markdown(record: DeepRecord) -> str:
    """The runs that chose the rates, with all rules at the same peak rates. One row per model and
    rate: mean error in percent on the tuning images / mean tr(Hessian), over the seeds."""
    runs = pd.DataFrame(
        [
            {"model": row["model"], "rule": row["rule"], **run}
            for row in record["rows"]
            for run in row["tuning"]
        ]
    )
    lines = []
    for (model, rate), at_rate in runs.groupby(["model", "rate"], sort=False):
        means = at_rate.groupby("rule", sort=False)[["error", "hessian_trace"]].mean()
        cells = {
            LABELS[str(rule)]: f"{mean['error']:.2f} / {mean['hessian_trace']:.1f}"
            for rule, mean in means.iterrows()
        }
        lines.append({"model": MODELS[str(model)], "peak rate": f"{rate:g}", **cells})
    return markdown_table(pd.DataFrame(lines))


def _row(row: Mapping[str, Any], record: DeepRecord) -> dict[str, str]:
    reference = next(
        other
        for other in record["rows"]
        if (other["model"], other["rule"]) == (row["model"], REFERENCE)
    )
    differences = _differences(row, reference)
    return {
        "model": MODELS[row["model"]],
        "rule": LABELS[row["rule"]],
        "peak rate": _rate(row),
        "volume %": f"{100 * row['test'][0]['volume']:.1f}",
        "test error %": estimate_text(estimate(_values(row, "error"))),
        "tr(Hessian)": estimate_text(estimate(_values(row, "hessian_trace"))),
        "error of its estimate": f"{_root_mean_square(_values(row, 'hessian_trace_error')):.2f}",
        "train error %": estimate_text(estimate(_values(row, "train_error"))),
        **(dict.fromkeys(differences, "") if row is reference else differences),
    }


def _differences(row: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, str]:
    error, trace = (
        compare(_values(row, name), _values(reference, name)) for name in ("error", "hessian_trace")
    )
    return {
        "error minus QSR's": estimate_text(error.difference),
        "p": p_text(error.p),
        "tr(H) minus QSR's": estimate_text(trace.difference),
        "p of tr(H)": p_text(trace.p),
        "seeds for 0.5 points": _count(needed_pairs(HALF_A_POINT, error.deviation)),
        "seeds for the difference": _count(needed_pairs(error.difference.mean, error.deviation)),
    }


def _values(row: Mapping[str, Any], name: str) -> list[float]:
    """The values of the runs on the test part."""
    return [run[name] for run in row["test"]]


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values))


def _rate(row: Mapping[str, Any]) -> str:
    """The rate, with a note if it is the smallest or largest that was tried."""
    tried = {trial["rate"] for trial in row["tuning"]}
    edge = len(tried) > 1 and row["rate"] in (min(tried), max(tried))
    return f"{row['rate']:g}{' (edge)' if edge else ''}"


def _count(pairs: int | None) -> str:
    return "" if pairs is None else f"{pairs:,}"
