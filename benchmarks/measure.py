"""How all benchmarks measure: the alternatives in turn, again and again, and the median of each."""

import os
import re
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from qsr.run.environment import environment
from qsr.run.folder import write_json
from qsr.sync.communicator import Topology

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "bench"
Key = TypeVar("Key", bound=Hashable)


def alternate(
    contenders: Mapping[Key, Callable[[], float]], repetitions: int
) -> dict[Key, list[float]]:
    """A B C A B C ...: what each returned, one unmeasured time first. What changes on the machine
    meanwhile, changes for all."""
    for measure in contenders.values():
        measure()
    values: dict[Key, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, measure in contenders.items():
            values[name].append(measure())
    return values


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, the middle half's limits, and how many."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartiles": [first, third], "repetitions": len(values)}


def ratio(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Of the same repetition, so that what slows both down cancels."""
    return summary([a / b for a, b in zip(values, reference, strict=True)])


def device_slug() -> str:
    """The GPU's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def record(name: str, results: Mapping[str, Any], ranks: int = 1, folder: Path = RESULTS) -> Path:
    """Write NAME.json, with versions and hardware."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = environment(Topology(0, ranks, 0, ranks), device)
    del about["host"]  # nobody else's concern
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"environment": about, **results})
    return path


def peak_memory_bytes(action: Callable[[], object]) -> int:
    """What `action` took of this process's memory above what it had before. Linux."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    action()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} of process {os.getpid()}")
