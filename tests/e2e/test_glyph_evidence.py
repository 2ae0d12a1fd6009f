"""The study on glyphs, with hardly any steps, on digits."""

import json
import sys
from pathlib import Path

import pytest

from tests.cli import ROOT, call, call_here

COMMAND = [sys.executable, str(ROOT / "scripts" / "glyph_evidence.py")]


def test_each_finished_run_is_a_line(tmp_path: Path, digits: Path) -> None:
    command = [
        *COMMAND,
        *("--models", "resnet", "--rules", "parallel", "cubic", "--noises", "0.2"),
        *("--rate-factors", "1", "--seeds", "1", "--processes", "2"),
        *("--results", str(tmp_path / "glyphs.jsonl"), f"runs_dir={tmp_path / 'runs'}"),
        *(f"data.root={digits}", "data.classes=10", "epochs=1", "global_batch=64"),
        "schedule.warmup_steps=2",
    ]
    done = call(command)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "glyphs.jsonl").read_text().splitlines()]
    assert {record["rule"] for record in records} == {"parallel", "cubic"}
    for record in records:
        assert (record["steps"], record["noise"], record["rate"]) == (22, 0.2, 0.2)
        assert record["volume"] == record["averages"] / 22
        assert record["evaluations"][-1]["top1"] == record["top1"]
        assert record["environment"]["packages"]["torch"]
    again = call_here("glyph_evidence", *command[2:])
    assert again.returncode == 0, again.stderr
    assert "0 runs" in again.stdout.splitlines()[0]
    assert len((tmp_path / "glyphs.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path, digits: Path) -> None:
    done = call(
        [
            *COMMAND,
            *("--models", "resnet", "--rules", "constant", "--noises", "0"),
            *("--rate-factors", "1e20", "1", "--seeds", "1", "--processes", "1"),
            *("--results", str(tmp_path / "glyphs.jsonl"), f"runs_dir={tmp_path / 'runs'}"),
            *(f"data.root={digits}", "data.classes=10", "epochs=1", "global_batch=64"),
            "schedule.warmup_steps=2",
        ]
    )
    assert done.returncode == 1
    first, second = map(json.loads, (tmp_path / "glyphs.jsonl").read_text().splitlines())
    assert first["failed"].startswith("TrainingError: the loss is not finite")
    assert second["steps"] == 22


def test_a_wrong_setting_is_refused() -> None:
    refused = call_here("glyph_evidence", "sync.nonsense=1")
    assert refused.returncode == 2
    assert refused.stderr.startswith("refused: ")
