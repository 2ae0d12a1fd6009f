"""A check reads every file once, however often it is killed, and writes down what it found."""

import csv
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsr.data import open_image_folders
from tests.imagenet_archives import jpeg
from tests.killing import killed_at, killed_beyond

Prepare = Callable[..., int]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Root of 2 classes with 40 training images and 1 validation image each."""
    root = tmp_path / "tree"
    for split, count in (("train", 40), ("val", 1)):
        for name in ("a", "b, c"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i:02d}.jpg").write_bytes(jpeg(1000 * len(name) + i, side=8))
    return root


def written(folder: Path) -> dict[str, str]:
    """The files that a check leaves in a folder."""
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def replace(path: Path, data: bytes | bytearray) -> None:
    """Change the contents of a file, but neither its size nor its time of change."""
    before = path.stat()
    assert len(data) == before.st_size
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_manifest(prepare: Prepare, tree: Path) -> None:
    assert prepare("check", "--root", str(tree)) == 0
    rows = list(csv.reader((tree / "manifest.csv").open()))
    files = [f"train/{name}/{i:02d}.jpg" for name in ("a", "b, c") for i in range(40)]
    files += ["val/a/00.jpg", "val/b, c/00.jpg"]
    contents = [(tree / file).read_bytes() for file in files]
    assert rows == [["file", "bytes", "sha256"]] + [
        [file, str(len(data)), hashlib.sha256(data).hexdigest()]
        for file, data in zip(files, contents, strict=True)
    ]
    train, val = open_image_folders(tree)
    table = (tree / "manifest.csv").read_bytes()
    assert json.loads((tree / "manifest.json").read_text()) == {
        "train_images": 80,
        "val_images": 2,
        "train_bytes": sum(map(len, contents[:80])),
        "val_bytes": sum(map(len, contents[80:])),
        "train_files": train.fingerprint,
        "val_files": val.fingerprint,
        "manifest_csv_sha256": hashlib.sha256(table).hexdigest(),
        "classes": {"a": {"train": 40, "val": 1}, "b, c": {"train": 40, "val": 1}},
    }
    assert written(tree).keys() == {"manifest.csv", "manifest.json"}


def test_equal_data_sets_have_equal_manifests(prepare: Prepare, tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    for path in sorted(tree.rglob("*.jpg"), reverse=True):
        (copy / path.relative_to(tree)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy / path.relative_to(tree))
    assert prepare("check", "--root", str(tree), "--threads", "1") == 0
    assert prepare("check", "--root", str(copy), "--threads", "3") == 0
    assert written(tree) == written(copy)
    image = copy / "val/a/00.jpg"
    data = bytearray(image.read_bytes())
    data[15] += 1  # dots per inch: the pixels are the same
    replace(image, data)
    assert prepare("check", "--root", str(copy)) == 0
    ours, theirs = (json.loads(written(root)["manifest.json"]) for root in (tree, copy))
    assert [key for key in ours if ours[key] != theirs[key]] == ["manifest_csv_sha256"]


def test_manifest_elsewhere(prepare: Prepare, tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert prepare("check", "--root", str(tree), "--manifest", str(folder)) == 0
    assert written(folder).keys() == {"manifest.csv", "manifest.json"}
    assert written(tree) == {}


def test_killed_check_goes_on(prepare: Prepare, tree: Path, tmp_path: Path) -> None:
    assert prepare("check", "--root", str(tree), "--manifest", str(tmp_path / "want")) == 0
    want = written(tmp_path / "want")
    command = ["check", "--root", str(tree), "--threads", "1"]
    operation, recorded = 0, set()
    while killed_at(operation, tree, command):
        left = written(tree)
        recorded.add(left.get("check.jsonl", "").count("\n"))
        if "manifest.json" in left:
            assert left["manifest.json"] == want["manifest.json"]
        assert prepare(*command) == 0
        assert written(tree) == want
        for name in want:
            (tree / name).unlink()
        operation += 23 if operation < 69 else 1
    assert {0, 82} <= recorded
    assert operation > 82


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        "{}",
        '{"file": "x", "bytes": 1, "mtime_ns": 1, "sha256": "", "more": 1}',
        '{"file": "x", "bytes": "1", "mtime_ns": 1, "sha256": ""}',
        "[" * 100_000,
    ],
)
def test_a_record_that_something_else_wrote_is_written_anew(
    line: str, prepare: Prepare, tree: Path
) -> None:
    assert prepare("check", "--root", str(tree)) == 0
    want = written(tree)
    (tree / "check.jsonl").write_text(line + "\n")
    assert prepare("check", "--root", str(tree)) == 0
    assert written(tree) == want


def test_what_has_been_found_sound_is_not_read_again(
    prepare: Prepare, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, same, changed = (tree / f"train/a/{i:02d}.jpg" for i in (3, 5, 7))
    replace(broken, b"x" * broken.stat().st_size)
    assert prepare("check", "--root", str(tree)) == 1
    for path in (same, changed):
        replace(path, b"x" * path.stat().st_size)
    os.utime(changed)
    capsys.readouterr()
    assert prepare("check", "--root", str(tree)) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{broken}: not an image of a known format",
        f"{changed}: not an image of a known format",
        f"{tree}: 82 images, 2 broken",
    ]


def test_what_was_broken_is_read_again(
    prepare: Prepare, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tree / "train/a/03.jpg"
    sound = path.read_bytes()
    replace(path, b"x" * len(sound))
    assert prepare("check", "--root", str(tree)) == 1
    assert written(tree).keys() == {"check.jsonl"}
    replace(path, sound)
    assert prepare("check", "--root", str(tree)) == 0
    assert written(tree).keys() == {"manifest.csv", "manifest.json"}


def test_a_complete_check_is_forgotten(prepare: Prepare, tree: Path) -> None:
    assert prepare("check", "--root", str(tree)) == 0
    manifest = written(tree)
    path = tree / "val/a/00.jpg"
    replace(path, b"x" * path.stat().st_size)
    assert prepare("check", "--root", str(tree)) == 1
    assert manifest.items() <= written(tree).items()  # it still says what the file was


@pytest.mark.parametrize("size", [300, 2000])
def test_a_record_that_was_cut_short(
    prepare: Prepare, tree: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    command = ["check", "--root", str(tree), "--threads", "1"]
    assert killed_beyond(size, command)
    assert (tree / "check.jsonl").stat().st_size == size
    first, last = tree / "train/a/00.jpg", tree / "val/b, c/00.jpg"
    sound = last.read_bytes()
    for path in (first, last):  # only the first is in the record
        replace(path, b"x" * path.stat().st_size)
    assert prepare(*command) == 1
    assert capsys.readouterr().out.startswith(f"{last}: ")
    replace(last, sound)
    second = tree / "train/a/20.jpg"  # that check recorded it
    replace(second, b"x" * second.stat().st_size)
    assert prepare(*command) == 0
    assert written(tree).keys() == {"manifest.csv", "manifest.json"}


@pytest.mark.parametrize(
    ("damage", "defect"),
    [
        (lambda data: b"", "empty"),
        (lambda data: data[: len(data) // 2], "OSError: .*truncated.*"),
        (lambda data: b"<html>404</html>", "not an image of a known format"),
    ],
)
def test_defects(
    prepare: Prepare,
    tree: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
    defect: str,
) -> None:
    path = tree / "val/a/00.jpg"
    random = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(random).save(path)
    path.write_bytes(damage(path.read_bytes()))
    assert prepare("check", "--root", str(tree)) == 1
    line, total = capsys.readouterr().out.splitlines()
    assert re.fullmatch(f"{path}: {defect}", line)
    assert total == f"{tree}: 82 images, 1 broken"


def test_one_check_at_a_time(
    prepare: Prepare, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tree / "check.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert prepare("check", "--root", str(tree)) == 1
    assert capsys.readouterr().err == (
        f"error: {tree} is in use by another process: wait for it to finish, or stop it\n"
    )


def test_a_folder_that_cannot_be_written(
    prepare: Prepare, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tree / "file"
    file.touch()
    assert prepare("check", "--root", str(tree), "--manifest", str(file)) == 1
    assert capsys.readouterr().err == (
        f"error: cannot write to {file} (File exists): choose another folder with --manifest\n"
    )
