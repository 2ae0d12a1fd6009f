"""`scripts/report.py` on real runs: those recorded here, and one of the command line."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageColor
from scipy import stats

from qsr.report.style import COLORS
from tests.cli import ROOT, call, call_here

REPORT = [sys.executable, str(ROOT / "scripts" / "report.py")]
RECORDS = str(ROOT / "results" / "runs" / "demo")


def summaries(rule: str) -> list[dict[str, float]]:
    """The summaries of a rule's recorded runs, by seed."""
    paths = sorted((ROOT / "results" / "runs" / "demo" / rule).glob("seed_*/summary.json"))
    return [json.loads(path.read_text()) for path in paths]


def test_recorded_runs_are_compared_by_value() -> None:
    done = call([*REPORT, RECORDS, "--to", "sync.rule=constant", "--format", "csv"])
    assert (done.returncode, done.stderr) == (0, "")
    rows = pd.read_csv(io.StringIO(done.stdout)).to_dict("records")
    table = {(row["sync.rule"], row["metric"]): row for row in rows}
    constant = [run["train_seconds"] / 3600 for run in summaries("constant")]
    for rule, folder in (("every_step", "parallel"), ("quadratic", "quadratic")):
        runs = summaries(folder)
        found = table[rule, "val_loss"]
        losses = [run["val_loss"] for run in runs]
        low, high = stats.t.interval(0.95, len(losses) - 1, fmean(losses), stats.sem(losses))
        assert (found["runs"], found["measured"]) == (len(losses), len(losses))
        assert found["mean"] == pytest.approx(fmean(losses))
        assert found["sd"] == pytest.approx(stdev(losses))
        assert (found["ci95_low"], found["ci95_high"]) == pytest.approx((low, high))
        hours = table[rule, "train_hours"]
        test = stats.ttest_rel([run["train_seconds"] / 3600 for run in runs], constant)
        interval = test.confidence_interval(0.95)
        ends = (hours["difference_ci95_low"], hours["difference_ci95_high"])
        assert ends == pytest.approx((interval.low, interval.high))
    assert np.isnan(table["every_step", "communication_seconds"]["mean"])  # it overlaps


def test_every_form_and_the_page_show_the_runs(uninterrupted: Path, tmp_path: Path) -> None:
    """A run of 44 steps beside those recorded, and one that is not finished."""
    runs = tmp_path / "runs"
    run = Path(shutil.copytree(uninterrupted, runs / "short"))
    unfinished = Path(shutil.copytree(uninterrupted, runs / "unfinished"))
    (unfinished / "summary.json").unlink()
    page = tmp_path / "page.html"
    done = call([*REPORT, str(runs), RECORDS, "--html", str(page)])
    assert (done.returncode, done.stderr) == (0, f"wrote {page}\n")
    first, second, *_ = done.stdout.splitlines()
    assert first.startswith("10 finished runs in 4 groups, by ")
    assert "workers" in first
    assert second == f"left out: {unfinished} has not finished"
    summary = json.loads((run / "summary.json").read_text())
    numbers = [
        f"{summary['top1']:.2f}",
        f"{summary['val_loss']:.4f}",
        f"{100 * summary['volume']:.1f}",
        f"{summary['averages']}",
        f"{summary['data_idle_seconds']:.2f}",  # recorded runs have not measured it
    ]
    html = page.read_text()
    forms = {
        name: call([*REPORT, str(runs), "--format", name]).stdout for name in ("markdown", "latex")
    }
    for number in numbers:
        assert re.search(rf"\b{re.escape(number)}\b", done.stdout)
        assert f"<td>{number}</td>" in html
        assert f"{{{number}}}" in forms["latex"]
        assert f"| {number} " in forms["markdown"]
    assert "not measured" in done.stdout
    assert "http" not in html


@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_the_pictures(tmp_path: Path, width: int) -> None:
    """In Chromium, where it is installed: every colour of the groups is on the screen."""
    names = ("chromium-headless-shell", "chromium", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium here")
    page, screen = tmp_path / "page.html", tmp_path / "screen.png"
    assert call([*REPORT, RECORDS, "--html", str(page)]).returncode == 0
    shot = call(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={screen}"),
            *(f"--window-size={width},3300", f"--user-data-dir={tmp_path / 'profile'}"),
            page.as_uri(),
        ]
    )
    assert shot.returncode == 0, shot.stderr
    with Image.open(screen) as picture:
        assert picture.size == (width, 3300)
        seen = {color for _, color in picture.convert("RGB").getcolors(2**24) or []}
    assert {ImageColor.getrgb(color) for color in COLORS[:3]} <= seen
    assert ImageColor.getrgb(COLORS[3]) in seen  # communication


def test_a_question_that_would_mix_runs_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    line = refused(str(uninterrupted), RECORDS, "--by", "sync.rule")
    assert line.startswith("refused: runs with sync.rule=quadratic differ in more than the seed: ")
    assert "workers (" in line
    assert refused(str(tmp_path)).startswith(f"refused: no runs in {tmp_path}: ")
    page = tmp_path / "nowhere" / "page.html"
    unwritten = call_here("report", RECORDS, "--html", str(page))
    assert (unwritten.returncode, unwritten.stderr) == (
        2, f"refused: --html {page} cannot be written: No such file or directory\n",
    )  # fmt: skip
    assert refused(RECORDS, "--format", "pdf").startswith("refused: argument --format")
    helped = call([*REPORT, "--help"])
    assert (helped.returncode, helped.stderr) == (0, "")
    assert 'python scripts/report.py runs --to "sync.rule=constant"' in helped.stdout


def refused(*arguments: str) -> str:
    """The one line in which the script refuses these."""
    done = call_here("report", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line
