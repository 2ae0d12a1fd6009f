"""Remembers: the run folder and its files, its lock, checkpoints, metrics.

May import: cluster, sync and config; `folder` nothing but errors and `durable`.
"""
