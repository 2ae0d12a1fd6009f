"""Archives, labels and folders that are not what they should be: one line, exit status 1."""

import fcntl
import io
import re
import resource
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qsr.data.prepare.ground_truth import read_labels
from qsr.errors import DataError
from tests.imagenet_archives import Archives, content, meta_mat, wanted

Prepare = Callable[..., int]


def refused(
    prepare: Prepare, capsys: pytest.CaptureFixture[str], command: list[str], message: str
) -> None:
    assert prepare(*command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert re.search(message, error), error


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def members(file: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(file) as archive:
        return archive.getmembers()


def cut_train(archives: Archives) -> None:
    cut(archives.train_tar, members(archives.train_tar)[1].offset_data + 2000)


def cut_train_between_classes(archives: Archives) -> None:
    cut(archives.train_tar, members(archives.train_tar)[2].offset)


def cut_val(archives: Archives) -> None:
    cut(archives.val_tar, members(archives.val_tar)[-1].offset_data + 100)


def cut_val_between_images(archives: Archives) -> None:
    cut(archives.val_tar, members(archives.val_tar)[4].offset)


def damage_inner_header(archives: Archives) -> None:
    """Of the third image of the second class: tarfile alone would take it for the end."""
    data = bytearray(archives.train_tar.read_bytes())
    start = members(archives.train_tar)[1].offset_data
    with tarfile.open(fileobj=io.BytesIO(data[start:])) as inner:
        at = start + inner.getmembers()[2].offset
    data[at : at + 100] = bytes(range(100))
    archives.train_tar.write_bytes(data)


def lose_class(archives: Archives) -> None:
    del archives.train["n01000000"]
    archives.write()


def lose_train_image(archives: Archives) -> None:
    archives.train["n01000000"].pop()
    archives.write()


def lose_val_image(archives: Archives) -> None:
    archives.val.pop(2)
    archives.write()


def repeat_train_image(archives: Archives) -> None:
    archives.train["n01000000"].append(archives.train["n01000000"][0])
    archives.write()


def other_class(archives: Archives) -> None:
    archives.train["n09000000"] = archives.train.pop("n01000000")
    archives.write()


def class_with_another_name(archives: Archives) -> None:
    archives.train["fish"] = archives.train.pop("n01000000")
    archives.write()


def lose_ground_truth_line(archives: Archives) -> None:
    archives.ground_truth.pop(1)
    archives.write()


def extra_ground_truth_line(archives: Archives) -> None:
    archives.ground_truth.append("1")
    archives.write()


def ground_truth(line: str) -> Callable[[Archives], None]:
    def damage(archives: Archives) -> None:
        archives.ground_truth[3] = line
        archives.write()

    return damage


def train_member(name: str) -> Callable[[Archives], None]:
    def damage(archives: Archives) -> None:
        archives.train["n01000000"][1] = (name, b"evil")
        archives.write()

    return damage


def val_member(name: str) -> Callable[[Archives], None]:
    def damage(archives: Archives) -> None:
        archives.val[1] = (name, b"evil")
        archives.write()

    return damage


def link_in_val(archives: Archives) -> None:
    with tarfile.open(archives.val_tar, "w") as archive:
        member = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)


def write(file: str, data: bytes) -> Callable[[Archives], object]:
    return lambda archives: (archives.folder / file).write_bytes(data)


def remove(file: str) -> Callable[[Archives], object]:
    return lambda archives: (archives.folder / file).unlink()


def cut_devkit(archives: Archives) -> None:
    cut(archives.devkit_tar, archives.devkit_tar.stat().st_size // 2)


def devkit_without_synsets(archives: Archives) -> None:
    archives.write_devkit({"data/ILSVRC2012_validation_ground_truth.txt": b"1\n"})


def devkit_with_broken_synsets(archives: Archives) -> None:
    truth = "data/ILSVRC2012_validation_ground_truth.txt"
    archives.write_devkit({truth: b"1\n", "data/meta.mat": meta_mat()[:300]})


TRAIN, VAL = "/ILSVRC2012_img_train.tar", "/ILSVRC2012_img_val.tar"
DEVKIT = "/ILSVRC2012_devkit_t12.tar.gz"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            cut_train,
            f"{TRAIN} is damaged or not .* file .unexpected end of data.: download it again",
        ),
        (cut_train_between_classes, f"{TRAIN} is damaged .*truncated or damaged after 2 members"),
        (cut_val, f"{VAL} is damaged .*unexpected end of data"),
        (cut_val_between_images, f"{VAL} is damaged .*truncated or damaged after 4 members"),
        (lose_class, f"{TRAIN} contains 2 classes, not 3"),
        (lose_val_image, f"{VAL} contains 5 images, not 6"),
        (other_class, "different classes, for example n01000000"),
        (class_with_another_name, f"{TRAIN} contains fish.tar, not one WNID.tar per class"),
        (lose_ground_truth_line, r"\(5 labels\) has no label for ILSVRC2012_val_00000006.JPEG"),
        (extra_ground_truth_line, f"{VAL} does not contain ILSVRC2012_val_00000007.JPEG, which"),
        (ground_truth(""), f"{DEVKIT}: line 4 of .*ground_truth.txt is '', not the ILSVRC2012_ID"),
        (ground_truth("9"), f"{DEVKIT}: line 4 of .*ground_truth.txt is '9', not the"),
        (ground_truth("4"), "different classes, for example n00000004"),
        (val_member("../x"), f"{VAL} is damaged .*member '../x' is not a plain file at the top"),
        (val_member("/tmp/x"), f"{VAL} .*member '/tmp/x' is not a plain file"),
        (val_member("x.JPEG"), f"has no label for x.JPEG, one of 6 images in .*{VAL}"),
        (link_in_val, f"{VAL} .*member 'ILSVRC2012_val_00000001.JPEG' is not a plain file"),
        (write(TRAIN[1:], b"sorry, no tar"), f"{TRAIN} is damaged or not the expected file"),
        (write(TRAIN[1:], b""), f"{TRAIN} is damaged or not the expected file .empty file"),
        (remove(TRAIN[1:]), f"cannot read .*{TRAIN}: No such file"),
        (remove(DEVKIT[1:]), f"no file .*{DEVKIT}"),
        (write(DEVKIT[1:], b"no archive"), f"{DEVKIT} is damaged or not the expected file"),
        (cut_devkit, f"{DEVKIT} is damaged or not the expected file: download it again"),
        (devkit_without_synsets, f"{DEVKIT} does not contain data/meta.mat"),
        (devkit_with_broken_synsets, f"{DEVKIT}: cannot read data/meta.mat"),
    ],
)
def test_bad_archives_are_refused_before_anything_is_written(
    prepare: Prepare,
    archives: Archives,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Archives], object],
    message: str,
) -> None:
    command = archives.command()
    damage(archives)
    before = content(archives.folder)
    refused(prepare, capsys, command, message)
    assert not archives.root.exists()
    assert content(archives.folder) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_inner_header, f"{TRAIN} .*n01000000.tar: truncated or damaged after 2 members"),
        (train_member("../x"), f"{TRAIN} .*n01000000.tar: member '../x' is not a plain file at"),
        (train_member("/tmp/x"), f"{TRAIN} .*n01000000.tar: member '/tmp/x' is not a plain file"),
        (train_member("sub/x"), f"{TRAIN} .*n01000000.tar: member 'sub/x' is not a plain file"),
        (train_member(".."), f"{TRAIN} .*n01000000.tar: member '..' is not a plain file"),
        (repeat_train_image, f"{TRAIN} .*n01000000.tar: member 'n01000000_7.JPEG' appears twice"),
        (lose_train_image, "/train has 11 images in 3 classes, not 12 in 3: check the training"),
    ],
)
def test_a_bad_class_stops_the_work(
    prepare: Prepare,
    archives: Archives,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Archives], object],
    message: str,
) -> None:
    """Only unpacking it shows what is wrong; the split never gets its name."""
    command = archives.command()
    damage(archives)
    for _ in range(2):
        refused(prepare, capsys, command, message)
        assert not (archives.root / "train").exists()
    assert not [path for path in archives.folder.rglob("*") if path.name == "x"]


