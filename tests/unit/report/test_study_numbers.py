"""The numbers of a study, in every form: each can be checked by hand or against scipy."""

import io
import json
import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from qsr.report.study import Study, read_study
from qsr.report.study_html import study_html
from qsr.report.study_numbers import study_table
from qsr.report.study_plots import (
    top1_figure,
)
from qsr.report.study_text import (
    latex,
    print_study,
    study_csv,
    study_latex,
    study_markdown,
)
from tests.unit.report.conftest import TOP1, WriteRun

QSR = "QSR, H_base = 4, alpha = 0.4375"
CONSTANT = "constant H = 4"


def rows_of(table: pd.DataFrame) -> dict[tuple[str, str], dict[Hashable, Any]]:
    return {(row["group"], row["metric"]): row for row in table.to_dict("records")}


def test_means_and_intervals(study: Study) -> None:
    rows = rows_of(study_table(study))
    found = rows[CONSTANT, "top1_percent"]
    values = [*TOP1["constant"], 92.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found["runs"], found["measured"], found["mean"]) == (4, 4, 92.0)
    assert found["sd"] == pytest.approx(math.sqrt(14 / 3))  # squares 4, 1, 9 and 0
    assert (found["ci95_low"], found["ci95_high"]) == pytest.approx((low, high))
    qsr = rows[QSR, "top1_percent"]
    # 280 / 3, and t = 4.302653 for 2 degrees of freedom
    assert qsr["mean"] == pytest.approx(93.333333)
    assert qsr["sd"] == pytest.approx(math.sqrt(19 / 3))
    half = 4.302653 * math.sqrt(19 / 3) / math.sqrt(3)
    assert qsr["ci95_low"] == pytest.approx(93.333333 - half)
    assert rows[QSR, "volume_percent"]["mean"] == pytest.approx(100 * 38 / 330)
    assert rows[CONSTANT, "averages"]["mean"] == 83
    assert rows[QSR, "train_hours"]["mean"] == pytest.approx(72 / 3600)
    assert rows[QSR, "communication_seconds"]["mean"] == 4.0


def test_differences_are_paired_by_seed(study: Study) -> None:
    rows = rows_of(study_table(study))
    found = rows[QSR, "top1_percent"]
    assert (found["reference"], found["pairs"]) == (CONSTANT, 3)  # seed 4 has no pair
    assert found["difference"] == pytest.approx(4 / 3)
    test = stats.ttest_rel(TOP1["quadratic"], TOP1["constant"]).confidence_interval(0.95)
    ends = (found["difference_ci95_low"], found["difference_ci95_high"])
    assert ends == pytest.approx((test.low, test.high))
    assert found["difference_sd"] == pytest.approx(math.sqrt(1 / 3))
    assert math.isnan(rows[CONSTANT, "top1_percent"]["difference"])
    assert rows[QSR, "best_top1_percent"]["pairs"] == 2
    # the best of 96 was not measured: 1 and 2 points remain
    assert rows[QSR, "best_top1_percent"]["difference"] == 1.5


def test_what_was_not_measured_is_no_number(study: Study) -> None:
    rows = rows_of(study_table(study))
    waiting = rows[QSR, "data_idle_seconds"]
    assert (waiting["runs"], waiting["measured"]) == (3, 0)
    assert math.isnan(waiting["mean"])
    best = rows[QSR, "best_top1_percent"]
    assert (best["runs"], best["measured"], best["mean"]) == (3, 2, 93.0)


def test_one_seed_has_no_interval(tmp_path: Path, write_run: WriteRun) -> None:
    write_run("experiment=demo/constant", top1=90.0)
    write_run("experiment=demo/quadratic", top1=91.5)
    study = read_study([tmp_path], to=CONSTANT)
    found = rows_of(study_table(study))[QSR, "top1_percent"]
    assert (found["mean"], found["difference"]) == (91.5, 1.5)
    assert math.isnan(found["sd"])
    assert math.isnan(found["ci95_low"])
    text = study_markdown(study)
    assert "| 91.50 " in text
    assert "| +1.50 " in text
    assert "nan" not in text
    assert "nan" not in study_html(study)
    assert len(top1_figure(study).axes) == 2


def test_averages_over_time_have_columns_where_a_run_has_them(
    tmp_path: Path, write_run: WriteRun, study: Study
) -> None:
    titles = ["EMA top-1 %", "uniform top-1 %"]
    assert not any(title in study_markdown(study) for title in titles)
    names = {name for _, name in rows_of(study_table(study))}
    assert names.isdisjoint({"ema_top1_percent", "uniform_top1_percent"})
    for seed, top1 in ((4, 91.0), (5, 93.0)):
        write_run("experiment=demo/quadratic", f"seed={seed}", ema_top1=top1, ema_val_loss=0.3)
    more = read_study([tmp_path], to=CONSTANT)
    found = rows_of(study_table(more))[QSR, "ema_top1_percent"]
    assert (found["measured"], found["mean"]) == (2, 92.0)
    text = study_markdown(more)
    assert titles[0] in text
    assert titles[1] not in text
    assert "EMA, uniform: of averages of that model over time" in text
    assert titles[0] in study_html(more)


