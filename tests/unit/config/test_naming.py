"""Names of runs, as lines of progress give them."""

import pytest

from qsr.config.load import load_config
from qsr.config.naming import run_label

LONG = (
    "checkpoint_of=0.5,data.augmentation.randaugment_depth=2,epochs=90,schedule.warmup_epochs=1,"
    "sync.alpha=0.025"
)


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ([], "demo/quadratic seed 1"),
        (["seed=3", "sync.alpha=0.4375"], "demo/quadratic seed 3"),  # the experiment's
        (["seed=2", "sync.alpha=0.025"], "demo/quadratic sync.alpha=0.025 seed 2"),
        (["sync.alpha=0.025", "epochs=3"], "demo/quadratic epochs=3 sync.alpha=0.025 seed 1"),
        (["data.mean=[0.5,0.4,0.3]"], "demo/quadratic data.mean=[0.5,0.4,0.3] seed 1"),
        # long ones without their groups
        (["sync.alpha=0.025", "schedule.warmup_epochs=1", "schedule.peak_lr=0.3", "workers=2"],
         "demo/quadratic peak_lr=0.3 warmup_epochs=1 alpha=0.025 workers=2 seed 1"),
    ],
)  # fmt: skip
def test_what_was_overridden_shows(overrides: list[str], label: str) -> None:
    config = load_config(["experiment=demo/quadratic", *overrides])
    assert run_label(config.experiment, config.seed) == label


def test_a_label_leaves_room_in_its_line() -> None:
    label = run_label(f"demo/quadratic/{LONG}", 1)
    assert label == (
        "demo/quadratic checkpoint_of=0.5 randaugment_depth=2 epochs=90 warmup_ep... seed 1"
    )
    assert len(label) == len("demo/quadratic ") + 60 + len(" seed 1")
