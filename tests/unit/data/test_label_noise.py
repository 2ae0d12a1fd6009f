"""Wrong labels on purpose."""

from pathlib import Path

import pytest

from qsr.build import prepare
from qsr.config.load import load_config
from qsr.data import ImageFolder, open_image_folders, with_label_noise

CLASSES = tuple("abcde")
FOLDER = ImageFolder(
    Path("/nowhere"),
    "train",
    CLASSES,
    tuple(f"train/{name}/{n}.png" for name in CLASSES for n in range(400)),
    tuple(label for label in range(5) for _ in range(400)),
)


def test_a_share_of_the_labels_changes() -> None:
    noisy = with_label_noise(FOLDER, 0.2, seed=1)
    wrong = [n for n, (a, b) in enumerate(zip(noisy.labels, FOLDER.labels, strict=True)) if a != b]
    assert len(wrong) == 400
    assert (noisy.files, noisy.classes) == (FOLDER.files, FOLDER.classes)
    for label in range(5):  # 400 draws over 5 classes, on both sides
        assert 50 < sum(noisy.labels[n] == label for n in wrong) < 110
        assert 50 < sum(FOLDER.labels[n] == label for n in wrong) < 110


def test_the_seed_decides_which() -> None:
    once = with_label_noise(FOLDER, 0.1, seed=1).labels
    assert once == with_label_noise(FOLDER, 0.1, seed=1).labels
    assert once != with_label_noise(FOLDER, 0.1, seed=2).labels


def test_without_noise_nothing_changes() -> None:
    assert with_label_noise(FOLDER, 0.0, seed=1) is FOLDER


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_run_trains_on_them_and_validates_on_true_ones(
    own_photos: Path, tmp_path: Path, share: float
) -> None:
    config = load_config(
        [
            *("data=folder", f"data.root={own_photos}", f"data.label_noise={share}"),
            *("data.image_size=16", "epochs=1", "global_batch=4", "schedule.peak_lr=0.1"),
            *("schedule.warmup_steps=0", "sync.h_base=1", "sync.alpha=0.1", "data.loader=auto"),
            f"runs_dir={tmp_path}",
        ]
    )
    prepared, (train, val) = prepare(config), open_image_folders(own_photos)
    wrong = sum(a != b for a, b in zip(prepared.train.labels, train.labels, strict=True))
    assert wrong == round(share * len(train))
    assert prepared.val.labels == val.labels
