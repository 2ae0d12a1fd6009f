"""F24: a tree of images means what its user expects. Hidden and service folders are not classes.
Every file is read as an image or counted in a note. Names may have any bytes, and two that look
alike are told apart. No label shifts, and no file vanishes silently."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qsr import build
from qsr.config.load import load_config
from qsr.data import (
    Loader,
    Request,
    open_image_folders,
    open_validation_folder,
)
from qsr.data.prepare.imagenet import _files
from qsr.errors import DataError
from qsr.train.model_file import read_description
from qsr.train.validate import _check_classes
from tests.cli import command, folder_in
from tests.image_formats import IMAGE
from tests.image_trees import GOOD, encoded, plant, write_tree
from tests.transforms import eval_transform

Prepare = Callable[..., int]

NFC, NFD = "caf\u00e9", "cafe\u0301"
LATIN = os.fsdecode(b"m\xfcller")
"""A name that is no UTF-8."""

SERVICE = (
    ".ipynb_checkpoints",
    ".thumbnails",
    "@eaDir",
    "__MACOSX",
    "lost+found",
    ".git",
    "#recycle",
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes, three training images, two validation images."""
    return plant(tmp_path / "data", *GOOD)


@pytest.mark.parametrize("name", SERVICE)
def test_what_programs_leave_behind_is_no_class(tree: Path, name: str) -> None:
    """Also where one split alone has it; inside a class too."""
    before = open_image_folders(tree)
    plant(tree, f"train/{name}/1.jpg", f"train/a/{name}/2.jpg", f"val/{name}/x/1.jpg")
    after = open_image_folders(tree)
    assert after == before
    train, val = (split.notes for split in after)
    names = ", ".join(sorted((name, f"a/{name}")))
    assert train == (f"skipped in {tree}/train, hidden, or created by other programs: 2 ({names})",)
    assert val == (f"skipped in {tree}/val, hidden, or created by other programs: 1 ({name})",)


@pytest.mark.parametrize("file", ["._1.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", ".x.png.Q1"])
def test_what_programs_leave_behind_is_no_image(tree: Path, file: str) -> None:
    before, _ = open_image_folders(tree)
    plant(tree, f"train/b/{file}")
    after, _ = open_image_folders(tree)
    assert after == before
    assert f"1 (b/{file})" in after.notes[0]


@pytest.mark.parametrize(
    ("name", "format_"),
    [
        ("x.jfif", "JPEG"),
        ("x.JPE", "JPEG"),
        ("x.gif", "GIF"),
        ("x.avif", "AVIF"),
        ("x.jp2", "JPEG2000"),
        ("x", "JPEG"),
        ("x.jpg.1", "PNG"),
        ("x.data", "TIFF"),
        ("X.BMP_", "BMP"),
    ],
)
def test_an_image_is_read_whatever_its_ending(
    tree: Path, kind: str, new_loader: Callable[..., Loader], name: str, format_: str
) -> None:
    data = encoded(IMAGE, format_)
    for file in (name, "same.jpg"):
        (tree / "train/b" / file).write_bytes(data)
    train, _ = open_image_folders(tree)
    assert train.notes == ()
    both = [train.files.index(f"train/b/{file}") for file in (name, "same.jpg")]
    loader = new_loader(kind, train, eval_transform(16))
    first, second = next(loader.batches([Request(both, 0)])).images
    assert (first == second).all()


