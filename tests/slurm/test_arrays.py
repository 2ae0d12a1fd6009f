"""F1 and F2 on a real Slurm: a sweep is one job array; an element that is requeued or killed
resumes alone, and all end with the bits of undisturbed runs."""

import csv
import io
import os
import signal
import statistics
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsr.run.folder import read_rows
from tests.slurm.conftest import Jobs, one_node, ranks, read_json, same_weights, steps
from tests.slurm.rig import Rig, wait_until

ALPHAS = ("0.2", "0.3", "0.4375", "0.6")
SWEEP = (f"sync.alpha={','.join(ALPHAS)}", "seed=1,2,3")
RUNS = range(12)
SIZE = ("workers=2", "epochs=4", "evaluation.every_epochs=4", "checkpoint.every_steps=5")
"""Some seconds on one rank."""


def running(rig: Rig, array: str) -> list[int]:
    """The elements that run now."""
    listed = rig.run("squeue", "-h", "--states=RUNNING", f"--jobs={array}", "--format=%K")
    return [int(number) for number in listed.split()]


@contextmanager
def sampled(rig: Rig, array: str) -> Iterator[list[int]]:
    """How many elements run, over and over."""
    counts: list[int] = []
    enough = threading.Event()

    def sample() -> None:
        while not enough.wait(0.3):
            counts.append(len(running(rig, array)))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield counts
    finally:
        enough.set()
        thread.join()


def one_at_work(rig: Rig, array: str, folders: list[Path], but: int = -1) -> int:
    """A running element that has saved something and has not ended."""
    found: list[int] = []

    def there() -> bool:
        found[:] = [
            element
            for element in running(rig, array)
            if element != but
            and len(steps(folders[element])) > 1
            and steps(folders[element])[-1] < 60
        ]
        return bool(found)

    wait_until(there, 240)
    return found[0]


@pytest.mark.slurm
@pytest.mark.timeout(1500)
def test_a_sweep_is_an_array_whose_elements_come_back_alone(
    rig: Rig, jobs: Jobs, digits: Path, tmp_path: Path
) -> None:
    folders = jobs.folders(*SIZE, *SWEEP)
    array = jobs.submit_array(*SIZE, *SWEEP, "cluster.parallel=2")
    with sampled(rig, array) as counts:
        assert rig.run("squeue", "-h", "--format=%j").splitlines()[0] == (
            "demo/quadratic sync.alpha=0.2,0.3,0.4375,0.6 seed=1,2,3"
        )
        waiting = f"(job {array}_11: JobArrayTaskLimit)"
        wait_until(lambda: waiting in jobs.status(), 30)
        requeued = one_at_work(rig, array, folders)
        rig.run("scontrol", "requeue", f"{array}_{requeued}")
        killed = one_at_work(rig, array, folders, but=requeued)
        for process in ranks(rig, rig.number(f"{array}_{killed}")):
            os.kill(process, signal.SIGKILL)
        rig.wait_for(f"{array}_{killed}", "FAILED", seconds=60)
        assert not (folders[killed] / "summary.json").exists()
        rig.run("scontrol", "requeue", f"{array}_{killed}")
        for element in (requeued, killed):
            rig.wait_for(f"{array}_{element}", "COMPLETED", seconds=600)
            assert rig.restarts(f"{array}_{element}") == 1
        wait_until(lambda: all((folder / "summary.json").exists() for folder in folders), 600)
    assert max(counts) == 2
    for element, folder in enumerate(folders):
        assert read_json(folder / "job.json")["job"] == f"{array}_{element}"
        log = Path(read_json(folder / "job.json")["log"])
        assert log.parent.samefile(folder / "slurm")
        assert "top-1" in log.read_text()
    assert jobs.status().count("\ndone ") == len(RUNS)
    again = jobs.qsr("submit", *jobs.common, *one_node(), *SIZE, *SWEEP)
    assert again == "12 of 12 runs already finished\n"

    alone = Jobs(rig, digits, tmp_path / "undisturbed")
    undisturbed = [
        folder
        for alpha in ALPHAS
        for folder in alone.all_here(*SIZE, f"sync.alpha={alpha}", "seed=1,2,3", "cluster.ranks=1")
    ]
    assert [same_weights(*pair) for pair in zip(folders, undisturbed, strict=True)] == [True] * 12

    rows = csv.DictReader(io.StringIO(jobs.qsr("report", str(jobs.runs), "--format", "csv")))
    reported = {row["sync.alpha"]: row for row in rows if row["metric"] == "top1_percent"}
    assert tuple(reported) == ALPHAS
    for row, first in zip(reported.values(), RUNS[::3], strict=True):
        group = [read_rows(folder / "metrics.jsonl")[0] for folder in folders[first : first + 3]]
        assert (row["runs"], row["measured"]) == ("3", "3")
        assert float(row["mean"]) == pytest.approx(statistics.mean(g[-1]["top1"] for g in group))


@pytest.mark.slurm
def test_an_element_that_is_cancelled_before_it_starts_can_be_submitted_again(
    rig: Rig, jobs: Jobs
) -> None:
    """Slurm forgets it at once. The others are still refused."""
    rig.run("scontrol", "update", "PartitionName=low", "State=DOWN")
    try:
        array = jobs.submit_array(*SIZE, "seed=1,2,3")
        rig.run("scancel", f"{array}_1")
        first, second, third = jobs.status().splitlines()[1:]
        assert first.startswith("queued ")
        assert first.endswith(f"seed_1  (job {array}_0: PartitionDown)")
        assert second.startswith("stopped ")
        assert second.endswith(
            f"seed_2  (job {array}_1: gone before it started; run the same command to resume)"
        )
        assert third.endswith(f"seed_3  (job {array}_2: PartitionDown)")
        again = jobs.qsr("submit", *jobs.common, *one_node(), *SIZE, "seed=2")
        assert f"  job {int(array) + 1}, logs in {jobs.folder(*SIZE, 'seed=2')}/slurm" in again
        refused = jobs.try_to(
            sys.executable, "scripts/submit.py", *jobs.common, *one_node(), *SIZE, "seed=3"
        )
        assert refused.returncode == 2
        assert f"seed_3 already has job {array}_2 (PENDING), which will run" in refused.stderr
    finally:
        rig.run("scontrol", "update", "PartitionName=low", "State=UP")
