"""Local SGD under Hugging Face's Accelerate, on handwritten digits.

    python scripts/prepare.py digits
    torchrun --nproc-per-node 2 examples/accelerate_loop.py  # again: resumes

Every process is a worker. The model is prepared with `evaluation_mode=True`, which keeps Accelerate
from wrapping it in DistributedDataParallel.
"""

import argparse
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from qsr import QuadraticRule
from qsr.integrations.accelerate import AcceleratedLocalSGD

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", type=Path, default=Path("data/digits"))
parser.add_argument("--checkpoints", type=Path, default=Path("runs/accelerate_loop"))
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--stop-after", type=int, default=1000, help="epochs, as at a time limit")
args = parser.parse_args()

cuda = torch.cuda.is_available()
accelerator = Accelerator(
    cpu=not cuda, mixed_precision="fp16" if cuda else "no", gradient_accumulation_steps=2
)
train, val = (ImageFolder(args.data / split, ToTensor()) for split in ("train", "val"))
torch.manual_seed(1)  # all workers start from the same weights
model = nn.Sequential(
    *(nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.GroupNorm(4, 16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.GroupNorm(4, 32), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
)
model = accelerator.prepare_model(model, evaluation_mode=True)  # not wrapped
optimizer = torch.optim.AdamW(model.parameters(), lr=0.004)
optimizer, loader, val_loader = accelerator.prepare(
    optimizer, DataLoader(train, batch_size=16, shuffle=True), DataLoader(val, batch_size=128)
)
total = args.epochs * math.ceil(len(loader) / accelerator.gradient_accumulation_steps)
scheduler = LinearLR(optimizer.optimizer, 1.0, 0.05, total)  # not prepared: one step per update
rule = QuadraticRule(h_base=2, alpha=0.006)
sync = AcceleratedLocalSGD(accelerator, model, optimizer, rule, total_steps=total)

# within a round every worker has its own parameters, so each has its own checkpoint
parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "sync": sync}
if accelerator.scaler is not None:
    parts["scaler"] = accelerator.scaler
checkpoint = args.checkpoints / f"worker_{accelerator.process_index}.pt"
if checkpoint.exists():
    for name, state in torch.load(checkpoint, map_location="cpu").items():
        parts[name].load_state_dict(state)

for epoch in range(sync.steps_done * args.epochs // total, min(args.epochs, args.stop_after)):
    loader.set_epoch(epoch)
    model.train()
    for images, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
            sync.step()
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)

model.eval()
correct = 0
with sync.averaged(), torch.no_grad():
    for images, labels in val_loader:
        right = model(images).argmax(1) == labels
        correct += int(accelerator.gather_for_metrics(right).sum())
accelerator.print(f"accuracy {correct / len(val):.4f}", sync.summary())
accelerator.end_training()
