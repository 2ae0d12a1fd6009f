"""Reference values: the file in results/paper, and files that are refused."""

from pathlib import Path

import pytest

from qsr.config.load import CONFIG_DIR
from qsr.errors import ReportError
from qsr.report.paper import Reference, ReferenceRow, Tag, read_reference

PAPER = CONFIG_DIR.parent / "results" / "paper" / "tables.csv"


def test_a_row_is_typed_and_keeps_where_its_values_come_from(reference: Path) -> None:
    parallel, quadratic = read_reference(reference)
    assert parallel == ReferenceRow(
        table="1b",
        experiment="demo/parallel",
        model="vit_b16",
        optimizer="adamw",
        global_batch=4096,
        gpus=16,
        schedule="cosine",
        rule="parallel",
        h_base=1,
        alpha=None,
        top1=Reference(79.86, "D"),
        volume_percent=Reference(100.0, "D"),
        total_hours=Reference(26.7, "A"),
        comm_hours=Reference(7.25, "D"),
    )
    assert (quadratic.alpha, quadratic.total_hours, quadratic.comm_hours) == (0.4375, None, None)


def test_recalled_values_alone_are_unverified() -> None:
    tags: tuple[Tag, ...] = ("A", "C", "O", "D", "R")
    assert [Reference(1.0, tag).verified for tag in tags] == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("optimizer", "rule", "h_base", "method"),
    [
        ("sgd", "parallel", 1, "data parallel"),
        ("sgd", "constant", 2, "Local SGD, H = 2"),
        ("adamw", "constant", 8, "Local AdamW, H = 8"),
        ("adamw", "quadratic", 4, "QSR, H_base = 4"),
    ],
)
def test_methods_in_words(
    reference: Path, optimizer: str, rule: str, h_base: int, method: str
) -> None:
    alpha = "0.2" if rule == "quadratic" else ""
    head = reference.read_text().splitlines()[0]
    reference.write_text(
        f"{head}\n1a,x,resnet152,{optimizer},4096,16,cosine,{rule},{h_base},{alpha},,,,,,,,\n"
    )
    (row,) = read_reference(reference)
    assert row.method == method


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("26.7,7.25,D,D,A,D", "26.7,7.25,D,D,,D",
         r"line 2: source_hours=: input should be 'A', 'C', 'O', 'D' or 'R'"),
        ("80.98,11.5,,,R", "80.98,11.5,,,X",
         r"line 3: source_top1=X: input should be 'A', 'C', 'O', 'D' or 'R'"),
        ("79.86", "", r"line 2: top1=: input should be a valid number"),
        ("80.98", "8O.98", r"line 3: top1=8O\.98: input should be a valid number"),
        ("11.5", "-11.5", r"line 3: comm_percent=-11\.5: input should be greater than or equal"),
        ("vit_b16,adamw,4096,16,cosine,parallel", "vit,adamw,4096,16,cosine,parallel",
         r"line 2: model=vit: input should be 'resnet152' or 'vit_b16'"),
        ("0.4375", "", r"line 3: alpha must be set if rule=quadratic, and only then"),
        (",1,,79.86", ",1,0.2,79.86", r"line 2: alpha must be set if rule=quadratic"),
        ("demo/parallel", "demo/quadratic", r"two rows have the experiment demo/quadratic"),
        ("80.98,11.5,,,R,D,,", "80.98,11.5,,,R,D,", r"line 3: the number of cells differs"),
        ("80.98,11.5,,,R,D,,", "80.98,11.5,,,R,D,,,", r"line 3: the number of cells differs"),
        ("source_top1,", "tag,", r"missing columns: source_top1; unknown columns: tag"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_in_one_line(
    reference: Path, old: str, new: str, error: str
) -> None:
    text = reference.read_text()
    assert text.count(old) == 1
    reference.write_text(text.replace(old, new))
    with pytest.raises(ReportError, match=error) as raised:
        read_reference(reference)
    assert str(raised.value).startswith(str(reference))
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"nothing\.csv cannot be read"):
        read_reference(tmp_path / "nothing.csv")


def test_the_paper_has_29_rows_in_6_tables() -> None:
    rows = read_reference(PAPER)
    counts = {table: sum(row.table == table for row in rows) for table in
              dict.fromkeys(row.table for row in rows)}  # fmt: skip
    assert counts == {"1a": 5, "1b": 5, "2a": 5, "2b": 5, "3": 3, "4": 6}


@pytest.mark.parametrize("row", read_reference(PAPER), ids=lambda row: row.experiment)
def test_an_experiment_is_named_after_its_row(row: ReferenceRow) -> None:
    kind = f"b{row.global_batch}" if row.schedule == "cosine" else row.schedule
    rule = row.rule if row.rule == "parallel" else f"{row.rule}_h{row.h_base}"
    assert row.experiment == f"{row.model}_{kind}/{rule}"
    assert row.gpus * 256 == row.global_batch


def published(experiment: str) -> ReferenceRow:
    (row,) = (row for row in read_reference(PAPER) if row.experiment == experiment)
    return row


def test_derived_top1_is_the_caption_less_the_abstracts_gain() -> None:
    parallel, qsr = (published(f"vit_b16_b4096/{name}") for name in ("parallel", "quadratic_h4"))
    assert parallel.top1 is not None
    assert qsr.top1 is not None
    assert (parallel.top1.tag, qsr.top1.tag) == ("D", "C")
    assert parallel.top1.value == pytest.approx(qsr.top1.value - 1.12)


@pytest.mark.parametrize(
    ("setting", "volume"), [("vit_b16_b4096", 0.1038), ("vit_b16_b16384", 0.1612)]
)
def test_derived_hours_of_communication(setting: str, volume: float) -> None:
    parallel, qsr = (published(f"{setting}/{name}") for name in ("parallel", "quadratic_h4"))
    assert parallel.total_hours is not None
    assert qsr.total_hours is not None
    assert (parallel.total_hours.tag, qsr.total_hours.tag) == ("A", "A")
    saved = parallel.total_hours.value - qsr.total_hours.value
    assert parallel.comm_hours == Reference(round(saved / (1 - volume), 2), "D")
