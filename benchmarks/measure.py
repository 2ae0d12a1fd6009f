"""Measuring for all benchmarks: repeat the alternatives in turn and report medians."""

import os
import re
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from qsr.run.environment import environment
from qsr.run.folder import write_json
from qsr.sync.topology import Topology

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "bench"
Key = TypeVar("Key", bound=Hashable)


def alternate(
    contenders: Mapping[Key, Callable[[], float]], repetitions: int
) -> dict[Key, list[float]]:
    """Call the contenders in turn (A B C A B C ...) after one warm-up call each, and return their
    results. Slow changes of the machine then affect all of them equally."""
    for measure in contenders.values():
        measure()
    values: dict[Key, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, measure in contenders.items():
            values[name].append(measure())
    return values


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and number of values."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartiles": [first, third], "repetitions": len(values)}


def ratio(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Summary of the ratios within each repetition, so that common slowdowns cancel."""
    return summary([a / b for a, b in zip(values, reference, strict=True)])


def device_slug() -> str:
    """The GPU's name in a form for file names."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def record(name: str, results: Mapping[str, Any], ranks: int = 1, folder: Path = RESULTS) -> Path:
    """Write the results with versions and hardware to NAME.json; returns its path."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = environment(Topology(0, ranks, 0, ranks), device)
    del about["host"]  # private
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"environment": about, **results})
    return path


def peak_memory_bytes(action: Callable[[], object]) -> int:
    """Peak memory of this process during `action` above the memory before, in bytes. Linux only."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    action()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status of process {os.getpid()} has no {field}")
