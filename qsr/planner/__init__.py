"""Predicts: hours, bytes and disk of a run before it starts; `calibrate` measures.

May import: train and below; all but `calibrate` need no torch.
"""