def terminal(study: Study, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_study(study, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_terminal_shows_groups_differences_and_times(study: Study) -> None:
    text = terminal(study, 160)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "7 finished runs in 2 groups, by sync"
    head, *_ = (place for place, line in enumerate(lines) if line.startswith("group n "))
    assert lines[head] == (
        "group n top-1 % best top-1 % loss volume % averages training, seconds"
    )  # fmt: skip
    assert lines[head + 2 : head + 6] == [
        "constant H = 4 4 92.00 ± 2.16 93.00 ± 2.16 0.5000 ± 0.0000 25.2 83 72.00 ± 0.00",
        "[88.56, 95.44] [89.56, 96.44] [0.5000, 0.5000] [72.00, 72.00]",
        f"{QSR} 3 93.33 ± 2.52 93.00 ± 1.41 (2 of 3 runs) 0.5000 ± 0.0000 11.5 38 72.00 ± 0.00",
        "[87.08, 99.58] [80.29, 105.71] [0.5000, 0.5000] [72.00, 72.00]",
    ]
    assert f"{QSR} 3 +1.33 +1.50 +0.0000 -13.6 -45 +0.00" in lines
    assert "[-0.10, +2.77] [-4.85, +7.85] [+0.0000, +0.0000] [+0.00, +0.00]" in lines
    assert f"{QSR}: no pair for seed 4." in lines
    times = "72.00 ± 0.00 not measured 4.00 ± 2.00 8.00 ± 0.00 not measured"
    assert f"{QSR} {times}" in lines
    assert "interval of the mean by Student's t" in text


def test_a_narrow_terminal_divides_tables_and_breaks_no_number(study: Study) -> None:
    text = terminal(study, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count(" group ") == 9  # four, three and two tables
    for number in re.findall(r"\[[^]]*\d\]|\S+ ± [\d.]+", terminal(study, 200)):
        assert number in text


def test_markdown_to_the_letter(study: Study) -> None:
    lines = study_markdown(study).splitlines()
    assert lines[:3] == ["7 finished runs in 2 groups, by sync.", "", "**Results**"]
    row = next(line for line in lines if line.startswith("| QSR"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "QSR, H\\_base = 4, alpha = 0.4375", "3", "93.33 ± 2.52 [87.08, 99.58]",
        "93.00 ± 1.41 (2 of 3 runs) [80.29, 105.71]", "0.5000 ± 0.0000 [0.5000, 0.5000]", "11.5",
        "38", "72.00 ± 0.00 [72.00, 72.00]",
    ]  # fmt: skip
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert sorted(set(tables)) == [7, 9]


def test_csv_is_read_back(study: Study) -> None:
    read = pd.read_csv(io.StringIO(study_csv(study)))
    pd.testing.assert_frame_equal(read, study_table(study), check_dtype=False)
    assert set(read["sync.h"]) == {"4", "-"}


def test_latex_is_whole(study: Study) -> None:
    text = study_latex(study)
    assert text.splitlines()[:2] == [
        "% 7 finished runs in 2 groups, by sync", r"% \usepackage{booktabs}",
    ]  # fmt: skip
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", body):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    plain = re.sub(r"\\[&%$#_{}\\]", "", body)
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    outside = re.sub(r"\$[^$]*\$", "", plain)
    assert not re.search("[%#_^~±]", outside)
    for table in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", plain, re.DOTALL):
        columns, rows = table
        counts = {line.count("&") for line in rows.splitlines() if "&" in line}
        assert counts == {len(columns) - 1}
    assert body.count(r"\toprule") == body.count(r"\bottomrule") == body.count(r"\midrule") == 3
    assert r"{QSR, $H_\mathrm{base}$ = 4, $\alpha$ = 0.4375} & {3} & {93.33 $\pm$ 2.52}" in body
    assert r"{$+1.33$}" in body
    assert r"{\footnotesize [$-0.10$, $+2.77$]}" in body


def test_latex_of_any_text() -> None:
    assert latex("a_b 5 % & {x} #1 $2 ~ ^ \\") == (
        r"a\_b 5 \% \& \{x\} \#1 \$2 \textasciitilde{} \textasciicircum{} \textbackslash{}"
    )
    assert latex("sync.alpha=1e-05, top-1, -0.5") == r"sync.alpha=1e-05, top-1, $-0.5$"


def test_different_machines_are_named(tmp_path: Path, write_run: WriteRun) -> None:
    for seed, ranks in ((1, 2), (2, 4)):
        folder = write_run("experiment=demo/constant", f"seed={seed}", ranks=ranks)
        (folder / "environment.json").write_text(json.dumps({"gpu": None, "cpu": "EPYC"}))
    said = "The runs were not alike in what they ran on: 2 ranks on EPYC; 4 ranks on EPYC."
    assert said in study_markdown(read_study([tmp_path]))
