"""Plans of experiments, and their comparison with the paper."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from qsr.config.load import CONFIG_DIR, load_config
from qsr.config.planning import make_plan
from qsr.core.plan import Plan
from qsr.planner.forecast import known_images
from qsr.report.paper import Reference, ReferenceRow, reference_text
from qsr.report.tables import markdown_table


def experiment_plan(experiment: str, *settings: str, config_dir: Path = CONFIG_DIR) -> Plan:
    """The plan of an experiment of configs/, with these settings as overrides.

    Raises ConfigError if there is no such experiment, or if its number of images is not known.
    """
    config = load_config([f"experiment={experiment}", *settings], config_dir)
    return make_plan(config, known_images(config))


def volume_table_markdown(
    rows: Iterable[ReferenceRow], plan_of: Callable[[str], Plan] = experiment_plan
) -> str:
    """The planned rounds of each published row, and whether the planned volume equals the published
    one as printed in the paper. Unverified values are shown but not compared."""
    lines = []
    for row in rows:
        plan, paper = plan_of(row.experiment), row.volume_percent
        lines.append(
            {
                "table": row.table,
                "experiment": f"`{row.experiment}`",
                "alpha": "-" if row.alpha is None else f"{row.alpha:g}",
                "steps": f"{plan.total_steps:,}",
                "rounds": f"{plan.num_rounds:,}",
                "longest H": f"{plan.longest_round.length:,}",
                "volume %, plan": f"{100 * plan.volume:.1f}",
                "volume %, paper": reference_text(paper, ".1f"),
                "equal": _equal(100 * plan.volume, paper),
            }
        )
    return markdown_table(pd.DataFrame(lines))


def _equal(planned: float, published: Reference | None) -> str:
    if published is None:
        return "-"
    if not published.verified:
        return "not compared"
    return "yes" if f"{planned:.1f}" == f"{published.value:.1f}" else "NO"
