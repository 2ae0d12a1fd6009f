"""The study of deep networks, with hardly any steps."""

import json
import sys
from pathlib import Path

import pytest

from tests.cli import ROOT, call, call_here

COMMAND = [sys.executable, str(ROOT / "scripts" / "deep_evidence.py")]


@pytest.mark.slow
def test_from_runs_to_the_table(tmp_path: Path) -> None:
    command = [
        *COMMAND,
        *("epochs=2", "schedule.warmup_steps=6", f"runs_dir={tmp_path / 'runs'}"),
        *("--models", "resnet", "--rules", "constant", "quadratic", "--tuning-seeds", "1"),
        *("--seeds", "2", "--probes", "4", "--results", str(tmp_path / "results")),
    ]
    done = call(command)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "results" / "deep.json").read_text())
    constant, quadratic = record["rows"]
    for row in (constant, quadratic):
        assert len(row["tuning"]) == 3
        best = min(trial["error"] for trial in row["tuning"])
        assert best in [t["error"] for t in row["tuning"] if t["rate"] == row["rate"]]
        assert [run["seed"] for run in row["test"]] == [1, 2]
        for run in (*row["tuning"], *row["test"]):
            assert 0 <= run["error"] <= 100
            assert 0 <= run["train_error"] <= 100
            assert run["hessian_trace_error"] > 0
    assert {run["volume"] for run in constant["test"]} == {3 / 12}
    assert "QSR" in (tmp_path / "results" / "deep.md").read_text()
    summaries = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("summary.json")}
    assert len(summaries) == 2 * 3 + 2 * 2
    again = call(command)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in summaries} == summaries
    assert json.loads((tmp_path / "results" / "deep.json").read_text()) == record


def test_a_wrong_setting_is_refused() -> None:
    refused = call_here("deep_evidence", "sync.nonsense=1")
    assert refused.returncode == 2
    assert refused.stderr.startswith("refused: ")
