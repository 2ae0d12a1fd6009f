"""Imported only by the fork server, before anything else, so that it dies with its launcher.

The ranks die with the server that forked them. So no rank outlives the launcher, even if it is
stopped or hangs in the kernel, and the ranks themselves do not have to handle this.
"""

import os

from qsr.cluster.slurm import die_with_parent

PID = os.getpid()
"""The server's. The processes that it forks inherit the value."""

die_with_parent()