def test_what_is_no_image_is_named_with_a_count(
    tree: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    before, _ = open_image_folders(tree)
    plant(tree, "train/a/notes.txt", "train/a/list.csv", "train/b/x.heic", "train/b/x.json")
    plant(tree, "train/README", "train/0.jpg")
    assert prepare("check", "--root", str(tree)) == 0
    assert open_image_folders(tree)[0] == before
    assert capsys.readouterr().err.splitlines() == [
        f"note: skipped in {tree}/train, not images of a supported format: 4 (a/list.csv, "
        "a/notes.txt, b/x.heic, ...)",
        f"note: skipped in {tree}/train, outside the class folders: 2 (0.jpg, README)",
    ]


def test_a_class_of_nothing_but_other_files_is_refused(tree: Path) -> None:
    (tree / "train/b/x.png").unlink()
    plant(tree, "train/b/x.txt", "train/b/y.txt", "train/b/.z.jpg")
    with pytest.raises(DataError, match=r"no images in class folder .*/b, but 2 other files: re"):
        open_image_folders(tree)


def test_a_file_whose_kind_cannot_be_seen_is_not_left_out(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image without an ending, on a disk that fails."""
    plant(tree, "train/b/noending")
    real = os.open

    def fail(path: str, *more: int) -> int:
        if str(path).endswith("noending"):
            raise OSError(5, "Input/output error")
        return real(path, *more)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(DataError, match=r"cannot read .*/b/noending: Input/output error"):
        open_image_folders(tree)


def rename(tree: Path, old: str, new: bytes) -> None:
    path = os.fsencode(tree / old)
    os.rename(path, os.path.dirname(path) + b"/" + new)  # noqa: PTH104, PTH120  (bytes)


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"two\nlines.png", b"\xff\xfe.jpg", b"a\tb.png"])
def test_a_file_may_have_any_name(
    tree: Path,
    kind: str,
    new_loader: Callable[..., Loader],
    prepare: Prepare,
    capfdbinary: pytest.CaptureFixture[bytes],
    name: bytes,
) -> None:
    rename(tree, "train/b/x.png", name)
    train, _ = open_image_folders(tree)
    assert [os.fsencode(file) for file in train.files][2] == b"train/b/" + name
    assert next(new_loader(kind, train, eval_transform(16)).batches([Request([2], 0)])).labels == 1
    if kind == "dali":
        return
    assert prepare("check", "--root", str(tree)) == 0
    table = (tree / "manifest.csv").read_bytes()
    text = table.decode("utf-8", "surrogateescape").splitlines(keepends=True)
    assert [os.fsencode(row[0]) for row in csv.reader(text)][3] == b"train/b/" + name
    assert json.loads((tree / "manifest.json").read_text())["train_files"] == train.fingerprint

    (tree / "train/b" / os.fsdecode(name)).write_bytes(b"")
    assert prepare("check", "--root", str(tree)) == 1
    line = capfdbinary.readouterr().out.decode("ascii").splitlines()[-2]
    assert line.startswith(f"{tree}/train/b/")
    assert line.endswith((".png: empty", ".jpg: empty"))
    with pytest.raises(DataError) as caught:
        next(new_loader(kind, train, eval_transform(16)).batches([Request([2], 0)]))
    assert str(caught.value).isprintable()
    str(caught.value).encode()


def test_a_name_that_is_no_utf8_is_shown_with_its_bytes() -> None:
    name = os.fsdecode(b"caf\xe9")
    shown = str(DataError(f"cannot read {name}\n\u00e9"))
    assert shown == "cannot read caf\\xe9\\n\u00e9"


def test_fingerprints_differ_where_names_do(tree: Path) -> None:
    found = {open_image_folders(tree)[0].fingerprint}
    for new, old in ((b"\xe9.png", "x.png"), (b"\xe8.png", os.fsdecode(b"\xe9.png"))):
        rename(tree, f"train/b/{old}", new)
        found.add(open_image_folders(tree)[0].fingerprint)
    assert len(found) == 3


def test_fingerprints_of_earlier_runs_hold(tree: Path, digits: Path) -> None:
    """They are in the data.json of run folders: another value would refuse their resumption."""
    (tree / "val" / "a").rename(tree / "val" / NFC)
    (tree / "train" / "a").rename(tree / "train" / NFC)
    assert [split.fingerprint for split in open_image_folders(digits)] == DIGITS_BEFORE
    assert [split.fingerprint for split in open_image_folders(tree)] == TREE_BEFORE


DIGITS_BEFORE = ["9faccf37c3f6cc72", "3c3deea2c4fa37c1"]
TREE_BEFORE = ["8b76a148292593e3", "c4f2389f0498b3ec"]


def test_a_class_may_have_any_name(tmp_path: Path, prepare: Prepare) -> None:
    """It is the same one in a run, its model file, an evaluation and a subset."""
    root = tmp_path / "data"
    write_tree(root, classes=2, train=8, val=2)
    for split in ("train", "val"):
        rename(root, f"{split}/c1", os.fsencode(LATIN))
    assert prepare("check", "--root", str(root)) == 0
    assert LATIN in json.loads((root / "manifest.json").read_text())["classes"]
    (tmp_path / "list").write_bytes(b"c0\nm\xfcller\n")
    subset = ("subset", "--root", str(root), "--to", str(tmp_path / "part"))
    assert prepare(*subset, "--list", str(tmp_path / "list")) == 0
    settings = (
        "data=folder",
        "model=small_resnet",
        "global_batch=8",
        "epochs=1",
        "schedule.warmup_epochs=null",
        "schedule.warmup_steps=0",
        "data.image_size=32",
        "cluster.ranks=1",
    )
    build.run(load_config(command(tmp_path / "part", tmp_path / "runs", *settings)[2:]))
    run = folder_in(tmp_path / "runs")
    assert read_description(run)[1].classes == ("c0", LATIN)


@pytest.mark.parametrize(("one", "other"), [(NFC, NFD), ("\u212b", "\u00c5")])
def test_one_class_in_two_unicode_forms_is_refused(tree: Path, one: str, other: str) -> None:
    plant(tree, *(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in (one, other)))
    with pytest.raises(DataError) as caught:
        open_image_folders(tree)
    message = str(caught.value)
    assert f"{tree}/train has the same class twice: " in message
    assert all(ascii(name) in message for name in (one, other))


@pytest.mark.parametrize("other", ["A", "a ", " a", "a\u00a0"])
def test_classes_that_look_alike_are_told_apart(tree: Path, other: str) -> None:
    """They may be meant: the letters A and a, for example."""
    plant(tree, f"train/{other}/1.jpg", f"val/{other}/1.jpg")
    train, val = open_image_folders(tree)
    assert len(train.classes) == 3
    first, second = sorted(("a", other))
    assert train.notes == (
        f"similar class names in {tree}/train: 1 ({first!a} and {second!a} differ only in case "
        "or whitespace)",
    )
    assert len(val.notes) == 1


@pytest.mark.parametrize(("one", "other"), [(NFC, NFD), ("b", "B"), ("b", "b ")])
def test_a_class_that_val_spells_otherwise_is_named(tree: Path, one: str, other: str) -> None:
    (tree / "train/b").rename(tree / f"train/{one}")
    (tree / "val/b").rename(tree / f"val/{other}")
    with pytest.raises(DataError, match="different classes") as caught:
        open_image_folders(tree)
    assert f"{one!a} and {other!a} differ only in " in str(caught.value)
    assert str(caught.value).endswith(": rename one")


def test_a_class_that_the_model_spells_otherwise_is_named(tree: Path) -> None:
    val = open_validation_folder(tree)
    for name in ("B", "b "):
        with pytest.raises(DataError) as caught:
            _check_classes("model.safetensors", ("a", name), val)
        assert str(caught.value).endswith(f"; {name!a} and 'b' differ only in case or whitespace")


def test_a_class_folder_may_be_a_link(tree: Path) -> None:
    (tree / "train/b").rename(tree / "elsewhere")
    (tree / "train/b").symlink_to(tree / "elsewhere")
    assert open_image_folders(tree)[0].files == GOOD[:3]


@pytest.mark.parametrize("to", ["a", "b"])
def test_a_link_makes_no_second_class_of_a_folder(tree: Path, to: str) -> None:
    """Its images would have two labels."""
    for split in ("train", "val"):
        (tree / split / "ab").symlink_to(tree / split / to)
    with pytest.raises(DataError, match="same folder: its images would have two labels; remove"):
        open_image_folders(tree)


def test_an_unpacked_imagenet_may_have_them_too(tmp_path: Path) -> None:
    """A second `prepare.py imagenet` counts what is there, and must not ask for a removal."""
    plant(tmp_path, "n1/1.JPEG", "n1/.DS_Store", ".ipynb_checkpoints/2.JPEG", "@eaDir/3.JPEG")
    assert _files(tmp_path) == {"n1": ["1.JPEG"]}


def test_listing_opens_no_file_with_a_known_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.28 million of them would take minutes on a file server."""
    for number in range(50):
        plant(tmp_path, f"train/a/{number}.jpg", f"val/a/{number}.JPEG")
    opened: list[str] = []
    real = os.open

    def count(path: str, *more: int) -> int:
        opened.append(path)
        return real(path, *more)

    monkeypatch.setattr(os, "open", count)
    open_image_folders(tmp_path)
    assert opened == []
