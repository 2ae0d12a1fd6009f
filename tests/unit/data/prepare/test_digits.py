"""The digits: complete or absent, the same everywhere, and real JPEG files."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from qsr.data import Loader, Request, open_image_folders
from qsr.data.prepare.digits import DIGITS, FEW_DIGITS, prepare_digits, prepare_few_digits
from qsr.errors import DataError
from tests.transforms import eval_transform


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "deep" / "digits"
    prepare_digits(root)
    return root


def content(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_counts(root: Path) -> None:
    train, val = open_image_folders(
        root,
        expected_classes=DIGITS.classes,
        expected_train=DIGITS.train,
        expected_val=DIGITS.val,
    )
    assert train.classes == tuple("0123456789")
    assert DIGITS.train + DIGITS.val == 1797
    for label in range(10):
        share = val.labels.count(label) / (val.labels.count(label) + train.labels.count(label))
        assert 0.19 < share <= 0.2


def test_files_show_the_digits(root: Path) -> None:
    digits = load_digits()
    splits = open_image_folders(root)
    names = sorted(Path(file).stem for split in splits for file in split.files)
    assert names == [f"{index:04d}" for index in range(1797)]
    for split in splits:
        for index in range(0, len(split), 50):
            number = int(Path(split.files[index]).stem)
            assert split.labels[index] == digits.target[number]
            with Image.open(split.path(index)) as image:
                assert (image.format, image.size) == ("JPEG", (32, 32))
                small = np.asarray(image.resize((8, 8), Image.Resampling.BOX))
            correlation = np.corrcoef(small.ravel(), digits.images[number].ravel())[0, 1]
            assert correlation > 0.97


def test_source_and_licence_travel_along(root: Path) -> None:
    text = (root / "SOURCE.txt").read_text()
    assert "Alpaydin" in text
    assert "CC BY 4.0" in text


def test_bytes_are_the_same_every_time(root: Path, tmp_path: Path) -> None:
    prepare_digits(tmp_path / "again")
    assert content(root) == content(tmp_path / "again")


def test_a_second_call_changes_nothing(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    prepare_digits(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert list(root.parent.iterdir()) == [root]


def test_an_incomplete_or_other_folder_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "digits"
    root.mkdir()
    with pytest.raises(DataError, match=r"is not the digits data.*remove it"):
        prepare_digits(root)
    root.rmdir()
    prepare_digits(root)
    next(root.glob("val/7/*")).unlink()
    with pytest.raises(DataError, match="354 images, not 355"):
        prepare_digits(root)


def test_a_killed_run_leaves_no_half_tree(tmp_path: Path) -> None:
    """Killed at its 500th image, as by the machine: no clean-up of Python's runs."""
    script = f"""
import os
from PIL import Image
from qsr.data.prepare.digits import prepare_digits
save, calls = Image.Image.save, []
def dying_save(*args, **kwargs):
    calls.append(1)
    if len(calls) == 500:
        os._exit(9)
    save(*args, **kwargs)
Image.Image.save = dying_save
prepare_digits({str(tmp_path / "digits")!r})
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert killed.returncode == 9
    assert not (tmp_path / "digits").exists()
    prepare_digits(tmp_path / "digits")
    open_image_folders(tmp_path / "digits", expected_train=DIGITS.train)


def test_a_failed_run_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prepare_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_a_faster_process_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "digits"
    rename = Path.rename

    def overtaken(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        prepare_digits(root)  # the other process, at the worst moment
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    prepare_digits(root)
    assert list(tmp_path.iterdir()) == [root]


def test_few_digits_are_split_into_three_parts(root: Path, tmp_path: Path) -> None:
    """Disjoint, all digits together, the same pixels, and 20 of each class to train."""
    test, tuning = tmp_path / "test", tmp_path / "tuning"
    prepare_few_digits(test, "test")
    prepare_few_digits(tuning, "tuning")
    counts = Counter({"test": 1001, "tuning": 596, "train": 200})
    assert [FEW_DIGITS["test"].val, FEW_DIGITS["tuning"].val] == [1001, 596]
    found: dict[str, str] = {}
    files = Counter[str]()
    for folder, part in (
        (test / "train", "train"),
        (test / "val", "test"),
        (tuning / "val", "tuning"),
    ):
        parts = content(folder)
        files[part] = len(parts)
        found |= parts
    assert files == counts
    assert len(found) == 1797
    whole = content(root / "train") | content(root / "val")
    assert found == whole
    assert content(tuning / "train") == content(test / "train")
    train, _ = open_image_folders(test)
    assert [train.labels.count(label) for label in range(10)] == [20] * 10


def test_few_digits_are_not_taken_for_others(root: Path, tmp_path: Path) -> None:
    prepare_few_digits(tmp_path / "few", "test")
    with pytest.raises(DataError, match="1,001 images, not 596"):
        prepare_few_digits(tmp_path / "few", "tuning")
    with pytest.raises(DataError, match="not the digits data"):
        prepare_few_digits(root, "test")


def test_both_loaders_read_them(kind: str, new_loader: Callable[..., Loader], root: Path) -> None:
    train, _ = open_image_folders(root)
    loader = new_loader(kind, train, eval_transform(28))
    batch = next(loader.batches([Request(range(0, 1442, 100), 0)]))
    assert batch.images.shape == (15, 3, 28, 28)
    assert batch.labels.tolist() == sorted(batch.labels.tolist())
