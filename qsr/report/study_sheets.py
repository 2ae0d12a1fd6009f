"""The numbers of a study as text in tables, before they become Markdown, LaTeX or HTML."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from qsr.report.collect import Run
from qsr.report.statistics import Comparison
from qsr.report.study import Group, Study
from qsr.report.study_numbers import (
    TIMES,
    Metric,
    Spread,
    difference,
    result_metrics,
    spread_of,
    unpaired,
)
from qsr.report.study_settings import shortest, value_text
from qsr.report.tables import time_unit
from qsr.run.folder import RunFolder, read_json

NOT_MEASURED = "not measured"


class Cell(NamedTuple):
    """What stands in a table: a value, and its interval if it has one."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table of text."""

    title: str
    header: list[str]
    rows: list[list[Cell]]
    """The first cell names the row."""
    notes: list[str]
    """What explains the table, a sentence or two each."""


def sheets(study: Study) -> list[Sheet]:
    """The tables of a study: results, paired differences if there is a reference, and times."""
    found = [results_sheet(study), times_sheet(study)]
    if study.reference is not None:
        found.insert(1, differences_sheet(study, study.reference))
    return found


def results_sheet(study: Study) -> Sheet:
    """Mean, standard deviation and 95 % interval of each metric in each group."""
    metrics = _result_metrics(study)
    rows = [
        [
            Cell(group.label),
            Cell(str(len(group.runs))),
            *(_spread_cell(spread_of(group, metric), metric) for metric in metrics),
        ]
        for group in study.groups
    ]
    averages = (
        "; EMA, uniform: of averages of that model over time"
        if any(metric.optional for metric in metrics)
        else ""
    )
    notes = [
        "Mean ± standard deviation over n seeds, and [95 % interval of the mean by Student's t]. "
        "top-1, loss: of the mean model at the end, on validation; best: highest of all "
        f"evaluations{averages}; volume: averages / steps; training: without evaluations and "
        f"checkpoints."
    ]
    return Sheet("Results", ["group", "n", *(m.title for m in metrics)], rows, notes)


def differences_sheet(study: Study, reference: Group) -> Sheet:
    """Paired differences of each group to the reference, by seed."""
    metrics = _result_metrics(study)
    rows, alone = [], []
    for group in study.others:
        changes = [difference(group, reference, metric) for metric in metrics]
        cells = (_change_cell(c, m) for c, m in zip(changes, metrics, strict=True))
        pairs = len(set(group.seeds) & set(reference.seeds))
        rows.append([Cell(group.label), Cell(str(pairs)), *cells])
        if seeds := unpaired(group, reference):
            alone.append(f"{group.label}: no pair for seed {', '.join(map(str, seeds))}.")
    notes = [
        f"Each seed minus the same seed of {reference.label}: mean, and [95 % interval of the mean "
        f"paired difference by Student's t].",
        *alone,
    ]
    title = f"Paired differences to {reference.label}"
    return Sheet(title, ["group", "pairs", *(m.title for m in metrics)], rows, notes)


def times_sheet(study: Study) -> Sheet:
    """Mean times of each group."""
    unit, seconds = _time_unit(study)
    metrics = [replace(metric, factor=1 / seconds) for metric in TIMES]
    rows = [
        [
            Cell(group.label),
            *(_spread_cell(spread_of(group, metric), metric) for metric in metrics),
        ]
        for group in study.groups
    ]
    notes = [
        "As above. Waiting and communication are parts of training. Communication is "
        "not measured in runs of one rank, nor where it overlaps the backward pass; older runs "
        "did not measure waiting.",
        *_places(study.runs),
    ]
    return Sheet(f"Where time went, in {unit}", ["group", *(m.title for m in metrics)], rows, notes)


