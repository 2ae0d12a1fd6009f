"""One thread per test process: the suite runs in parallel processes on few cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
