"""Solving for alpha: how long does `qsr plan solve` take for its rows?

    python scripts/bench.py solve

Times qsr.planner.solve.solve, from composed settings to the finished rows of all H_base, for
budgets of volume and of hours on several schedules. Composing the settings and importing are left
out.
"""

import sys
import time
from typing import Any

from benchmarks.measure import alternate, record, summary
from qsr.config.load import load_config
from qsr.config.schema import Config
from qsr.planner.solve import solve

REPETITIONS = 20
EXPERIMENTS = (
    "vit_b16_b4096/quadratic_h4",
    "vit_b16_linear/quadratic_h4",
    "resnet152_b4096/quadratic_h2",
    "resnet152_step/quadratic_h2",
)
BUDGETS = ("volume=50", "volume=25", "volume=10", "volume=1", "hours=22")


def seconds(config: Config, budget: str) -> float:
    """Of one solution."""
    started = time.perf_counter()
    solve(config, budget)
    return time.perf_counter() - started


def measure() -> list[dict[str, Any]]:
    """A record for each experiment and budget."""
    found: list[dict[str, Any]] = []
    for experiment in EXPERIMENTS:
        config = load_config([f"experiment={experiment}", "speed=paper_2x8"])
        # the last budget may be out of reach of a network
        budgets = [b for b in BUDGETS if "vit" in experiment or not b.startswith("hours")]
        times = alternate(
            {budget: lambda b=budget, c=config: seconds(c, b) for budget in budgets},  # type: ignore[misc]
            REPETITIONS,
        )
        for budget, values in times.items():
            rows = solve(config, budget).rows
            found.append(
                {
                    "experiment": experiment,
                    "budget": budget,
                    "rows": len(rows),
                    "rounds": sum(row.rounds for row in rows),
                    "seconds": summary(values),
                }
            )
    return found


def main() -> int:
    cases = measure()
    for case in cases:
        print(
            f"{case['experiment']:30} {case['budget']:10} {case['rows']:2} rows, "
            f"{case['rounds']:7,} rounds: {1e3 * case['seconds']['median']:6.1f} ms"
        )
    print(record("solve", {"cases": cases}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
