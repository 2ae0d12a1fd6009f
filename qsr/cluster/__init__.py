"""Starts: processes, ranks, signals, the process group, Slurm.

May import: sync and config.
"""
