"""Do delayed averages (sync.delay_steps) change the accuracy? A rehearsal of ViT-B's QSR row.

    python scripts/bench.py delay

Trains experiment=vit_b16_b4096/quadratic_h4 with rehearsal=digits and three seeds: with the average
applied immediately, as in the paper, and 3 steps later (the maximum, because H_base is 4). Records
each seed's difference to the same seed without delay, and the spread over seeds. How much time a
delay saves depends on the network: see slow_link.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import record
from qsr.config.load import load_configs
from qsr.config.schema import Config
from qsr.data.prepare.digits import prepare_digits
from qsr.session import execute

DELAYS = (0, 3)
SEEDS = (1, 2, 3)
RUN = (
    "experiment=vit_b16_b4096/quadratic_h4",
    "rehearsal=digits",
    "tracking=none",
    f"seed={','.join(map(str, SEEDS))}",
)


def measure(folder: Path) -> dict[str, Any]:
    """Top-1 of every run, in percent. Data and run folders are created in `folder`."""
    settings = [*RUN, f"runs_dir={folder}/runs", f"data.root={folder}/digits"]
    configs: list[Config] = []
    for delay in DELAYS:
        configs += load_configs([*settings, f"sync.delay_steps={delay}"])
    prepare_digits(folder / "digits")
    outcomes = execute(configs)
    top1: dict[int, list[float]] = {delay: [] for delay in DELAYS}
    for config, outcome in zip(configs, outcomes, strict=True):
        assert isinstance(outcome, dict), outcome  # not stopped by a signal
        top1[config.sync.delay_steps].append(outcome["top1"])
    at_once = top1[0]
    return {
        "spread_over_seeds": max(at_once) - min(at_once),
        "by_delay": {
            str(delay): {
                "top1": values,
                "mean": statistics.mean(values),
                "differences": [v - a for v, a in zip(values, at_once, strict=True)],
            }
            for delay, values in top1.items()
        },
    }


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name))
    for delay, values in found["by_delay"].items():
        differences = ", ".join(f"{value:+.2f}" for value in values["differences"])
        print(f"delay {delay}: top-1 {values['mean']:.2f} % (by seed: {differences})")
    print(f"spread over seeds without delay: {found['spread_over_seeds']:.2f} points")
    print(record("delay", {"run": RUN, "seeds": SEEDS, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