def runs_sheet(study: Study) -> Sheet:
    """Every run."""
    metrics = _result_metrics(study)
    rows = [
        [
            Cell(str(run.folder)),
            Cell(group.label),
            Cell(str(run.config.seed)),
            *(Cell(_number(metric.of(run), metric.decimals)) for metric in metrics),
        ]
        for group in study.groups
        for run in group.runs
    ]
    return Sheet("Runs", ["run", "group", "seed", *(m.title for m in metrics)], rows, [])


def settings_sheet(study: Study) -> Sheet:
    """The settings in which groups differ."""
    names = [*study.by, *study.also]
    rows = [
        [Cell(group.label), *(Cell(value_text(group.settings.get(name))) for name in names)]
        for group in study.groups
    ]
    return Sheet("What differs", ["group", *names], rows, ["A dash: no such setting."])


def summary_lines(study: Study) -> list[str]:
    """What was asked, and what was left out or has to be known; a line each."""
    runs, groups = len(study.runs), len(study.groups)
    by = f", by {', '.join(shortest(study.by))}" if study.by else ""
    lines = [f"{runs} finished run{'s' * (runs > 1)} in {groups} group{'s' * (groups > 1)}{by}"]
    if study.also:
        others = "; ".join(f"{name} ({study.values(name)})" for name in study.also)
        lines.append(f"the groups also differ in {others}")
    return [*lines, *(f"left out: {line}" for line in study.left_out)]


def _places(runs: Sequence[Run]) -> list[str]:
    """A sentence if the runs' times are not those of one kind of machine."""
    places = {_place(run) for run in runs}
    if len(places) < 2:
        return []
    return [f"The runs were not alike in what they ran on: {'; '.join(sorted(places))}."]


def _place(run: Run) -> str:
    path = RunFolder(run.folder).environment
    about = read_json(path) if path.exists() else {}
    ranks = run.summary.get("ranks", "an unknown number of")
    return f"{ranks} ranks on {about.get('gpu') or about.get('cpu') or 'unknown devices'}"


def _time_unit(study: Study) -> tuple[str, int]:
    """The unit that suits the longest run, and the seconds in it."""
    found = (TIMES[0].of(run) for run in study.runs)
    return time_unit(max((value for value in found if value is not None), default=0.0))


def _result_metrics(study: Study) -> list[Metric]:
    """The results, with the time in the unit that suits the runs."""
    unit, seconds = _time_unit(study)
    *others, hours = result_metrics(study)
    return [*others, replace(hours, title=f"{hours.title}, {unit}", factor=1 / seconds)]


def _spread_cell(found: Spread, metric: Metric) -> Cell:
    if not found.measured:
        return Cell(NOT_MEASURED)
    some = f" ({found.measured} of {found.runs} runs)" if found.measured < found.runs else ""
    if found.measured == 1 or (metric.planned and _alike(found.deviation, found.mean)):
        return Cell(_number(found.mean, metric.decimals) + some)
    digits = metric.decimals + metric.planned  # a mean of different counts is no count
    value = f"{_number(found.mean, digits)} ± {_number(found.deviation, digits)}{some}"
    return Cell(value, f"[{_number(found.low, digits)}, {_number(found.high, digits)}]")


def _change_cell(change: Comparison, metric: Metric) -> Cell:
    middle, half = change.difference.mean, change.difference.half_width
    if not change.pairs:
        return Cell("no pairs measured")
    if math.isnan(half) or (metric.planned and _alike(half, middle)):
        return Cell(_signed(middle, metric.decimals))
    digits = metric.decimals + metric.planned
    interval = f"[{_signed(middle - half, digits)}, {_signed(middle + half, digits)}]"
    return Cell(_signed(middle, digits), interval)


def _alike(deviation: float, mean: float) -> bool:
    """Whether values differ by no more than rounding."""
    return deviation <= 1e-9 * abs(mean)


def _number(value: float | None, decimals: int) -> str:
    return NOT_MEASURED if value is None else f"{value:,.{decimals}f}"


def _signed(value: float, decimals: int) -> str:
    return f"{round(value, decimals) + 0.0:+,.{decimals}f}"  # -0.0 is +0.0
