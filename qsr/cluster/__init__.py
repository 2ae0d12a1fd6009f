"""How ranks run: processes, signals, the process group, Slurm.

May import: sync and config.
"""
