"""A subset is a choice of classes that a seed or a list repeats, and links to their images."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qsr.build import prepare as prepare_run
from qsr.config.load import load_config
from qsr.data import ImageFolder, Loader, Request, open_image_folders
from qsr.data.prepare.subset import choose_classes, read_classes
from qsr.errors import DataError
from tests.killing import killed_at
from tests.transforms import eval_transform

Prepare = Callable[..., int]

WNIDS = [f"n{number:08d}" for number in range(1000)]


@pytest.fixture
def own_root(photos: tuple[ImageFolder, ImageFolder], tmp_path: Path) -> Path:
    """A copy of 3 classes with 8 training and 4 validation images each."""
    return shutil.copytree(photos[0].root, tmp_path / "photos")


def draw(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}/subset/{name}/".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") // 2


def test_the_choice_is_of_the_smallest_draws() -> None:
    chosen = choose_classes(WNIDS, 100, seed=1)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 100
    most = max(draw(name, 1) for name in chosen)
    assert most < min(draw(name, 1) for name in WNIDS if name not in chosen)


def test_the_choice_by_value() -> None:
    assert choose_classes("abcdefghij", 3, seed=1) == ["c", "f", "j"]
    assert choose_classes("jihgfedcba", 3, seed=1) == ["c", "f", "j"]
    assert choose_classes("abcdefghij", 3, seed=2) == ["d", "f", "g"]


def test_a_smaller_choice_is_part_of_a_larger_one() -> None:
    ten, hundred = (set(choose_classes(WNIDS, count, seed=1)) for count in (10, 100))
    assert ten < hundred
    assert len(hundred & set(choose_classes(WNIDS, 100, seed=2))) < 30
    assert choose_classes(WNIDS, 1000, seed=1) == WNIDS


def test_drawn_subset(
    prepare: Prepare, own_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "deep" / "two"
    command = ["subset", "--root", str(own_root), "--to", str(to), "--classes", "2", "--seed", "5"]
    assert prepare(*command) == 0
    assert capsys.readouterr().out == f"{to}: 2 classes, 16 training, 8 validation images\n"
    chosen = choose_classes(["c0", "c1", "c2"], 2, seed=5)
    source, _ = open_image_folders(own_root)
    assert json.loads((to / "subset.json").read_text()) == {
        "root": str(own_root),
        "root_train_files": source.fingerprint,
        "seed": 5,
        "classes": chosen,
    }
    for split in open_image_folders(to):
        assert list(split.classes) == chosen
        for file, label in zip(split.files, split.labels, strict=True):
            assert file.split("/")[1] == chosen[label]
            assert (to / file).samefile(own_root / file)
    assert sorted(path.name for path in to.iterdir()) == ["subset.json", "train", "val"]


def test_listed_subset(prepare: Prepare, own_root: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("c2\n\n c0 \n")
    command = ["subset", "--root", str(own_root), "--to", str(tmp_path / "two")]
    assert prepare(*command, "--list", str(names)) == 0
    train, val = open_image_folders(tmp_path / "two")
    assert train.classes == val.classes == ("c0", "c2")
    assert json.loads((tmp_path / "two" / "subset.json").read_text())["seed"] is None


def test_a_run_accepts_it(prepare: Prepare, own_root: Path, tmp_path: Path) -> None:
    to = tmp_path / "two"
    assert prepare("subset", "--root", str(own_root), "--to", str(to), "--classes", "2") == 0
    config = load_config(
        ["data=folder", f"data.root={to}", f"runs_dir={tmp_path / 'runs'}", "model=timm",
         "model.timm_name=resnet18", "sync=parallel", "schedule.peak_lr=0.1", "epochs=1",
         "schedule.warmup_epochs=0", "global_batch=8", "workers=2"]
    )  # fmt: skip
    found = prepare_run(config)
    assert (found.data["train_images"], found.data["val_images"]) == (16, 8)
    assert len(found.train.classes) == 2


def test_images_come_through_the_links(
    kind: str, new_loader: Callable[..., Loader], prepare: Prepare, own_root: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("c1\nc2\n")
    to = tmp_path / "two"
    assert prepare("subset", "--root", str(own_root), "--to", str(to), "--list", str(names)) == 0

    def load(root: Path, indices: list[int]) -> tuple[torch.Tensor, list[int]]:
        _, val = open_image_folders(root)
        loader = new_loader(kind, val, eval_transform(32))
        batch = next(loader.batches([Request(indices, 0)]))
        return batch.images, batch.labels.tolist()

    theirs, their_labels = load(own_root, [4, 7, 8, 11])
    ours, labels = load(to, [0, 3, 4, 7])
    assert torch.equal(ours, theirs)
    assert their_labels == [1, 1, 2, 2]
    assert labels == [0, 0, 1, 1]


def test_a_subset_can_be_checked(prepare: Prepare, own_root: Path, tmp_path: Path) -> None:
    to = tmp_path / "two"
    assert prepare("subset", "--root", str(own_root), "--to", str(to), "--classes", "2") == 0
    assert prepare("check", "--root", str(to)) == 0
    assert json.loads((to / "manifest.json").read_text())["train_images"] == 16
    assert not (own_root / "manifest.json").exists()


def test_killed_at_every_file_operation(prepare: Prepare, own_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "subsets"
    command = ["subset", "--root", str(own_root), "--to", str(folder / "two"), "--classes", "2"]
    operation = 0
    while killed_at(operation, folder, command):
        if (folder / "two").exists():
            open_image_folders(folder / "two", expected_classes=2)
        assert prepare(*command) == 0
        open_image_folders(folder / "two", expected_classes=2)
        shutil.rmtree(folder)
        operation += 1
    assert operation > 8


def refused(
    prepare: Prepare, capsys: pytest.CaptureFixture[str], command: list[str], message: str
) -> None:
    assert prepare(*command) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{message}.*\n", error), error


def test_only_the_same_subset_may_stand_there(
    prepare: Prepare, own_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["subset", "--root", str(own_root), "--to", str(tmp_path / "two"), "--classes"]
    assert prepare(*command, "2") == 0
    made = (tmp_path / "two").stat().st_mtime_ns
    assert prepare(*command, "2") == 0
    assert (tmp_path / "two").stat().st_mtime_ns == made
    refused(prepare, capsys, [*command, "1"], "two contains something else: remove it, or choose")
    refused(prepare, capsys, [*command, "2", "--seed", "9"], "two contains something else")
    (own_root / "train/c0/new.jpg").write_bytes(b"")
    refused(prepare, capsys, [*command, "2"], "two contains something else")
    command[command.index(str(tmp_path / "two"))] = str(own_root)
    refused(prepare, capsys, [*command, "2"], "photos contains something else")


def test_bad_choices_are_refused(
    prepare: Prepare, own_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["subset", "--root", str(own_root), "--to", str(tmp_path / "two")]
    refused(prepare, capsys, [*command, "--classes", "4"], "cannot choose 4 of 3 classes")
    names = tmp_path / "names.txt"
    names.write_text("c0\nc9\n")
    refused(prepare, capsys, [*command, "--list", str(names)], "photos has no class c9: correct")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("text", "message"), [("", "lists no classes"), ("b\na\nb\n", "lists b twice: remove one of")]
)
def test_bad_lists_are_refused(tmp_path: Path, text: str, message: str) -> None:
    names = tmp_path / "names.txt"
    names.write_text(text)
    with pytest.raises(DataError, match=message):
        read_classes(names)
    with pytest.raises(DataError, match=r"cannot read .*nowhere"):
        read_classes(tmp_path / "nowhere")


def test_a_source_that_has_gone_is_named(prepare: Prepare, own_root: Path, tmp_path: Path) -> None:
    to = tmp_path / "two"
    assert prepare("subset", "--root", str(own_root), "--to", str(to), "--classes", "2") == 0
    own_root.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"cannot follow .*/two/train/c\d: No such file"):
        open_image_folders(to)
