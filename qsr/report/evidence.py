"""Results of scripts/simulate.py -> Markdown tables for docs/evidence-simulations.md."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qsr.report.statistics import Comparison, Estimate, compare, estimate
from qsr.report.tables import markdown_table

Record = Mapping[str, Any]
"""A record that scripts/simulate.py wrote: results/evidence/simulations/NAME.json."""

DRIFT = "drift"
"""Name of the drift record; the other records are simulations."""


def read_simulations(folder: Path) -> dict[str, Record]:
    """The records in the folder results/evidence/simulations/, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def record_markdown(name: str, record: Record) -> str:
    """The table for a record."""
    return drift_markdown(record) if name == DRIFT else simulation_markdown(record)


def simulation_markdown(record: Record) -> str:
    """One row per rule: means and 95 % intervals over the seeds that did not diverge; the paired
    difference in test error from the first rule, the number of pairs in which the first rule is
    better, and p of a paired t-test."""
    rules = record["rules"]
    seeds = record["config"]["seeds"]
    reference, *_ = rules
    lines = []
    for name, about in rules.items():
        test = estimate(finite(about["test_error"]))
        trace = estimate(finite(about["hessian_trace"]))
        against = compare(about["test_error"], rules[reference]["test_error"])
        is_reference = name == reference
        line = {
            "rule": name,
            "peak rate": f"{about['peak_lr']:.3g}" if _vary(rules, "peak_lr") else "",
            "steps": f"{about['steps']:,}" if _vary(rules, "steps") else "",
            "volume": f"{about['volume']:.3f}",
            f"test error{unit(record)}": estimate_text(test),
            "tr(Hessian)": estimate_text(trace, 1),
            "train error (%)": estimate_text(estimate(finite(about.get("train_error", [])))),
            "diverged": f"{about['diverged']} of {seeds}" if about["diverged"] else "",
            f"difference to {reference}": "" if is_reference else estimate_text(against.difference),
            f"{reference} better": "" if is_reference else _wins(against),
            "p": "" if is_reference else p_text(against.p),
        }
        lines.append(line)
    table = pd.DataFrame(lines)
    return markdown_table(table.loc[:, [bool(table[name].any()) for name in table]])


def unit(record: Record) -> str:
    """Of the test errors of a simulation, with a space before it; empty if they have none."""
    return " (%)" if record["config"]["problem"]["kind"] == "digits_mlp" else ""


def _vary(rules: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    return len({about.get(name) for about in rules.values()}) > 1


def finite(values: Sequence[float | None]) -> list[float]:
    """The values of the seeds that did not diverge."""
    return [value for value in values if value is not None]


def estimate_text(about: Estimate, digits: int = 2) -> str:
    """mean ± half width; empty if there are no values."""
    if math.isnan(about.mean):
        return ""
    if math.isnan(about.half_width):
        return f"{about.mean:.{digits}f}"
    return f"{about.mean:.{digits}f} ± {about.half_width:.{digits}f}"


def _wins(about: Comparison) -> str:
    return f"{about.larger} of {about.pairs}" if about.pairs else ""


def p_text(p: float) -> str:
    """p with two digits; empty if it is not a number."""
    if math.isnan(p):
        return ""
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def drift_markdown(record: Record) -> str:
    """One row per valley, workers and learning rate at small noise: how far the measured multiplier
    is from the slow SDE's prediction, and from the prediction for steps of finite size."""
    rows = pd.DataFrame(record["rows"])
    small = rows[(rows["noise"] == rows["noise"].min()) & (rows["h"] > 1)]
    lines = []
    for (valley, lr, workers), part in small.groupby(["valley", "lr", "workers"], sort=False):
        lines.append(
            {
                "Hessian": valley,
                "learning rate": f"{lr:g}",
                "K": f"{workers}",
                "H": f"{part['h'].min()} to {part['h'].max()}",
                "measured": f"{part['multiplier'].min():.2f} to {part['multiplier'].max():.2f}",
                "largest standard error": f"{_largest(part['standard_error'], part):.1%}",
                "off slow SDE": f"{_off(part, 'predicted_continuous'):.1%}",
                "off discrete formula": f"{_off(part, 'predicted_discrete'):.1%}",
            }
        )
    return markdown_table(pd.DataFrame(lines))


def _off(rows: pd.DataFrame, prediction: str) -> float:
    return float((rows["multiplier"] / rows[prediction] - 1).abs().max())


def _largest(errors: pd.Series, rows: pd.DataFrame) -> float:
    return float((errors / rows["multiplier"]).max())
