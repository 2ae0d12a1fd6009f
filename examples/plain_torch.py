"""Local SGD with the Quadratic Synchronization Rule in a plain torch loop, on handwritten digits.

    python scripts/prepare.py digits
    torchrun --nproc-per-node 2 examples/plain_torch.py  # again: resumes

Every process is a worker, on its own GPU or on the CPU.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from qsr import QuadraticRule
from qsr.sync.local_sgd import LocalSGD

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, default="data/digits")
parser.add_argument("--checkpoints", type=Path, default="runs/plain_torch")
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--stop-after", type=int, default=1000, help="epochs")
args = parser.parse_args()
cuda = torch.cuda.is_available()
device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
rank, workers = dist.get_rank(), dist.get_world_size()
train, val = (ImageFolder(args.data / split, ToTensor()) for split in ("train", "val"))
sampler: DistributedSampler[Any] = DistributedSampler(train, seed=1, drop_last=True)
loader = DataLoader(train, batch_size=32, sampler=sampler, drop_last=True)
val_loader = DataLoader(Subset(val, range(rank, len(val), workers)), batch_size=128)

torch.manual_seed(1)  # all workers start from the same weights
model = nn.Sequential(
    *(nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
warmup, total = len(loader), len(loader) * args.epochs
ramp = LinearLR(optimizer, start_factor=0.1, total_iters=warmup)
scheduler = SequentialLR(optimizer, [ramp, CosineAnnealingLR(optimizer, total - warmup)], [warmup])
rule = QuadraticRule(h_base=2, alpha=0.15)
sync = LocalSGD(model, optimizer, rule, total_steps=total, warmup_steps=warmup, peak_lr=0.1)
# within a round every worker has its own parameters, so each has its own checkpoint
parts: list[Any] = [model, optimizer, scheduler, sync]
checkpoint = args.checkpoints / f"worker_{rank}.pt"
if checkpoint.exists():
    for part, state in zip(parts, torch.load(checkpoint, map_location="cpu"), strict=True):
        part.load_state_dict(state)

for epoch in range(sync.steps_done // len(loader), min(args.epochs, args.stop_after)):
    sampler.set_epoch(epoch)
    model.train()
    for images, labels in loader:
        nn.functional.cross_entropy(model(images.to(device)), labels.to(device)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        sync.step()
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    torch.save([part.state_dict() for part in parts], checkpoint)

with sync.averaged(), torch.no_grad():
    sync.reestimate_batchnorm(loader, count=10)
    correct = torch.zeros((), device=device)
    for images, labels in val_loader:
        correct += (model(images.to(device)).argmax(1) == labels.to(device)).sum()
    dist.all_reduce(correct)
if rank == 0:
    print(f"accuracy {correct.item() / len(val):.4f}", sync.summary())
dist.destroy_process_group()
