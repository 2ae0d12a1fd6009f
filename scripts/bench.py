#!/usr/bin/env python
"""Measure how fast qsr is, beside named alternatives.

    python scripts/bench.py              all but gpu, in under 20 minutes on 2 idle cores
    python scripts/bench.py NAME...      the named ones
    python scripts/bench.py gpu          on a machine with a GPU

Each writes results/bench/NAME.json, with versions and hardware; docs/performance.md shows them.
Exit status: 0 done, 1 one of them failed.
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
"""Modules of benchmarks/, in the order in which they run."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = [*NAMES, "gpu"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(choices))
    names = parser.parse_args(arguments).names or list(NAMES)
    for name in names:
        if name not in choices:
            parser.error(f"there is no benchmark {name}; there are {', '.join(choices)}")
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        started = time.monotonic()
        # each in a process of its own: none inherits threads, memory or a process group
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        warn(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    program(main)
