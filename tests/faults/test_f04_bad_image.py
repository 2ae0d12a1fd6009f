"""F4: an image is broken. The check before the run finds it. In a run all ranks stop and the error
gives its path and index; once the file is repaired, the run resumes as if nothing had happened.
Unusual but valid images are accepted, and no other sample is affected."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from qsr import build
from qsr.config.load import load_config
from qsr.config.planning import make_sampler
from qsr.data import (
    EvalTransform,
    ImageFolder,
    Loader,
    Request,
    TrainTransform,
    open_image_folders,
)
from qsr.errors import DataError
from tests.cli import call, command, folder_in, same_weights
from tests.faults.small import steps_in
from tests.image_trees import textured_image
from tests.transforms import eval_transform, train_transform

Load = Callable[..., Loader]

EVAL = eval_transform(32)
TRAIN = train_transform(32, min_area=1.0)  # crops of the whole image touch every byte
BAD = 4


def truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


def cut_png(path: Path, missing: int) -> None:
    """A PNG named .jpg, without its last bytes."""
    textured_image(60, 40, 1).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:-missing])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"\xff"),
    "header": lambda path: truncate(path, 0.02),
    "half": lambda path: truncate(path, 0.5),
    "nine tenths": lambda path: truncate(path, 0.9),
    "last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half a png": lambda path: cut_png(path, 2000),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "text": lambda path: path.write_text("not found"),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "deleted": Path.unlink,
}

CHECKED = {name: damage for name, damage in DAMAGE.items() if name != "deleted"}
CHECKED["png without its end"] = lambda path: cut_png(path, 1)


@pytest.fixture(params=DAMAGE)
def damaged(request: pytest.FixtureRequest, own_photos: Path) -> ImageFolder:
    """A data set whose file BAD broke after it was listed."""
    train, _ = open_image_folders(own_photos)
    DAMAGE[request.param](Path(train.path(BAD)))
    return train


@pytest.mark.timeout(60)
@pytest.mark.parametrize("transform", [TRAIN, EVAL], ids=["train", "eval"])
def test_bad_file_is_named(
    kind: str, new_loader: Load, damaged: ImageFolder, transform: TrainTransform | EvalTransform
) -> None:
    loader = new_loader(kind, damaged, transform)
    good, bad = Request([0, 1, 2], 0), Request([5, BAD, 7], 1)
    batches = loader.batches([good, good, bad, good])
    delivered = [next(batches), next(batches)]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert damaged.path(BAD) in str(caught.value)
    assert f"index {BAD} of train" in str(caught.value)
    assert damaged.path(5) not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [batch.labels.tolist() for batch in delivered] == [[0, 0, 0]] * 2


def test_work_goes_on_in_a_new_loader(kind: str, new_loader: Load, own_photos: Path) -> None:
    train, _ = open_image_folders(own_photos)
    before = next(new_loader(kind, train, EVAL).batches([Request([0, 1], 0)]))
    Path(train.path(BAD)).write_bytes(b"")
    loader = new_loader(kind, train, EVAL)
    with pytest.raises(DataError):
        next(loader.batches([Request([BAD], 0)]))
    loader.close()
    after = next(new_loader(kind, train, EVAL).batches([Request([0, 1], 0)]))
    assert torch.equal(before.images, after.images)


def test_every_bad_file_is_counted(kind: str, new_loader: Load, own_photos: Path) -> None:
    train, _ = open_image_folders(own_photos)
    for index in (1, 3, 4, 5, 8):
        Path(train.path(index)).write_bytes(b"")
    with pytest.raises(DataError, match=", 2 more") as caught:
        next(new_loader(kind, train, EVAL).batches([Request(range(12), 0)]))
    for index in (1, 3, 4):
        assert train.path(index) in str(caught.value)


def test_bad_file_of_an_abandoned_stream_is_nobodys_error(
    kind: str, new_loader: Load, own_photos: Path
) -> None:
    train, _ = open_image_folders(own_photos)
    Path(train.path(BAD)).write_bytes(b"")
    loader = new_loader(kind, train, EVAL)
    abandoned = loader.batches([Request([0], 0), Request([BAD], 0), Request([1], 0)])
    next(abandoned)
    batch = next(loader.batches([Request([7], 0)]))
    assert batch.labels.tolist() == [train.labels[7]]


@pytest.mark.parametrize("damage", CHECKED)
def test_the_check_before_the_run_finds_it(
    prepare: Callable[..., int],
    own_photos: Path,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also a PNG that lacks its last byte, which is nothing to Pillow, but DALI refuses it."""
    train, _ = open_image_folders(own_photos)
    CHECKED[damage](Path(train.path(BAD)))
    assert prepare("check", "--root", str(own_photos)) == 1
    line, total = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{train.path(BAD)}: ")
    assert total == f"{own_photos}: 16 images, 1 broken"


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    textured_image(90, 60, 1).save(path, exif=exif)


