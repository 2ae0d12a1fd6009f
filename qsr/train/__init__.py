"""Training: networks, optimizers, losses, steps, the trainer, evaluation, model files.

May import: run, data, sync, config, core.
"""
