"""Imported by the fork server, before all else, and by nobody else: it dies with its launcher.

The ranks die with the server that forked them. So none of them outlives its launcher, not one that
is stopped or hangs in the kernel either, and nothing is left for them to do about it.
"""

from qsr.cluster.slurm import die_with_parent

die_with_parent()