ODD: dict[str, Callable[[Path], object]] = {
    "png named jpg": lambda path: textured_image(60, 40, 1).save(path, format="PNG"),
    "cmyk": lambda path: textured_image(60, 40, 1).convert("CMYK").save(path),
    "grey": lambda path: textured_image(60, 40, 1).convert("L").save(path),
    "exif rotated": rotated,
    "one pixel": lambda path: textured_image(1, 1, 1).save(path),
}


def test_odd_images_are_no_fault_and_touch_no_other(
    kind: str, new_loader: Load, prepare: Callable[..., int], own_photos: Path
) -> None:
    train, _ = open_image_folders(own_photos)
    whole = Request(range(12), 7)
    before = next(new_loader(kind, train, TRAIN).batches([whole]))
    odd = [1, 3, 4, 8, 10]
    for index, change in zip(odd, ODD.values(), strict=True):
        change(Path(train.path(index)))
    assert prepare("check", "--root", str(own_photos)) == 0
    after = next(new_loader(kind, train, TRAIN).batches([whole]))
    assert after.labels.tolist() == before.labels.tolist() == [0] * 6 + [1] * 6
    same = [bool((after.images[i] == before.images[i]).all()) for i in range(12)]
    assert [i for i in range(12) if not same[i]] == odd
    # as Pillow decodes them: in colour, and as they are stored
    evaluated = next(new_loader(kind, train, eval_transform(8, crop_fraction=1.0)).batches([whole]))
    assert evaluated.images.isfinite().all()
    grey, one = evaluated.images[odd[2]], evaluated.images[odd[4]]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (EVAL.mean, EVAL.std))
    levels = 255 * (grey * std + mean)
    assert (levels - levels[:1]).abs().max() < 1.0
    assert (one - one[:, :1, :1]).abs().max() < 1e-5


def copy_of(data: Path, to: Path) -> Path:
    """Of its own files, where the data set has links."""
    shutil.copytree(data, to)
    return to


def first_read_at(step: int, worker: int, runs: list[str]) -> int:
    """Index of a training image that a run reads at this 0-based step, and not before."""
    config = load_config(runs)
    assert config.data.train_images is not None
    return make_sampler(config, config.data.train_images).indices(step, worker)[3]


@pytest.mark.slow
def test_all_ranks_stop_with_its_name_and_go_on_once_it_is_mended(
    digits: Path, tmp_path: Path, uninterrupted: Path, prepare: Callable[..., int]
) -> None:
    data = copy_of(digits, tmp_path / "digits")
    arguments = command(data, tmp_path / "runs", "checkpoint.every_steps=10")
    index = first_read_at(15, 1, arguments[2:])
    victim = Path(open_image_folders(data)[0].path(index))
    sound = victim.read_bytes()
    victim.write_bytes(sound[: len(sound) // 2])

    failed = call(arguments)
    assert failed.returncode == 1
    assert failed.stderr.count("Traceback") == 0
    line = failed.stderr.splitlines()[-1]
    assert line.startswith(f"failed: rank 1: DataError: cannot read {victim} (index {index} of tr")
    assert line.endswith("(`qsr prepare check` finds all of them)")
    assert steps_in(folder_in(tmp_path / "runs") / "checkpoints") == [10]
    assert prepare("check", "--root", str(data)) == 1

    victim.write_bytes(sound)
    done = call(arguments)
    assert done.returncode == 0, done.stderr
    assert same_weights(folder_in(tmp_path / "runs"), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_run_of_torchvisions_loader_does_the_same(
    split: str, digits: Path, tmp_path: Path
) -> None:
    def settings(runs: str) -> list[str]:
        one = ("cluster.ranks=1", "cluster.threads_per_rank=1", "data.loader=torchvision")
        return command(data, tmp_path / runs, "checkpoint.every_steps=10", *one)[2:]

    data = copy_of(digits, tmp_path / "digits")
    build.run(load_config(settings("whole")))
    splits = dict(zip(("train", "val"), open_image_folders(data), strict=True))
    index = first_read_at(15, 1, settings("runs")) if split == "train" else 100
    victim = Path(splits[split].path(index))
    sound = victim.read_bytes()
    victim.write_bytes(b"")
    with pytest.raises(DataError) as failed:
        build.run(load_config(settings("runs")))
    assert f"cannot read {victim} (index {index} of {split}: " in str(failed.value)
    # the first evaluation is after step 22
    saved = [10] if split == "train" else [10, 20]
    assert steps_in(folder_in(tmp_path / "runs") / "checkpoints") == saved
    victim.write_bytes(sound)
    build.run(load_config(settings("runs")))
    assert same_weights(folder_in(tmp_path / "runs"), folder_in(tmp_path / "whole"))