def test_a_mended_archive_is_gone_on_with(
    prepare: Prepare, archives: Archives, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_inner_header(archives)
    refused(prepare, capsys, archives.command(), "truncated or damaged")
    archives.write()
    assert prepare(*archives.command()) == 0
    assert content(archives.root) == wanted(archives)


def test_a_split_that_is_there_is_checked(
    prepare: Prepare, archives: Archives, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(*archives.command()) == 0
    train, val = archives.root / "train", archives.root / "val"
    image = next((train / "n01000000").iterdir())
    image.rename(archives.folder / image.name)
    refused(prepare, capsys, archives.command(), f"{train} has 11 images in 3 classes")
    shutil.rmtree(train)
    (val / "n01000000/ILSVRC2012_val_00000001.JPEG").rename(
        val / "n02000000/ILSVRC2012_val_00000001.JPEG"
    )
    missing = f"{val}/n01000000/ILSVRC2012_val_00000001.JPEG is missing: remove {val}"
    refused(prepare, capsys, archives.command(), missing)
    shutil.rmtree(val / "n01000000")
    refused(prepare, capsys, archives.command(), missing)
    assert not train.exists()
    shutil.rmtree(val)
    assert prepare(*archives.command()) == 0
    assert content(archives.root) == wanted(archives)


def test_only_one_process_works_on_a_root(
    prepare: Prepare, archives: Archives, capsys: pytest.CaptureFixture[str]
) -> None:
    (archives.root / ".incomplete").mkdir(parents=True)
    with (archives.root / ".incomplete" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        message = f"{archives.root} is in use by another process: wait for it"
        refused(prepare, capsys, archives.command(), message)
    assert prepare(*archives.command()) == 0


def test_what_cannot_be_written_is_one_line(
    prepare: Prepare, archives: Archives, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))  # bytes that a file may have
    try:
        message = f"cannot unpack .*{TRAIN} into .*: File too large"
        refused(prepare, capsys, archives.command(), message)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert prepare(*archives.command()) == 0
    assert content(archives.root) == wanted(archives)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.JPEG n01000000\na.JPEG n02000000\n",
            "line 2 is 'a.JPEG n02000000': write FILE WNID, each",
        ),
        ("a.JPEG n01000000\n\n", "line 2 is ''"),
        ("a.JPEG 17\n", "line 1 is 'a.JPEG 17'"),
    ],
)
def test_bad_label_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "labels.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_labels(file)
    with pytest.raises(DataError, match=r"cannot read .*nowhere"):
        read_labels(tmp_path / "nowhere")
