"""ImageNet's archives become the right tree, however often the process is killed on the way."""

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import imagenet as torchvision_imagenet

from qsr.data import open_image_folders
from qsr.data.prepare.ground_truth import read_devkit, read_labels
from tests.imagenet_archives import VAL_LABELS, Archives, content, jpeg, wanted
from tests.killing import killed_at, killed_beyond, start

Prepare = Callable[..., int]


def test_tree(prepare: Prepare, archives: Archives, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(*archives.command()) == 0
    assert capsys.readouterr().out == f"{archives.root}: 12 training, 6 validation images\n"
    assert content(archives.root) == wanted(archives)
    train, val = open_image_folders(archives.root)
    assert train.classes == val.classes == ("n01000000", "n02000000", "n03000000")
    assert val.labels == (0, 0, 1, 1, 2, 2)
    assert [Path(file).name[-6] for file in val.files] == ["1", "5", "2", "6", "3", "4"]


def test_tree_is_torchvisions(
    prepare: Prepare, archives: Archives, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = archives.folder / "torchvision"
    theirs.mkdir()
    for split in ("train", "val", "devkit"):
        file = getattr(archives, f"{split}_tar")
        shutil.copy(file, theirs)
        md5 = hashlib.md5(file.read_bytes()).hexdigest()
        monkeypatch.setitem(torchvision_imagenet.ARCHIVE_META, split, (file.name, md5))
    reference = {s: torchvision_imagenet.ImageNet(str(theirs), split=s) for s in ("train", "val")}
    assert prepare(*archives.command()) == 0
    for ours in open_image_folders(archives.root):
        samples = [(str(theirs / file), y) for file, y in zip(ours.files, ours.labels, strict=True)]
        assert samples == reference[ours.split].samples
        assert content(archives.root / ours.split) == content(theirs / ours.split)


def test_a_second_call_changes_nothing(prepare: Prepare, archives: Archives) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in archives.root.rglob("*")}

    assert prepare(*archives.command()) == 0
    before = times()
    assert prepare(*archives.command()) == 0
    assert times() == before


def test_labels_from_a_text_file(prepare: Prepare, archives: Archives) -> None:
    file = archives.folder / "labels.txt"
    file.write_text("".join(f"{name} {wnid}\n" for name, wnid in VAL_LABELS.items()))
    assert read_labels(file) == read_devkit(archives.devkit_tar) == VAL_LABELS
    command = archives.command()
    at = command.index("--devkit-tar")
    command[at : at + 2] = ["--val-labels", str(file)]
    assert prepare(*command) == 0
    assert content(archives.root) == wanted(archives)


def check_what_a_kill_left(archives: Archives) -> None:
    """A split stands in its place only if it is complete, and so does a class in the workshop."""
    want = wanted(archives)
    for split in ("train", "val"):
        if (archives.root / split).exists():
            there = {f"{split}/{name}" for name in content(archives.root / split)}
            assert there == {name for name in want if name.startswith(split)}
        for wnid in (archives.root / ".incomplete" / split).glob("*"):
            there = {f"{split}/{wnid.name}/{name}" for name in content(wnid)}
            assert there == {name for name in want if name.startswith(f"{split}/{wnid.name}/")}


@pytest.mark.slow
def test_killed_at_every_file_operation(prepare: Prepare, archives: Archives) -> None:
    archives.train = {wnid: files[:2] for wnid, files in archives.train.items()}
    archives.write()
    operation = 0
    while killed_at(operation, archives.root, archives.command()):
        check_what_a_kill_left(archives)
        assert prepare(*archives.command()) == 0, operation
        assert content(archives.root) == wanted(archives), operation
        shutil.rmtree(archives.root)
        operation += 1
    assert operation > 30  # 12 files, 6 classes, 2 splits


def test_killed_again_and_again(archives: Archives) -> None:
    """Each process gets a little further than the one before."""
    kills = 0
    while killed_at(18, archives.root, archives.command()):
        check_what_a_kill_left(archives)
        kills += 1
        assert kills < 12
    assert kills >= 3
    assert content(archives.root) == wanted(archives)


@pytest.mark.parametrize("split", ["train", "val"])
def test_killed_within_a_file(prepare: Prepare, tmp_path: Path, split: str) -> None:
    archives = Archives(tmp_path)
    long = jpeg(1, side=100)
    files = archives.val if split == "val" else archives.train["n02000000"]
    files[2] = (files[2][0], long)
    archives.write()
    assert killed_beyond(len(long) // 2, archives.command())
    sizes = [path.stat().st_size for path in archives.root.rglob("*.JPEG")]
    assert len(long) // 2 in sizes
    check_what_a_kill_left(archives)
    assert prepare(*archives.command()) == 0
    assert content(archives.root) == wanted(archives)


def test_killed_at_any_time_with_threads(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(200_000)
    many = {f"n{label:08d}": [(f"{i}.JPEG", noise) for i in range(40)] for label in range(1, 9)}
    archives = Archives(tmp_path, many)
    archives.val = [(f"ILSVRC2012_val_{i:08d}.JPEG", noise) for i in range(1, 9)]
    archives.write()
    labels = tmp_path / "labels.txt"
    names = zip(archives.val, many, strict=True)
    labels.write_text("".join(f"{image} {wnid}\n" for (image, _), wnid in names))
    command = archives.command(threads=2)
    at = command.index("--devkit-tar")
    command[at : at + 2] = ["--val-labels", str(labels)]

    def complete() -> int:
        return len(list((archives.root / ".incomplete" / "train").glob("*")))

    seen = []
    for classes in (1, 3, 5):
        process = start(command)
        while complete() < classes and process.is_alive():
            time.sleep(0.001)
        process.kill()
        process.join()
        assert not (archives.root / "val").exists()
        seen.append(complete())
    assert seen == sorted(seen)
    assert seen[0] < 8
    process = start(command)
    process.join()
    assert process.exitcode == 0
    files = content(archives.root)
    assert len(files) == 8 * 40 + 8
    assert set(files.values()) == {hashlib.sha256(noise).hexdigest()}
