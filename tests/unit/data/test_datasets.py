"""Trees on disk: what is listed, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from qsr.data import open_image_folders
from qsr.data.datasets import IMAGENET
from qsr.data.listing import IMAGE_EXTENSIONS
from qsr.errors import DataError
from tests.image_trees import GOOD, plant


def test_listing(tmp_path: Path) -> None:
    train, val = open_image_folders(plant(tmp_path, *GOOD, "train/a/notes.txt", "train/README"))
    assert train.split == "train"
    assert train.classes == val.classes == ("a", "b")
    assert train.files == GOOD[:3]
    assert train.labels == (0, 0, 1)
    assert val.labels == (0, 1)
    assert train.path(2) == str(tmp_path / "train/b/x.png")


def test_files_and_labels_are_torchvisions(tmp_path: Path) -> None:
    plant(tmp_path, *GOOD, "train/B/10.jpg", "train/B/9.jpg", "train/B/a b.jpg", "val/B/1.bmp")
    train, _ = open_image_folders(tmp_path)
    theirs = TorchvisionFolder(str(tmp_path / "train"))
    ours = [(train.path(i), label) for i, label in enumerate(train.labels)]
    assert ours == theirs.samples
    assert list(train.classes) == theirs.classes


def test_extensions_are_torchvisions_and_more() -> None:
    assert IMAGE_EXTENSIONS[: len(IMG_EXTENSIONS)] == IMG_EXTENSIONS


def test_relative_root_survives_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path / "data", *GOOD)
    monkeypatch.chdir(tmp_path)
    train, _ = open_image_folders("data")
    monkeypatch.chdir("/")
    assert Path(train.path(0)).exists()


def test_fingerprint_is_of_the_class_names(tmp_path: Path) -> None:
    train, val = open_image_folders(plant(tmp_path / "one", *GOOD))
    other, _ = open_image_folders(plant(tmp_path / "two", "train/a/1.jpg", "val/a/1.jpg"))
    assert len(train.fingerprint) == 16
    assert len({train.fingerprint, val.fingerprint, other.fingerprint}) == 3


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"expected_classes": 3}, "has 2 classes, not 3"),
        ({"expected_train": 4}, "/train has 3 images, not 4"),
        ({"expected_val": 50_000}, "/val has 2 images, not 50,000"),
    ],
)
def test_unexpected_counts_are_refused(
    tmp_path: Path, expected: dict[str, Any], message: str
) -> None:
    plant(tmp_path, *GOOD)
    open_image_folders(tmp_path, expected_classes=2, expected_train=3, expected_val=2)
    with pytest.raises(DataError, match=message):
        open_image_folders(tmp_path, **expected)


def test_imagenet() -> None:
    assert IMAGENET == (1000, 1_281_167, 50_000)
