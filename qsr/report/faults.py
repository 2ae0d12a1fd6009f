"""The table of faults: promises and results of the tests in tests/faults and tests/slurm."""

import re
from collections.abc import Mapping
from typing import Any

from qsr.errors import ReportError

FAULTS = tuple(f"F{number}" for number in range(1, 31))
_KINDS = {
    "test": "`make test`",
    "slow": "`make test-faults`",
    "slurm": "`make test-slurm`",
}


def faults_markdown(record: Mapping[str, Any]) -> str:
    """The table from `record`, results/faults.json as tests/fault_record.py writes it. Raises
    ReportError if a fault has no test."""
    rows = ["| fault | promise | tests | result |", "| --- | --- | --- | --- |"]
    files = record["files"]
    for fault in FAULTS:
        of_fault = {path: about for path, about in files.items() if fault in about["faults"]}
        own = {path: about for path, about in of_fault.items() if path.startswith("tests/faults/")}
        if not own:
            raise ReportError(f"results/faults.json has no test of {fault}: run make test-faults")
        promise = " ".join(about["promise"] for about in own.values())
        links = "<br>".join(f"[{_stem(path)}](../{path})" for path in of_fault)
        rows.append(f"| {fault} | {promise} | {links} | {_result(of_fault)} |")
    about = record["environment"]
    rows.append(
        f"\nRecorded {about['date']}, {about['cores']} cores, Python {about['python']}, torch "
        f"{about['torch']}, Slurm {about['slurm'] or 'not there'}."
    )
    return "\n".join(rows) + "\n"


def _stem(path: str) -> str:
    return re.sub(r"^tests/|\.py$", "", path)


def _result(files: Mapping[str, Any]) -> str:
    parts = []
    for kind, command in _KINDS.items():
        counts = [about["outcomes"][kind] for about in files.values() if kind in about["outcomes"]]
        names = ("passed", "failed", "skipped")
        totals = {name: sum(count.get(name, 0) for count in counts) for name in names}
        text = ", ".join(f"{total} {name}" for name, total in totals.items() if total)
        if text:
            parts.append(f"{text} ({command})")
    return "<br>".join(parts)
