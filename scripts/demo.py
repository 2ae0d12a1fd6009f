#!/usr/bin/env python
"""The demo: digits with data parallel, constant H and QSR, three seeds each.

    python scripts/demo.py [SETTING=VALUE ...]

Prepares the images, trains (4 workers, 4 processes, gloo, DALI on the CPU), prints a table and
writes it and the figures to results/demo/. Finished runs are not trained again; remove runs/demo to
repeat them. Extra settings, for example tracking.wandb=offline, apply to every run.
"""

import os
import time
from pathlib import Path

from qsr.cli.usage import show_help
from qsr.config.load import load_config, run_folder
from qsr.data.prepare.digits import prepare_digits
from qsr.errors import showing_errors
from qsr.output import program
from qsr.report.collect import group_by_label, read_run
from qsr.report.plots import accuracy_figure, schedule_figure
from qsr.report.style import save
from qsr.report.tables import rule_table, rule_table_markdown
from qsr.session import complete

EXPERIMENTS = ("demo/parallel", "demo/constant", "demo/quadratic")
SEEDS = (1, 2, 3)
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "demo"


@showing_errors
def main(settings: list[str]) -> int:
    if {"-h", "--help"} & set(settings):
        return show_help(__doc__)
    os.chdir(ROOT)  # data/ and runs/ are relative to the project, not to the caller's folder
    started = time.perf_counter()
    configs = [
        load_config([f"experiment={name}", f"seed={seed}", "tracking=none", *settings])
        for name in EXPERIMENTS
        for seed in SEEDS
    ]
    prepare_digits(Path(configs[0].data.root))
    stopped = complete(
        configs, f"{len(EXPERIMENTS)} rules x {len(SEEDS)} seeds, {configs[0].workers} workers each"
    )
    if stopped:
        return stopped
    groups = group_by_label([read_run(run_folder(config)) for config in configs])
    RESULTS.mkdir(parents=True, exist_ok=True)
    table = rule_table(groups)
    table.to_csv(RESULTS / "table.csv", index=False)
    markdown = rule_table_markdown(table)
    (RESULTS / "table.md").write_text(markdown)
    save(schedule_figure(groups), RESULTS / "schedule")
    save(accuracy_figure(groups), RESULTS / "accuracy")
    print(f"\n{markdown}")
    print(f"{time.perf_counter() - started:.0f} s; table and figures: {RESULTS.relative_to(ROOT)}/")
    return 0


if __name__ == "__main__":
    program(main)
