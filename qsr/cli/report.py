"""Compare runs: means, intervals and paired differences of any set of run folders.

    qsr report runs/demo
    qsr report runs --to "sync.rule=constant"       differences by seed to that group
    qsr report runs --by sync.alpha                 group by this setting only
    qsr report runs --format latex                  or table, markdown, csv
    qsr report runs --html report.html              one page with pictures

Takes the run folders at and below these paths. Runs are grouped by all settings in which they
differ but the seed; unfinished runs are named and left out. With --by, runs of one group that
differ in other settings are refused, and the settings named. --by sync stands for all settings of
the rule; several names are joined by commas. --to takes a group's label or settings.
Intervals are of 95 %, by Student's t. Exit status: 0 done, 2 refused.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from qsr.cli.usage import show_help
from qsr.errors import ReportError, showing_errors
from qsr.output import printer, warn
from qsr.report.study import read_study
from qsr.report.study_text import print_study, study_csv, study_latex, study_markdown

FORMATS = {"markdown": study_markdown, "csv": study_csv, "latex": study_latex}


@showing_errors
def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        return show_help(__doc__)
    options = _options(arguments)
    by = [name for text in options.by for name in text.split(",")]
    study = read_study(options.runs, by=by, to=options.to)
    if options.format == "table":
        print_study(study)
    else:
        print(FORMATS[options.format](study), end="")
    if options.format == "csv":  # the other formats hold these lines
        for line in study.left_out:
            warn(f"left out: {line}")
    if options.html:
        from qsr.report.study_html import study_html  # matplotlib takes a second

        _write(options.html, study_html(study))
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"--html {path} cannot be written: {error.strerror}") from None
    warn(f"wrote {path}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ReportError(f"{message}; --help says what report takes")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--by", action="append", default=[])
    parser.add_argument("--to")
    parser.add_argument("--format", choices=["table", *FORMATS], default="table")
    parser.add_argument("--html", type=Path)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS")
    return parser.parse_intermixed_args(arguments)


def run() -> NoReturn:
    """Run it with the command line's arguments; exits."""
    printer(main)
