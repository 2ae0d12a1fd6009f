"""Trees on disk: what is listed, and what is refused by name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from qsr.data import DataError, open_image_folders
from qsr.data.datasets import IMAGE_EXTENSIONS, IMAGENET


def plant(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


GOOD = ("train/a/1.jpg", "train/a/2.JPEG", "train/b/x.png", "val/a/1.jpg", "val/b/1.webp")


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


def test_extensions_are_torchvisions() -> None:
    assert IMAGE_EXTENSIONS == IMG_EXTENSIONS


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


def remove(*files: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        for file in files:
            (root / file).unlink()

    return damage


def missing_val(root: Path) -> None:
    (root / "val").rename(root / "validation")


def no_classes(root: Path) -> None:
    for folder in ("a", "b"):
        (root / "train" / folder).rename(root / folder)


def nested_folder(root: Path) -> None:
    (root / "train/b/more").mkdir()


def extra_class_in_val(root: Path) -> None:
    plant(root, "val/c/1.jpg")


def renamed_class_in_val(root: Path) -> None:
    (root / "val/a").rename(root / "val/aa")


def link_to_itself(root: Path) -> None:
    (root / "train/c").symlink_to(root / "train/c")


def class_link_to_nothing(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "c").symlink_to(root / "gone")


def image_link_to_nothing(root: Path) -> None:
    (root / "train/a/3.jpg").symlink_to(root / "gone")


def link_to_root(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "c").symlink_to(root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_val, "no folder .*/val: "),
        (no_classes, "no class folders in .*/train"),
        (remove("train/b/x.png"), "no images in class folder .*/train/b"),
        (remove("val/a/1.jpg"), "no images in class folder .*/val/a"),
        (nested_folder, "/train/b/more is a folder inside a class"),
        (extra_class_in_val, r"different classes \(2 and 3\).* train/None and val/c"),
        (renamed_class_in_val, "train/a and val/aa"),
        (link_to_itself, "cannot follow .*/train/c"),
        (class_link_to_nothing, "cannot follow .*/train/c: No such file"),
        (image_link_to_nothing, "cannot follow .*/train/a/3.jpg: No such file"),
        (link_to_root, "/train/c/.* is a folder inside a class"),
    ],
)
def test_damaged_tree_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    plant(tmp_path, *GOOD)
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        open_image_folders(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*/nowhere"):
        open_image_folders(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no folder .*/train"):
        open_image_folders(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_unreadable_folder_is_refused(tmp_path: Path) -> None:
    plant(tmp_path, *GOOD)
    (tmp_path / "train/a").chmod(0)
    with pytest.raises(DataError, match=r"cannot list .*/train/a: Permission denied"):
        open_image_folders(tmp_path)


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
