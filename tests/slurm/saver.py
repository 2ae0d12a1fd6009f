"""A run reduced to how it stops: each rank waits for a signal, saves, waits until all ranks have
saved, and leaves as a run would. What is started again leaves at once.

    srun ... python -m tests.slurm.saver FOLDER
"""

import signal
import sys
import time
from pathlib import Path

from qsr.cluster.slurm import current_task, stopped_status


def main(folder: Path) -> int:
    task = current_task()
    assert task is not None
    if task.restarts:
        return 0
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda got, _frame: received.append(got))
    (folder / f"ready_{task.rank}").touch()
    while not received:
        time.sleep(0.05)
    time.sleep(0.5 * task.rank)  # some save later than others
    (folder / f"saved_{task.rank}").write_text(signal.Signals(received[0]).name)
    while len(list(folder.glob("saved_*"))) < task.ranks:
        time.sleep(0.05)
    return stopped_status()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
