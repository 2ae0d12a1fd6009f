#!/usr/bin/env python
"""Does the rule matter on unseen fonts? Many runs on one GPU, within a given time.

    python scripts/prepare.py glyphs
    python scripts/glyph_evidence.py --budget-seconds 330 --processes 12 \\
        cluster.device=cuda cuda_graphs=true

A small residual network and a small vision transformer learn the letters and digits of fonts with 8
workers in one process, under six rules, with and without wrong training labels, and are validated
on other fonts. Each finished run is written at once as a line of the file of records; runs that
are in it are not repeated. With several seeds, tables are printed and a picture is drawn. What is
most worth having comes first: all rules with one seed, then the next seed. Extra settings, for
example epochs=5, apply to every run. Exit status: 0 done, also if the time did not suffice for all
runs; 1 a run failed, 2 refused, 130 interrupted.
"""

import argparse
import json
import os
import time
from pathlib import Path

from qsr.errors import showing_errors
from qsr.evidence.glyph_study import GlyphStudy, Record, config_of, missing, trials, within
from qsr.output import program
from qsr.report.evidence_glyphs import (
    glyphs_figure,
    glyphs_report,
    has_comparison,
    read_records,
)
from qsr.report.style import save

ROOT = Path(__file__).parents[1]


@showing_errors
def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    study = GlyphStudy(
        models=tuple(options.models),
        rules=tuple(options.rules),
        noises=tuple(options.noises),
        rate_factors=tuple(options.rate_factors),
        seeds=tuple(range(1, options.seeds + 1)),
        settings=("tracking.progress=false", *options.settings),
    )
    results = options.results.absolute()
    os.chdir(ROOT)  # data/ and runs/ are relative to the project, not to the caller's folder
    config_of(trials(study)[0], study.settings)  # wrong settings are refused before any process
    results.parent.mkdir(parents=True, exist_ok=True)
    known = results.read_text().splitlines() if results.exists() else []
    left = missing(study, map(json.loads, known))
    print(f"{len(left)} runs, if {options.budget_seconds:g} s suffice", flush=True)
    started, done, failed = time.monotonic(), 0, 0
    with results.open("a") as file:
        for record in within(
            left, study.settings, processes=options.processes, seconds=options.budget_seconds
        ):
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a machine that is lent may be gone at any moment
            done, failed = done + 1, failed + ("failed" in record)
            print(f"{time.monotonic() - started:6.1f} s: {_line(record)}", flush=True)
    print(f"{done} runs, {failed} of them failed: {results}")
    records = read_records(results)
    if has_comparison(records):
        print(f"\n{glyphs_report(records)}")
        save(glyphs_figure(records), results.with_suffix(""))
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    parser.add_argument("--models", nargs="+", default=GlyphStudy.models)
    parser.add_argument("--rules", nargs="+", default=GlyphStudy.rules)
    parser.add_argument(
        "--noises", nargs="+", type=float, default=GlyphStudy.noises, help="shares of wrong labels"
    )
    parser.add_argument(
        "--rate-factors",
        nargs="+",
        type=float,
        default=GlyphStudy.rate_factors,
        help="peak rates, relative to the experiments'",
    )
    parser.add_argument("--seeds", type=int, default=len(GlyphStudy.seeds), help="1 to this")
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time"
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=float("inf"),
        help="begin no run that would end later",
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "results" / "evidence" / "glyphs.jsonl"
    )
    return parser


def _line(record: Record) -> str:
    about = (
        f"{record['model']} {record['rule']}, noise {record['noise']:g}, rate x "
        f"{record['rate_factor']:g}, seed {record['seed']}"
    )
    if "failed" in record:
        return f"{about}: {record['failed']}"
    return (
        f"{about}: {100 - record['top1']:.2f} % errors, volume {100 * record['volume']:.1f} %, "
        f"{record['steps'] / record['train_seconds']:.0f} steps/s, {record['seconds']:.1f} s"
    )


if __name__ == "__main__":
    program(main)
