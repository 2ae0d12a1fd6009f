"""Local SGD between workers, FSDP2 inside each: 2 workers of 2 processes.

    python scripts/prepare.py digits
    torchrun --nproc-per-node 4 examples/fsdp2_hybrid.py --shards 2

The processes of a worker share its model and its batch. Those that hold the same shard of every
worker form a group, and average it at the end of a round.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from qsr import QuadraticRule
from qsr.sync.local_sgd import LocalSGD

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", type=Path, default=Path("data/digits"))
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--shards", type=int, default=2, help="processes per worker")
parser.add_argument("--batch", type=int, default=16, help="images per process and step")
parser.add_argument("--save", type=Path, help="file for the averaged model")
args = parser.parse_args()

cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
workers = dist.get_world_size() // args.shards
mesh = init_device_mesh(device.type, (workers, args.shards), mesh_dim_names=("workers", "shard"))
worker, shard = mesh["workers"].get_local_rank(), mesh["shard"].get_local_rank()

torch.manual_seed(1)  # all workers start from the same weights
model = nn.Sequential(
    *(nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.GroupNorm(4, 16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.GroupNorm(4, 32), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
).to(device)
for layer in (model[0], model[3], model[7]):
    fully_shard(layer, mesh=mesh["shard"])  # averages gradients within the worker only
fully_shard(model, mesh=mesh["shard"])

train, val = (ImageFolder(args.data / split, ToTensor()) for split in ("train", "val"))
# a worker sees the same images in a step, on however many processes
place: DistributedSampler[Any] = DistributedSampler(
    train, num_replicas=dist.get_world_size(), rank=shard * workers + worker, drop_last=True
)
loader = DataLoader(train, batch_size=args.batch, sampler=place, drop_last=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
total = args.epochs * len(loader)
scheduler = CosineAnnealingLR(optimizer, total)
rule = QuadraticRule(h_base=2, alpha=0.075)
group = mesh["workers"].get_group()
sync = LocalSGD(model, optimizer, rule, total_steps=total, group=group)

for epoch in range(args.epochs):
    place.set_epoch(epoch)
    for images, labels in loader:
        nn.functional.cross_entropy(model(images.to(device)), labels.to(device)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        sync.step()

with sync.averaged(), torch.no_grad():
    correct = torch.zeros((), device=device)
    for images, labels in DataLoader(val, batch_size=128):  # every process: the model is sharded
        correct += (model(images.to(device)).argmax(1) == labels.to(device)).sum()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if dist.get_rank() == 0:
    print(f"accuracy {correct.item() / len(val):.4f}", sync.summary())
    if args.save:
        torch.save(whole, args.save)
dist.destroy_process_group()
