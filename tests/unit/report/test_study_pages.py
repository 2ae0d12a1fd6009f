"""A study as a page and as pictures."""

import base64
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import stats

from qsr.report.study import Study, read_study
from qsr.report.study_html import study_html
from qsr.report.study_plots import (
    progress_figure,
    schedule_figure,
    times_figure,
    top1_figure,
)
from qsr.report.study_text import study_markdown
from tests.unit.report.conftest import WriteRun


class Page(HTMLParser):
    """The text of a page, its pictures, and whether its tags match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_needs_nothing_else_and_has_every_number(study: Study) -> None:
    text = study_html(study)
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?://|url\(|@import|<script", text)
    kind = "data:image/svg+xml;base64,"
    pictures = [base64.b64decode(source.removeprefix(kind)) for source in page.sources]
    assert [source.startswith(kind) for source in page.sources] == [True] * 4
    assert {ElementTree.fromstring(each).tag[-3:] for each in pictures} == {"svg"}
    words = "".join(page.words)
    for cell in re.findall(r"[+-]?\d[\d.,]*\d(?: ± [\d.]+)?|\[[^\]]*\d\]", study_markdown(study)):
        assert cell in words
    for run in study.runs:
        assert str(run.folder) in words
        assert f"{run.summary['top1']:.2f}" in words
    assert "not measured" in words


def test_what_users_write_is_only_text(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run("experiment=demo/constant")
    folder.rename(tmp_path / "<b>&")
    text = study_html(read_study([tmp_path]))
    assert f"{tmp_path}/&lt;b&gt;&amp;" in text
    assert Page(text).open == []


def bars(figure: Figure) -> list[float]:
    return [p.get_width() for p in figure.axes[0].patches if isinstance(p, Rectangle)]


def test_pictures_show_the_same_numbers(study: Study) -> None:
    final, differences = top1_figure(study).axes
    assert [list(line.get_xdata()) for line in final.lines if len(line.get_xdata()) > 1] == [  # type: ignore[arg-type]
        [90.0, 91.0, 95.0, 92.0], [91.0, 93.0, 96.0],
    ]  # fmt: skip
    constant, qsr = (c for c in final.containers if isinstance(c, ErrorbarContainer))
    ends = constant.lines[2][0].get_segments()[0][:, 0]
    assert ends.tolist() == pytest.approx(stats.t.interval(0.95, 3, 92.0, math.sqrt(14 / 3) / 2))
    assert qsr.lines[0].get_xdata() == pytest.approx([280 / 3])
    (change,) = (c for c in differences.containers if isinstance(c, ErrorbarContainer))
    assert change.lines[0].get_xdata() == pytest.approx([4 / 3])

    error, loss = progress_figure(study).axes
    assert [list(line.get_ydata()) for line in error.lines] == [  # type: ignore[arg-type]
        [pytest.approx(8.0)], [pytest.approx(20 / 3)],
    ]  # fmt: skip
    assert [list(line.get_ydata()) for line in loss.lines] == [[0.5], [0.5]]  # type: ignore[arg-type]
    # constant H: 72 s that hide communication; QSR: 68 s and 4 s of it; both 8 s of evaluations
    assert sorted(bars(times_figure(study))) == [0, 0, 0, 4, 8, 8, 68, 72]
    labels = [text.get_text() for text in schedule_figure(study).legends[0].get_texts()]
    assert labels[1] == (
        r"QSR, $H_\mathrm{base}$ = 4, $\alpha$ = 0.4375: 38 rounds, volume 11.5 %"
    )  # fmt: skip


def test_seeds_that_were_evaluated_at_other_epochs(tmp_path: Path, write_run: WriteRun) -> None:
    """A mean over changing seeds would jump: it is drawn where all were evaluated."""
    for seed, epochs in ((1, (5, 10, 15)), (2, (10, 15))):
        folder = write_run("experiment=demo/constant", f"seed={seed}")
        rows = [
            {"kind": "eval", "step": 22 * epoch, "epoch": epoch, "top1": 90.0 + seed, "loss": 1.0}
            for epoch in epochs
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = progress_figure(read_study([tmp_path])).axes[0].lines
    assert np.asarray(line.get_xdata()).tolist() == [10, 15]
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx([8.5, 8.5])
