#!/usr/bin/env python
"""Does the rule matter for small deep networks? A residual network and a vision transformer.

    python scripts/deep_evidence.py [SETTING=VALUE ...]        make evidence-deep

Trains both on 200 digits with data parallel, constant H, beta / lr and QSR: first with two seeds
at three peak rates, to choose each rule's rate on separate tuning images; then with eight seeds,
tested on 1,001 other digits; and the ViT data parallel with the weight decay and clipping of the
paper's data parallel runs. Prints the table, and writes it and all values of every run to
results/evidence/. Runs one process per available core. Finished runs are not trained again; remove
runs/evidence to repeat them. Extra settings, for example epochs=5, apply to every run. Exit status:
0 done, 1 failed, 2 refused, 130 interrupted.
"""

import argparse
import functools
import os
import time
from pathlib import Path
from typing import Any

from qsr.config.schema import Config
from qsr.data.prepare.digits import prepare_few_digits
from qsr.errors import showing_errors
from qsr.evidence.deep_study import (
    DeepStudy,
    Measured,
    Trial,
    choose_rates,
    deep_record,
    measure,
    reported_runs,
    side_by_side,
    tuning_runs,
    with_recipes,
)
from qsr.output import program
from qsr.report.evidence_deep import deep_report
from qsr.run.folder import write_json, write_text

ROOT = Path(__file__).parents[1]


@showing_errors
def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    study = DeepStudy(
        models=tuple(options.models),
        rules=tuple(options.rules),
        tuning_seeds=DeepStudy.tuning_seeds[: options.tuning_seeds],
        seeds=tuple(range(1, options.seeds + 1)),
        probes=options.probes,
        settings=tuple(options.settings),
    )
    os.chdir(ROOT)  # data/ and runs/ are relative to the project, not to the caller's folder
    started = time.monotonic()
    record = _carry_out(study)
    tables = deep_report(record)
    options.results.mkdir(parents=True, exist_ok=True)
    write_json(options.results / "deep.json", record)
    write_text(options.results / "deep.md", tables)
    print(f"\n{tables}\n{(time.monotonic() - started) / 60:.0f} min; {options.results}/deep.*")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    parser.add_argument("--models", nargs="+", default=DeepStudy.models)
    parser.add_argument("--rules", nargs="+", default=DeepStudy.rules, help="with quadratic")
    parser.add_argument("--tuning-seeds", type=int, default=len(DeepStudy.tuning_seeds))
    parser.add_argument("--seeds", type=int, default=len(DeepStudy.seeds))
    parser.add_argument("--probes", type=int, default=DeepStudy.probes)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "evidence")
    return parser


def _carry_out(study: DeepStudy) -> dict[str, Any]:
    prepare_few_digits("data/few_digits", "test")
    prepare_few_digits("data/few_digits_tuning", "tuning")
    tried = _measure(tuning_runs(study), study.probes, "choose the rates")
    rates = with_recipes(choose_rates(tried))
    reported = _measure(reported_runs(study, rates), study.probes, "report")
    return deep_record(study, tried, rates, reported)


def _measure(runs: dict[Trial, Config], probes: int, purpose: str) -> dict[Trial, Measured]:
    print(f"{len(runs)} runs to {purpose}", flush=True)
    processes = len(os.sched_getaffinity(0))
    found = side_by_side(functools.partial(measure, probes=probes), list(runs.values()), processes)
    measurements = {}
    for trial, measured in zip(runs, found, strict=True):
        measurements[trial] = measured
        print(
            f"{trial.model} {trial.rule}, peak rate {trial.rate:g}, seed {trial.seed}: "
            f"{measured.error:.2f} % errors, tr(Hessian) {measured.hessian_trace:.2f} +- "
            f"{measured.hessian_trace_error:.2f}",
            flush=True,
        )
    return measurements


if __name__ == "__main__":
    program(main)
