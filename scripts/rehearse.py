#!/usr/bin/env python
"""Rehearse the paper's main tables on digits: every row, three seeds.

    python scripts/rehearse.py [SETTING=VALUE ...]

Trains every row of tables 1 and 2 with rehearsal=digits (docs/reproduction.md), prints the tables
and writes them and a figure to results/rehearsal/. Finished runs are not trained again; remove
runs/*_b4096 and runs/*_b16384 to repeat them. Extra settings, for example rehearsal.epochs=5, apply
to every run.
"""

import os
import time
from pathlib import Path

from qsr.cli.usage import show_help
from qsr.config.load import load_configs, run_folder
from qsr.data.prepare.digits import prepare_digits
from qsr.errors import showing_errors
from qsr.output import program
from qsr.report.collect import read_run
from qsr.report.comparison import REHEARSAL, comparison_markdown, comparison_table, table_title
from qsr.report.paper import read_reference
from qsr.report.plans import experiment_plan
from qsr.report.plots import communication_figure
from qsr.report.style import save
from qsr.session import complete

TABLES = ("1a", "1b", "2a", "2b")
SEEDS = "seed=1,2,3"
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "rehearsal"


@showing_errors
def main(settings: list[str]) -> int:
    if {"-h", "--help"} & set(settings):
        return show_help(__doc__)
    os.chdir(ROOT)  # data/ and runs/ are relative to the project, not to the caller's folder
    started = time.perf_counter()
    rows = [
        row
        for row in read_reference(ROOT / "results" / "paper" / "tables.csv")
        if row.table in TABLES
    ]
    common = ["rehearsal=digits", SEEDS, "tracking=none", *settings]
    configs = {
        row.experiment: load_configs([f"experiment={row.experiment}", *common]) for row in rows
    }
    runs = [config for seeds in configs.values() for config in seeds]
    prepare_digits(Path(runs[0].data.root))
    stopped = complete(runs, f"{len(rows)} rows, three seeds each")
    if stopped:
        return stopped
    summaries = {
        experiment: [read_run(run_folder(config)).summary for config in seeds]
        for experiment, seeds in configs.items()
    }
    table = comparison_table(rows, summaries, experiment_plan)
    RESULTS.mkdir(parents=True, exist_ok=True)
    table.to_csv(RESULTS / "tables.csv", index=False, float_format="%.10g")
    parts = [
        comparison_markdown(part, title=table_title(part), marker=REHEARSAL)
        for _, part in table.groupby("table", sort=False)
    ]
    markdown = "\n".join(parts)
    (RESULTS / "tables.md").write_text(markdown)
    save(communication_figure(table, values="here", title=REHEARSAL), RESULTS / "communication")
    print(f"\n{markdown}")
    minutes = (time.perf_counter() - started) / 60
    print(f"{minutes:.0f} min; tables and figure: {RESULTS.relative_to(ROOT)}/")
    return 0


if __name__ == "__main__":
    program(main)
