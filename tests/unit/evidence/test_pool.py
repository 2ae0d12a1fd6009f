"""The processes of a study."""

import subprocess
import sys

import psutil

from tests.cli import ENVIRONMENT

PROGRAM = """
import time
from qsr.evidence.pool import process_pool

if __name__ == "__main__":
    with process_pool(2, "qsr.evidence.settings") as pool:
        jobs = [pool.submit(time.sleep, seconds) for seconds in (0.0, 600.0, 600.0)]
        jobs[0].result()
        print("started", flush=True)
"""


def test_they_die_with_a_study_that_is_killed() -> None:
    command = [sys.executable, "-c", PROGRAM]
    study = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert study.stdout is not None
    assert study.stdout.readline() == "started\n"
    everyone = psutil.Process(study.pid).children(recursive=True)
    assert len(everyone) >= 3  # the fork server and both
    study.kill()
    study.wait()
    study.stdout.close()
    _, alive = psutil.wait_procs(everyone, timeout=20)
    assert alive == []
