"""Learns: network, optimizer, loss, step, trainer, evaluation, model file.

May import: run, data, sync, config, core.
"""
