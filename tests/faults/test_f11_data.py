"""F11: a data set is absent or incomplete. It is refused at the start, before a rank waits for
another, in one line with the folder. Labels never shift silently."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from qsr import build
from qsr.config.load import load_config
from qsr.config.schema import Config
from qsr.data import open_image_folders
from qsr.data.prepare.check import check_images
from qsr.errors import ClusterError, ConfigError, DataError
from qsr.run.environment import write_records
from qsr.run.identity import make_run_folder
from qsr.sync.topology import Topology
from tests.cli import RUN, command, refusal
from tests.faults.inject import give_up_privileges_here
from tests.image_trees import GOOD, plant
from tests.support import free_port, run_ranks


def config(root: Path, runs: Path) -> Config:
    data = ("data=folder", "data.loader=torchvision", f"data.root={root}", f"runs_dir={runs}")
    return load_config([*RUN, *data, "global_batch=2", "cluster.timeout_seconds=2"])


@pytest.fixture
def lonely_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is one of two ranks, and the other one never comes."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in (place | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)


def remove(*files: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        for file in files:
            (root / file).unlink()

    return damage


def missing_root(root: Path) -> None:
    root.rename(root.parent / "elsewhere")


def empty_root(root: Path) -> None:
    for split in ("train", "val"):
        (root / split).rename(root.parent / split)


def missing_val(root: Path) -> None:
    (root / "val").rename(root / "validation")


def no_classes(root: Path) -> None:
    for folder in ("a", "b"):
        (root / "train" / folder).rename(root / folder)


def nested_folder(root: Path) -> None:
    (root / "train/b/more").mkdir()


def empty_class_in_both(root: Path) -> None:
    """It comes first: the labels of all others would be one more, or one less."""
    for split in ("train", "val"):
        (root / split / "0").mkdir()


def class_missing_in_val(root: Path) -> None:
    (root / "val/b/1.webp").rename(root / "1.webp")
    (root / "val/b").rmdir()


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


@pytest.mark.usefixtures("lonely_rank")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_root, "no folder .*/data: set data.root=PATH to a folder with train/CLASS/"),
        (empty_root, "no folder .*/data/train: "),
        (missing_val, "no folder .*/val: "),
        (no_classes, "no class folders in .*/train"),
        (remove("train/b/x.png"), "no images in class folder .*/train/b"),
        (remove("val/a/1.jpg"), "no images in class folder .*/val/a"),
        (empty_class_in_both, "no images in class folder .*/train/0: restore them or remove"),
        (nested_folder, "/train/b/more is a folder inside a class"),
        (extra_class_in_val, r"different classes \(2 and 3\).* train/None and val/c"),
        (class_missing_in_val, r"different classes \(2 and 1\).* train/b and val/None"),
        (renamed_class_in_val, "train/a and val/aa"),
        (link_to_itself, "cannot follow .*/train/c"),
        (class_link_to_nothing, "cannot follow .*/train/c: No such file"),
        (image_link_to_nothing, "cannot follow .*/train/a/3.jpg: No such file"),
        (link_to_root, "/train/c/.* is a folder inside a class"),
    ],
)
def test_a_damaged_tree_is_refused_before_a_rank_waits_for_another(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    root = plant(tmp_path / "data", *GOOD)
    damage(root)
    with pytest.raises(DataError) as refused:
        build.run(config(root, tmp_path / "runs"))
    assert re.search(message, str(refused.value))
    assert "\n" not in str(refused.value)
    assert not dist.is_initialized()
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("lonely_rank")
def test_the_rank_would_have_waited(tmp_path: Path) -> None:
    """What the test before relies on."""
    with pytest.raises((dist.DistError, ClusterError)):
        build.run(config(plant(tmp_path / "data", *GOOD), tmp_path / "runs"))


def without_privileges(rank: int, ranks: int, root: Path) -> list[str]:
    """What is found in a tree where some may not be read, by a user who is not root."""
    give_up_privileges_here()
    found = []
    (root / "train/b").chmod(0)
    try:
        open_image_folders(root)
    except DataError as error:
        found.append(str(error))
    (root / "train/b").chmod(0o700)
    (root / "train/b/x.png").chmod(0)
    found += [
        line
        for line in check_images(open_image_folders(root), root.parent / "manifest", threads=1)
        if "train/b" in line
    ]
    return found


def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    """A folder at the start; a file by the check that reads every one."""
    root = plant(tmp_path / "data", *GOOD)
    assert run_ranks(without_privileges, 1, root) == [
        [
            f"cannot list {root}/train/b: Permission denied",
            f"{root}/train/b/x.png: cannot be read: Permission denied",
        ]
    ]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["data.root=/nowhere"], "refused: no folder /nowhere: set data.root=PATH to a folder with "
         "train/CLASS/* and val/CLASS/*, or make it: python scripts/prepare.py digits --root "
         "/nowhere"),
        (["data.train_images=1000"], "refused: DIGITS has 1,442 images, not 1,000: complete"),
    ],
)  # fmt: skip
def test_the_command_refuses_it_in_one_line(
    digits: Path, tmp_path: Path, extra: list[str], message: str
) -> None:
    line = refusal(command(digits, tmp_path, *extra))
    assert line.replace(str(digits / "train"), "DIGITS").startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_image_shifts_no_label(tmp_path: Path) -> None:
    root = plant(tmp_path, *reversed(GOOD))
    clean, _ = open_image_folders(root)
    plant(root, "train/README", "train/0.jpg", "train/a/0.txt", "train/b/Thumbs.db", "val/.git")
    dirty, _ = open_image_folders(root)
    assert dirty == clean
    assert dict(zip(clean.files, clean.labels, strict=True)) == {
        "train/a/1.jpg": 0,
        "train/a/2.JPEG": 0,
        "train/b/x.png": 1,
    }


def test_classes_that_were_renamed_between_two_sessions_are_refused(tmp_path: Path) -> None:
    """Their order, and so all labels, would be others: a is 0, then 1."""
    root = plant(tmp_path / "data", *GOOD)
    ours = config(root, tmp_path / "runs")
    first = build.prepare(ours)
    make_run_folder(first.folder)
    write_records(first.folder, ours, first.data, Topology(0, 1, 0, 2), "cpu")
    for split in ("train", "val"):
        (root / split / "a").rename(root / split / "c")
    told = r"holds a run with other data \(train_files: \w+ -> \w+; "
    with pytest.raises(ConfigError, match=told):
        build.prepare(ours)
