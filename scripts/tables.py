#!/usr/bin/env python
"""The paper's tables beside what was reproduced here.

    python scripts/tables.py                     write results/tables/ and the generated blocks in
                                                 README.md and docs/
    python scripts/tables.py --check             write nothing; name what is not current
    python scripts/tables.py add RUN_FOLDER...   record finished runs in results/runs/

Exit status: 0 done, 1 something is not current (--check), 2 refused.
"""

import argparse
import sys
from pathlib import Path

from qsr.config.load import ConfigError, load_config
from qsr.config.planning import make_plan
from qsr.core.plan import Plan
from qsr.report.collect import ReportError
from qsr.report.generated import generate, stale, write
from qsr.report.paper import read_reference
from qsr.report.records import add_record, read_summaries

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results" / "runs"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="name what is not current")
    commands = parser.add_subparsers(dest="command")
    add = commands.add_parser("add", help="record finished runs")
    add.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    options = parser.parse_args(arguments)
    if options.check and options.command:
        parser.error("--check goes alone")
    try:
        if options.command == "add":
            for folder in options.folders:
                print(f"{folder} -> {add_record(folder, RECORDS).relative_to(ROOT)}")
            return 0
        return _tables(check=options.check)
    except (ConfigError, ReportError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2


def _tables(*, check: bool) -> int:
    rows = read_reference(ROOT / "results" / "paper" / "tables.csv")
    files = generate(ROOT, rows, read_summaries(RECORDS), _plan)
    paths = stale(files)
    if not check:
        write(files, paths)
    for path in paths:
        name = path.relative_to(ROOT)
        if check:
            print(f"{name} is not current: python scripts/tables.py", file=sys.stderr)
        else:
            print(f"written: {name}")
    return 1 if check and paths else 0


def _plan(experiment: str) -> Plan:
    config = load_config([f"experiment={experiment}"], ROOT / "configs")
    if config.data.train_images is None:
        raise ReportError(f"{experiment} has no plan without its data: set data.train_images")
    return make_plan(config, config.data.train_images)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
