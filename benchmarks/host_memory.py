"""Keeping freed memory for the next tensor: how much time does it save on the CPU, and how much
memory does it cost?

    python scripts/bench.py host_memory

Steps of small networks with glibc's defaults, and with the settings of qsr's CPU ranks
(qsr/cluster/memory.py), each in its own processes, in both orders. Peak memory is that of the whole
process.
"""

import dataclasses
import multiprocessing
import resource
import sys
import time
from typing import Any

import torch

from benchmarks import trainer
from benchmarks.measure import ratio, record, summary
from benchmarks.trainer import BareLoop, Case
from qsr.cluster.memory import keep_freed_memory

CASES = {
    "small step": trainer.CASES["small step"],
    "large step": trainer.CASES["large step"],
    "large images": Case("small_resnet", 64, 24, 12),
}
DEFAULTS, KEPT = "glibc's defaults", "memory kept"
REPETITIONS = 6
WARMUP, STEPS = 20, 40


def train(case: Case, keep: bool) -> tuple[float, int]:
    """Seconds per step, and peak memory of this process in bytes."""
    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    loop = BareLoop(case)
    loop.take(WARMUP)
    started = time.perf_counter()
    loop.take(STEPS)
    seconds = (time.perf_counter() - started) / STEPS
    return seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(case: Case) -> dict[str, Any]:
    """Measure both settings, alternating."""
    multiprocessing.set_forkserver_preload([trainer.__name__])
    context = multiprocessing.get_context("forkserver")
    found: dict[str, list[tuple[float, int]]] = {DEFAULTS: [], KEPT: []}
    for number in range(REPETITIONS):
        for kind in reversed(found) if number % 2 else found:
            with context.Pool(1) as process:  # a new process, because the settings persist
                found[kind].append(process.apply(train, (case, kind == KEPT)))
    seconds = {kind: [each for each, _ in values] for kind, values in found.items()}
    return {
        "case": dataclasses.asdict(case),
        "seconds_per_step": {kind: summary(values) for kind, values in seconds.items()},
        "ratio": ratio(seconds[KEPT], seconds[DEFAULTS]),
        "peak_bytes": {kind: summary([b for _, b in values]) for kind, values in found.items()},
    }


def main() -> int:
    results = {name: measure(case) for name, case in CASES.items()}
    for name, found in results.items():
        seconds, peak = found["seconds_per_step"], found["peak_bytes"]
        parts = [
            f"{kind} {1e3 * seconds[kind]['median']:.2f} ms per step, "
            f"{peak[kind]['median'] / 1e6:.0f} MB peak"
            for kind in seconds
        ]
        print(f"{name}: {'; '.join(parts)}; {found['ratio']['median']:.3f} x the time")
    print(record("host_memory", {"cases": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
