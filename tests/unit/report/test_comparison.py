"""The paper beside runs: numbers, and Markdown to the letter."""

import math
from pathlib import Path

import pandas as pd
import pytest

from qsr.errors import ReportError
from qsr.report.collect import read_run
from qsr.report.comparison import (
    REHEARSAL,
    comparison_markdown,
    comparison_notes,
    comparison_table,
    read_comparison,
    table_title,
)
from qsr.report.paper import read_reference
from qsr.report.records import Summary, add_record, read_summaries
from tests.unit.report.conftest import WriteRun, plan_of

NOTES = (
    "[A] the abstract, [C] a figure caption, [O] the authors' code, [D] derived from those by "
    "arithmetic; unverified: recalled, not checked against the paper "
    "(`results/paper/README.md`). Volume: averaging rounds / steps; plan: the rounds of the "
    "experiment in `configs/experiment/`."
)
NOTES_ON_RUNS = (
    " Here: mean ± standard deviation over the seeds. Volume here: averages made / steps. Hours: "
    "training without evaluations and checkpoints, on the machine of each run."
)
NOTE_ON_DIFFERENCES = (
    " Difference: here minus paper, ± the standard error of the mean here (standard deviation / "
    "√seeds); the paper's own spread is not part of it."
)


@pytest.fixture
def summaries(three_seeds: list[Path], tmp_path: Path) -> dict[str, list[Summary]]:
    for folder in three_seeds:
        add_record(folder, tmp_path / "records")
    return read_summaries(tmp_path / "records")


def test_a_row_holds_numbers_tags_and_counts(
    reference: Path, summaries: dict[str, list[Summary]]
) -> None:
    table = comparison_table(read_reference(reference), summaries, plan_of)
    parallel, quadratic = table.to_dict("records")
    assert quadratic == {
        "table": "1b",
        "experiment": "demo/quadratic",
        "model": "ViT-B/16",
        "global_batch": 4096,
        "gpus": 16,
        "schedule": "cosine",
        "rule": "quadratic",
        "h_base": 4,
        "method": "QSR, H_base = 4",
        "alpha": 0.4375,
        "volume_percent_paper": 11.5,
        "volume_percent_tag": "D",
        "volume_percent_plan": pytest.approx(100 * 38 / 330),
        "top1_paper": 80.98,
        "top1_tag": "R",
        "volume_percent_mean": pytest.approx(100 * 38 / 330),
        "seeds": 3,
        "top1_mean": pytest.approx(81.2),
        "top1_std": pytest.approx(0.2),
        "top1_difference": pytest.approx(0.22),
        "top1_difference_error": pytest.approx(0.2 / math.sqrt(3)),
        "hours_paper": pytest.approx(math.nan, nan_ok=True),
        "hours_tag": "",
        "hours_mean": 0.02,
    }
    assert (parallel["volume_percent_plan"], parallel["seeds"]) == (100.0, 0)
    assert (parallel["hours_paper"], parallel["hours_tag"]) == (26.7, "A")
    unknown = ("alpha", "top1_mean", "top1_std", "top1_difference", "hours_mean")
    assert all(pd.isna(parallel[name]) for name in unknown)


def test_markdown_to_the_letter(reference: Path, summaries: dict[str, list[Summary]]) -> None:
    table = comparison_table(read_reference(reference), summaries, plan_of)
    assert comparison_markdown(table, title=table_title(table)) == (
        "# Table 1b: ViT-B/16, global batch 4096, 16 GPUs, cosine schedule\n"
        "\n"
        "| method          | alpha  | volume %, paper | volume %, plan "
        "| volume %, here | top-1 %, paper     | top-1 %, here          "
        "| difference                | hours, paper | hours, here |\n"
        "|-----------------|--------|-----------------|----------------"
        "|----------------|--------------------|------------------------"
        "|---------------------------|--------------|-------------|\n"
        "| data parallel   | -      | 100.0 [D]       | 100.0          "
        "| not run        | 79.86 [D]          | not run                "
        "| -                         | 26.7 [A]     | not run     |\n"
        "| QSR, H_base = 4 | 0.4375 | 11.5 [D]        | 11.5           "
        "| 11.5           | 80.98 (unverified) | 81.20 ± 0.20 (3 seeds) "
        "| +0.22 ± 0.12 (unverified) | -            | 0.02        |\n"
        "\n"
        f"{NOTES}{NOTES_ON_RUNS}{NOTE_ON_DIFFERENCES}\n"
    )


