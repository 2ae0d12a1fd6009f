"""Counts how the tests of faults went, for the table in docs/reliability.md (--record-faults)."""

import ast
import json
import os
import platform
import re
import subprocess
from collections import Counter, defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "results" / "faults.json"


class FaultRecord:
    """A plugin that takes over the outcomes of a test run into results/faults.json. What that says
    of files and kinds of tests that did not run stays."""

    def __init__(self) -> None:
        self._outcomes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Each test counts once: when it ran, was skipped or could not be set up."""
        counts = report.when == "call" or (report.when == "setup" and report.outcome != "passed")
        if counts and report.location[0].startswith(("tests/faults/", "tests/slurm/")):
            kind = next((name for name in ("slurm", "slow") if name in report.keywords), "test")
            self._outcomes[report.location[0], kind][report.outcome] += 1

    def pytest_sessionfinish(self) -> None:
        files = json.loads(RECORD.read_text())["files"] if RECORD.exists() else {}
        for (path, kind), outcomes in self._outcomes.items():
            about = files.setdefault(path, {"outcomes": {}})
            about["faults"], about["promise"] = promise_of(ROOT / path)
            about["outcomes"][kind] = dict(sorted(outcomes.items()))
        there = {path: files[path] for path in sorted(files) if (ROOT / path).exists()}
        record = {"environment": _environment(), "files": there}
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def promise_of(path: Path) -> tuple[list[str], str]:
    """From a test file's docstring, as in "F2: all save" or "F7 and F8 on a real Slurm: ...": the
    faults, and the promise."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    head, _, promise = text.partition(": ")
    return re.findall(r"\bF\d+\b", head), promise[:1].upper() + promise[1:]


def _environment() -> dict[str, Any]:
    try:
        version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True)
        slurm = version.stdout.split()[-1]
    except (OSError, subprocess.CalledProcessError):
        slurm = None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "slurm": slurm,
    }
