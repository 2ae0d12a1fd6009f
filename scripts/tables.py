#!/usr/bin/env python
"""Compare the paper's tables with the results reproduced here.

    python scripts/tables.py                     write results/tables/ and the generated blocks in
                                                 README.md and docs/
    python scripts/tables.py --check             write nothing; list outdated files
    python scripts/tables.py add RUN_FOLDER...   record finished runs in results/runs/

Exit status: 0 done, 1 a file is outdated (--check), 2 refused.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from qsr.errors import showing_errors
from qsr.output import printer, program, warn
from qsr.report.evidence_contrasts import read_evidence
from qsr.report.generated import generate, stale, write
from qsr.report.paper import read_reference
from qsr.report.plans import experiment_plan
from qsr.report.records import add_record, read_summaries
from qsr.report.speed import read_benchmarks

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results" / "runs"


@showing_errors
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="list outdated files")
    commands = parser.add_subparsers(dest="command")
    add = commands.add_parser("add", help="record finished runs")
    add.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    options = parser.parse_args(arguments)
    if options.check and options.command:
        parser.error("--check cannot be combined with add")
    if options.command == "add":
        for folder in options.folders:
            print(f"{folder} -> {add_record(folder, RECORDS).relative_to(ROOT)}")
        return 0
    return _tables(check=options.check)


def _tables(*, check: bool) -> int:
    rows = read_reference(ROOT / "results" / "paper" / "tables.csv")
    plan_of = partial(experiment_plan, config_dir=ROOT / "configs")
    faults = json.loads((ROOT / "results" / "faults.json").read_text())
    benchmarks = read_benchmarks(ROOT / "results" / "bench")
    summaries = read_summaries(RECORDS)
    files = generate(
        ROOT, rows, summaries, plan_of, faults, benchmarks, read_evidence(ROOT / "results")
    )
    paths = stale(files)
    if not check:
        write(files, paths)
    for path in paths:
        name = path.relative_to(ROOT)
        if check:
            warn(f"{name} is outdated: run python scripts/tables.py")
        else:
            print(f"wrote {name}")
    return 1 if check and paths else 0


if __name__ == "__main__":
    (program if sys.argv[1:2] == ["add"] else printer)(main)