def test_a_table_comes_back_from_its_file(
    reference: Path, summaries: dict[str, list[Summary]], tmp_path: Path
) -> None:
    table = comparison_table(read_reference(reference), summaries, plan_of)
    halves = [tmp_path / "first.csv", tmp_path / "second.csv"]
    for path, name in zip(halves, ("3", "4"), strict=True):
        table.assign(table=name).to_csv(path, index=False, float_format="%.10g")
    both = read_comparison(halves)
    assert both["table"].tolist() == ["3", "3", "4", "4"]
    text = comparison_markdown(both[both["table"] == "4"])
    assert text == comparison_markdown(table)
    # the notes on their own
    assert comparison_notes(both) == NOTES + NOTES_ON_RUNS + NOTE_ON_DIFFERENCES
    assert comparison_markdown(both[:2], notes=False) + f"\n{comparison_notes(both)}\n" == text


def test_where_nothing_was_run_every_row_says_so(reference: Path) -> None:
    table = comparison_table(read_reference(reference), {}, plan_of)
    assert comparison_markdown(table) == (
        "| method          | alpha  | volume %, paper | volume %, plan | top-1 %, paper     "
        "| top-1 %, here | hours, paper | hours, here |\n"
        "|-----------------|--------|-----------------|----------------|--------------------"
        "|---------------|--------------|-------------|\n"
        "| data parallel   | -      | 100.0 [D]       | 100.0          | 79.86 [D]          "
        "| not run       | 26.7 [A]     | not run     |\n"
        "| QSR, H_base = 4 | 0.4375 | 11.5 [D]        | 11.5           | 80.98 (unverified) "
        "| not run       | -            | not run     |\n"
        "\n"
        f"{NOTES}\n"
    )


def test_a_rehearsal_says_so_and_is_not_compared_with_the_paper(
    reference: Path, write_run: WriteRun, tmp_path: Path
) -> None:
    settings = ("experiment=demo/quadratic", "epochs=5")
    runs = [write_run(*settings, f"seed={seed}", top1=98.0 + seed) for seed in (1, 2)]
    for run in runs:
        add_record(run, tmp_path / "records")
    ((name, summaries),) = read_summaries(tmp_path / "records").items()
    assert name == "demo/quadratic/epochs=5"
    rows = read_reference(reference)

    table = comparison_table(rows, {"demo/quadratic": summaries}, plan_of)
    assert table["seeds"].tolist() == [0, 2]
    assert table["top1_mean"].tolist()[1] == 99.5
    assert table["top1_difference"].isna().all()
    assert table["top1_difference_error"].isna().all()
    lines = comparison_markdown(table, title="Rehearsal", marker=REHEARSAL).splitlines()
    assert lines[:4] == [
        "# Rehearsal",
        "",
        "**REHEARSAL on digits: proves that the machinery runs, not the paper's claim**",
        "",
    ]
    assert "difference" not in lines[4]
    assert "| 99.50 ± 0.71 (2 seeds) |" in lines[7]
    assert lines[-1] == NOTES + NOTES_ON_RUNS

    # such runs do not count under their own name either
    assert comparison_table(rows, {name: summaries}, plan_of)["seeds"].tolist() == [0, 0]


def test_one_seed_has_no_spread(reference: Path, summaries: dict[str, list[Summary]]) -> None:
    only = {"demo/quadratic": summaries["demo/quadratic"][:1]}
    text = comparison_markdown(comparison_table(read_reference(reference), only, plan_of))
    assert "| 81.00 (1 seed) | +0.02 (unverified) |" in text


def test_model_and_batch_have_columns_where_rows_differ_in_them(reference: Path) -> None:
    text = reference.read_text()
    old, new = "vit_b16,adamw,4096,16,cosine,parallel", "resnet152,sgd,16384,64,cosine,parallel"
    reference.write_text(text.replace(old, new))
    table = comparison_table(read_reference(reference), {}, plan_of)
    head, _, parallel, quadratic = comparison_markdown(table).splitlines()[:4]
    assert [cell.strip() for cell in head.split("|")[1:4]] == ["model", "global batch", "method"]
    assert [cell.strip() for cell in parallel.split("|")[1:3]] == ["ResNet-152", "16384"]
    assert [cell.strip() for cell in quadratic.split("|")[1:3]] == ["ViT-B/16", "4096"]


def test_a_run_of_another_plan_is_refused(reference: Path, write_run: WriteRun) -> None:
    folder = write_run("experiment=demo/quadratic", averages=42)
    runs = {"demo/quadratic": [read_run(folder).summary]}
    with pytest.raises(ReportError) as raised:
        comparison_table(read_reference(reference), runs, plan_of)
    assert str(raised.value) == (
        "demo/quadratic/seed_1 has 42 averages in 330 steps, but the experiment now has 38 in "
        "330: run it again, or remove its record"
    )


def test_runs_of_different_names_are_not_seeds_of_one(reference: Path, write_run: WriteRun) -> None:
    folders = [write_run("experiment=demo/quadratic", *more) for more in ((), ("epochs=5",))]
    runs = [read_run(folder).summary for folder in folders]
    with pytest.raises(
        ReportError, match="demo/quadratic and demo/quadratic/epochs=5 are different runs"
    ):
        comparison_table(read_reference(reference), {"demo/quadratic": runs}, plan_of)
