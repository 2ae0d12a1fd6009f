"""Planning: predicts hours, bytes and disk space of a run; `calibrate` measures speeds.

May import: train and below; only `calibrate` needs torch.
"""
