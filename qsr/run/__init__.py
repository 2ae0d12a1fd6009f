"""What a run leaves on disk: the run folder and its files, its lock, checkpoints and metrics.

May import: cluster, sync and config; `folder` imports only errors and `durable`.
"""
