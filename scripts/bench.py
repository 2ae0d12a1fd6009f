#!/usr/bin/env python
"""Benchmark qsr against alternatives.

    python scripts/bench.py              all except gpu, in under 20 minutes on 2 idle cores
    python scripts/bench.py NAME...      only these
    python scripts/bench.py gpu          on a machine with a GPU: all of gpu_steps_eager,
                                         gpu_steps_compiled, gpu_graphs, gpu_loading and
                                         gpu_end_to_end, each under five minutes

Each benchmark writes results/bench/NAME.json, with versions and hardware; docs/performance.md
shows the results. Exit status: 0 done, 1 a benchmark failed, 2 unknown name.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qsr.output import program, warn

ROOT = Path(__file__).parents[1]
NAMES = (
    *("slow_link", "average", "trainer", "host_memory"),
    *("loaders", "delay", "scale", "checkpoint", "solve"),
)
"""Modules of benchmarks/, in the order they run."""

GPU_NAMES = tuple(
    f"gpu_{part}" for part in ("steps_eager", "steps_compiled", "graphs", "loading", "end_to_end")
)
"""Parts of benchmarks/gpu.py, in the order they run."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = [*NAMES, *GPU_NAMES, "gpu"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(choices))
    names = parser.parse_args(arguments).names or list(NAMES)
    for name in names:
        if name not in choices:
            parser.error(f"no benchmark is named {name}: choose from {', '.join(choices)}")
    failed = []
    asked = [GPU_NAMES if name == "gpu" else (name,) for name in names]
    for name in itertools.chain.from_iterable(asked):
        print(f"== {name}", flush=True)
        started = time.monotonic()
        # each in its own process, so that none inherits threads, memory or a process group
        module, _, part = name.partition("_") if name in GPU_NAMES else (name, "", "")
        command = [sys.executable, "-m", f"benchmarks.{module}", *filter(None, [part])]
        if run(command, quiet=name in GPU_NAMES):
            failed.append(name)
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        warn(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def run(command: list[str], *, quiet: bool) -> int:
    """Run it and return its exit status. `quiet`: its standard error, into which libraries write
    thousands of lines, goes to a file; the end of it is shown if the command fails."""
    if not quiet:
        return subprocess.run(command, cwd=ROOT, check=False).returncode
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        status = subprocess.run(command, cwd=ROOT, check=False, stderr=errors).returncode
        if status:
            errors.seek(0)
            warn("".join(errors.readlines()[-20:]).rstrip())
    return status


if __name__ == "__main__":
    program(main)
