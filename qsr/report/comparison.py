"""The paper's tables beside the plans and measurements here."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from qsr.core.plan import Plan
from qsr.errors import ReportError
from qsr.report.paper import Reference, ReferenceRow, reference_text
from qsr.report.tables import markdown_table

REHEARSAL = "REHEARSAL on digits: proves that the machinery runs, not the paper's claim"

_NAN = float("nan")
_Row = Mapping[Hashable, Any]  # of a comparison_table
_SOURCES = (
    "[A] the abstract, [C] a figure caption, [O] the authors' code, [D] derived from those by "
    "arithmetic; unverified: recalled, not checked against the paper "
    "(`results/paper/README.md`). Volume: averaging rounds / steps; plan: the rounds of the "
    "experiment in `configs/experiment/`."
)
_HERE = (
    "Here: mean ± standard deviation over the seeds. Volume here: averages made / steps. Hours: "
    "training without evaluations and checkpoints, on the machine of each run."
)
_DIFFERENCE = (
    "Difference: here minus paper, ± the standard error of the mean here (standard deviation / "
    "√seeds); the paper's own spread is not part of it."
)


def comparison_table(
    rows: Iterable[ReferenceRow],
    summaries: Mapping[str, Sequence[Mapping[str, Any]]],
    plan_of: Callable[[str], Plan],
) -> pd.DataFrame:
    """One row per reference row: its values and tags, the plan's volume, means over the runs.

    `summaries` has the contents of summary.json of finished runs, by the experiment of their row,
    and `plan_of` returns an experiment's plan. Unknown numbers are NaN, unknown tags empty. Only
    runs of the row's own experiment have a difference from the paper; runs under another name
    (rehearsals, or with overrides) have none. Raises ReportError if the runs of a row are not seeds
    of the same run, or if runs of the row's own experiment did not follow its plan.
    """
    return pd.DataFrame(
        [_row(row, summaries.get(row.experiment, ()), plan_of(row.experiment)) for row in rows]
    )


def _row(row: ReferenceRow, runs: Sequence[Mapping[str, Any]], plan: Plan) -> dict[str, Any]:
    names = {run["experiment"] for run in runs}
    if len(names) > 1:
        raise ReportError(f"{row.experiment}: {' and '.join(sorted(names))} are different runs")
    comparable = names == {row.experiment}
    for run in runs if comparable else ():
        _check_plan(run, plan)
    top1 = [run["top1"] for run in runs]
    mean = fmean(top1) if top1 else _NAN
    std = stdev(top1) if len(top1) > 1 else _NAN
    error = std / math.sqrt(len(top1)) if top1 else _NAN
    return {
        "table": row.table,
        "experiment": row.experiment,
        "model": {"resnet152": "ResNet-152", "vit_b16": "ViT-B/16"}[row.model],
        "global_batch": row.global_batch,
        "gpus": row.gpus,
        "schedule": row.schedule,
        "rule": row.rule,
        "h_base": row.h_base,
        "method": row.method,
        "alpha": _NAN if row.alpha is None else row.alpha,
        "volume_percent_paper": _value(row.volume_percent),
        "volume_percent_tag": _tag(row.volume_percent),
        "volume_percent_plan": 100 * plan.volume,
        "top1_paper": _value(row.top1),
        "top1_tag": _tag(row.top1),
        "volume_percent_mean": _mean_volume(runs),
        "seeds": len(runs),
        "top1_mean": mean,
        "top1_std": std,
        "top1_difference": mean - _value(row.top1) if comparable else _NAN,
        "top1_difference_error": error if comparable else _NAN,
        "hours_paper": _value(row.total_hours),
        "hours_tag": _tag(row.total_hours),
        "hours_mean": fmean(run["train_seconds"] for run in runs) / 3600 if runs else _NAN,
    }


def _check_plan(run: Mapping[str, Any], plan: Plan) -> None:
    """Raise ReportError if the experiment has changed since the run was recorded."""
    ran, planned = (run["steps"], run["averages"]), (plan.total_steps, plan.num_rounds)
    if ran != planned:
        raise ReportError(
            f"{run['experiment']}/seed_{run['seed']} has {ran[1]} averages in {ran[0]} steps, but "
            f"the experiment now has {planned[1]} in {planned[0]}: run it again, or remove its "
            f"record"
        )


def _mean_volume(runs: Sequence[Mapping[str, Any]]) -> float:
    """Mean volume of the runs, in percent."""
    return 100 * fmean(run["averages"] / run["steps"] for run in runs) if runs else _NAN


def _value(reference: Reference | None) -> float:
    return _NAN if reference is None else reference.value


def _tag(reference: Reference | None) -> str:
    return "" if reference is None else reference.tag


def table_title(table: pd.DataFrame) -> str:
    """A heading for one table of the paper, from what its rows have in common."""

    def all_of(column: str) -> str:
        return " and ".join(str(value) for value in table[column].unique())

    return (
        f"Table {all_of('table')}: {all_of('model')}, global batch {all_of('global_batch')}, "
        f"{all_of('gpus')} GPUs, {all_of('schedule')} schedule"
    )


def read_comparison(paths: Iterable[Path]) -> pd.DataFrame:
    """Read a comparison_table from CSV files, one for each table."""
    return pd.concat([pd.read_csv(path, dtype={"table": str}) for path in paths], ignore_index=True)


def comparison_markdown(
    table: pd.DataFrame, *, title: str = "", marker: str = "", notes: bool = True
) -> str:
    """A comparison_table as Markdown, with notes that explain it.

    `title` becomes a heading, and `marker`, such as REHEARSAL, a bold line above the table. Model
    and global batch have a column only if rows differ in them, and the difference from the paper
    only if there is one.
    """
    rows = table.to_dict("records")
    text = pd.DataFrame(
        {
            "model": table["model"],
            "global batch": table["global_batch"].astype(str),
            "method": table["method"],
            "alpha": ["-" if pd.isna(value) else f"{value:g}" for value in table["alpha"]],
            "volume %, paper": [_reference(row, "volume_percent", ".1f") for row in rows],
            "volume %, plan": table["volume_percent_plan"].map("{:.1f}".format),
            "volume %, here": [
                f"{row['volume_percent_mean']:.1f}" if row["seeds"] else "not run" for row in rows
            ],
            "top-1 %, paper": [_reference(row, "top1", ".2f") for row in rows],
            "top-1 %, here": [_here(row) for row in rows],
            "difference": [_difference(row) for row in rows],
            "hours, paper": [_reference(row, "hours", ".1f") for row in rows],
            "hours, here": [f"{r['hours_mean']:.3g}" if r["seeds"] else "not run" for r in rows],
        }
    )
    text = text.drop(columns=[c for c in ("model", "global batch") if text[c].nunique() == 1])
    if not table["top1_difference"].notna().any():
        text = text.drop(columns="difference")
    if not table["seeds"].any():
        text = text.drop(columns="volume %, here")
    head = [f"# {title}"] * bool(title) + [f"**{marker}**"] * bool(marker)
    foot = [comparison_notes(table)] * notes
    return "\n\n".join([*head, markdown_table(text).rstrip("\n"), *foot]) + "\n"


def comparison_notes(table: pd.DataFrame) -> str:
    """Notes that explain the table's Markdown."""
    compared, run = table["top1_difference"].notna().any(), table["seeds"].any()
    return " ".join([_SOURCES, *[_HERE] * bool(run), *[_DIFFERENCE] * bool(compared)])


def _reference(row: _Row, name: str, digits: str) -> str:
    value, tag = row[f"{name}_paper"], row[f"{name}_tag"]
    return reference_text(None if pd.isna(value) else Reference(value, tag), digits)


def _here(row: _Row) -> str:
    match row["seeds"]:
        case 0:
            return "not run"
        case 1:
            return f"{row['top1_mean']:.2f} (1 seed)"
        case seeds:
            return f"{row['top1_mean']:.2f} ± {row['top1_std']:.2f} ({seeds} seeds)"


def _difference(row: _Row) -> str:
    value, error = row["top1_difference"], row["top1_difference_error"]
    if pd.isna(value):
        return "-"
    spread = "" if pd.isna(error) else f" ± {error:.2f}"
    # a difference from an unverified value is unverified too
    return f"{value:+.2f}{spread}" + (" (unverified)" if row["top1_tag"] == "R" else "")
