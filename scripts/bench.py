#!/usr/bin/env python
"""Benchmark qsr against alternatives.

    python scripts/bench.py              all except gpu, in under 20 minutes on 2 idle cores
    python scripts/bench.py NAME...      only these
    python scripts/bench.py gpu          on a machine with a GPU

Each benchmark writes results/bench/NAME.json, with versions and hardware; docs/performance.md
shows the results. Exit status: 0 done, 1 a benchmark failed, 2 unknown name.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from qsr.output import program, warn

ROOT = Path(__file__).parents[1]
NAMES = (
    *("slow_link", "average", "trainer", "host_memory"),
    *("loaders", "delay", "scale", "checkpoint"),
)
"""Modules of benchmarks/, in the order they run."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = [*NAMES, "gpu"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(choices))
    names = parser.parse_args(arguments).names or list(NAMES)
    for name in names:
        if name not in choices:
            parser.error(f"no benchmark is named {name}: choose from {', '.join(choices)}")
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        started = time.monotonic()
        # each in its own process, so that none inherits threads, memory or a process group
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        warn(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    program(main)
