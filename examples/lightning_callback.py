"""Local SGD under Lightning, on handwritten digits.

    python scripts/prepare.py digits
    torchrun --nproc-per-node 2 examples/lightning_callback.py  # again: resumes

Every process is a worker. `LocalStrategy` starts processes as "ddp" does, without averaging their
gradients.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from qsr import QuadraticRule
from qsr.integrations.lightning import LocalSGDCallback, LocalStrategy

PEAK_LR = 0.1


class Digits(LightningModule):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10]."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Log the accuracy of the workers' mean."""
        images, labels = batch
        right = (self(images).argmax(1) == labels).float().mean()
        self.log("accuracy", right, sync_dist=True, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """SGD, a warm-up over a tenth of the steps, then a cosine."""
        optimizer = torch.optim.SGD(self.parameters(), lr=PEAK_LR, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = OneCycleLR(
            optimizer, PEAK_LR, steps, pct_start=0.1, cycle_momentum=False, final_div_factor=100
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def main() -> None:
    """Train, or resume."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/digits"))
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/lightning_callback"))
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()

    seed_everything(1)
    train, val = (ImageFolder(args.data / split, ToTensor()) for split in ("train", "val"))
    rule = QuadraticRule(h_base=2, alpha=0.15)
    steps_per_epoch = len(train) // (32 * int(os.environ.get("WORLD_SIZE", "1")))
    averaging = LocalSGDCallback(
        rule,
        warmup_steps=steps_per_epoch * args.epochs // 10,
        peak_lr=PEAK_LR,
        batchnorm_batches=10,
    )
    saving = ModelCheckpoint(args.checkpoints, filename="{epoch}", save_last=True)
    trainer = Trainer(
        accelerator="auto",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        strategy=LocalStrategy(),
        max_epochs=args.epochs,
        callbacks=[averaging, saving],
        logger=False,
        enable_progress_bar=False,
    )
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    last = args.checkpoints / "last.ckpt"
    trainer.fit(
        Digits(), loader, DataLoader(val, batch_size=128), ckpt_path=last if last.exists() else None
    )
    if trainer.is_global_zero and averaging.sync is not None:
        accuracy = trainer.callback_metrics["accuracy"]
        print(f"accuracy {accuracy:.4f}", averaging.sync.summary())


if __name__ == "__main__":
    main()
