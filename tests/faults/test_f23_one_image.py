"""F23: every image file shows the same picture to the check and to both loaders, whatever its
format, or all of them refuse it and give its path. No file starts another program, and none makes
the run wait."""

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from qsr import build
from qsr.config.load import load_config
from qsr.data import (
    EvalTransform,
    ImageFolder,
    Loader,
    Request,
    open_image_folders,
    try_some,
)
from qsr.data.decoding import MAX_BYTES, UndecodableError, decode, open_plain
from qsr.data.prepare.check import check_images
from qsr.data.torchvision import validation_input
from qsr.errors import DataError
from tests.cli import RUN, command, refusal
from tests.image_formats import GREY_IMAGE, IMAGE, KINDS, SIDE, Kind
from tests.image_trees import GOOD, encoded, plant, textured_image
from tests.transforms import train_transform

NewLoader = Callable[..., Loader]

ROOT = Path(__file__).parents[2]
BEGIN = "<!-- formats: written by pytest tests/faults/test_f23_one_image.py --record-golden -->\n"
END = "<!-- end of formats -->\n"

NAMES = [f"{kind.format} {kind.variant}" for kind in KINDS]

AS_STORED = EvalTransform(SIDE, crop_fraction=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""Neither resizes nor cuts."""


class Tried(NamedTuple):
    """How one kind of file went."""

    kind: Kind
    check: str | None
    """What it says of the file, if anything."""
    shown: dict[str, "np.ndarray[Any, Any] | str"]
    """By loader: grey levels [SIDE, SIDE, 3], or the message."""


def folder_of(files: list[Path], root: Path) -> ImageFolder:
    names = tuple(str(file.relative_to(root)) for file in files)
    return ImageFolder(root, "train", ("a",), names, (0,) * len(names))


def levels(batch: torch.Tensor) -> "np.ndarray[Any, Any]":
    return (255 * batch).round().permute(0, 2, 3, 1).numpy().astype(int)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory, new_loader: NewLoader) -> list[Tried]:
    """Every kind of file, all under a name that ends in .jpg."""
    pytest.importorskip("nvidia.dali")
    root = tmp_path_factory.mktemp("kinds")
    plant(root, "val/a/1.jpg", *(f"train/a/{number:03d}.jpg" for number in range(len(KINDS))))
    files = sorted((root / "train/a").iterdir())
    for kind, path in zip(KINDS, files, strict=True):
        path.write_bytes(kind.data)
    said = checked(root)
    sound = [index for index, kind in enumerate(KINDS) if kind.pixels is not None]
    shown: list[dict[str, Any]] = [{} for _ in KINDS]
    for name in ("dali", "torchvision"):
        folder = folder_of(files, root)
        loader = new_loader(name, folder, AS_STORED, batch_size=len(KINDS))
        try:
            for index, pixels in zip(
                sound, levels(next(loader.batches([Request(sound, 0)])).images), strict=True
            ):
                shown[index][name] = pixels
        except DataError as error:
            pytest.fail(f"{name}: {error}")
        for index in set(range(len(KINDS))) - set(sound):
            one = new_loader(name, folder_of([files[index]], root), AS_STORED, batch_size=1)
            try:
                shown[index][name] = levels(next(one.batches([Request([0], 0)])).images)[0]
            except DataError as error:
                shown[index][name] = str(error)
    return [
        Tried(kind, said.get(str(path)), shown[index])
        for index, (kind, path) in enumerate(zip(KINDS, files, strict=True))
    ]


def checked(root: Path) -> dict[str, str]:
    """What the check says of each file that it refuses."""
    lines = check_images(open_image_folders(root), root.parent / f"{root.name}-manifest", 2)
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("number", range(len(KINDS)), ids=NAMES)
def test_all_readers_see_what_was_put_in_or_refuse_it(tried: list[Tried], number: int) -> None:
    kind, check, shown = tried[number]
    if kind.pixels is None:
        assert check is not None
        # the same reason everywhere, with the name
        for message in shown.values():
            assert isinstance(message, str)
            assert f"train/a/{number:03d}.jpg (index 0 of train: {check})" in message
        return
    assert check is None
    for pixels in shown.values():
        assert not isinstance(pixels, str)
        assert np.abs(pixels - kind.pixels).max() <= kind.tolerance
    assert np.array_equal(shown["dali"], shown["torchvision"])


def test_the_table_in_the_docs_is_what_happened(
    tried: list[Tried], request: pytest.FixtureRequest
) -> None:
    path = ROOT / "docs" / "data.md"
    head, begin, rest = path.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert begin
    assert end
    text = head + begin + table(tried) + end + tail
    if request.config.getoption("--record-golden"):
        path.write_text(text)
    assert path.read_text() == text


def table(tried: list[Tried]) -> str:
    """A row for each outcome of a format."""
    rows: dict[tuple[str, ...], dict[str, None]] = {}
    for kind, check, shown in tried:
        seen = ["refused" if isinstance(found, str) else "read" for found in shown.values()]
        outcome = ("sound" if check is None else "refused", *seen, kind.taken if not check else "")
        variant = kind.variant.rstrip(" 2345678")  # all orientations as one
        rows.setdefault((kind.format, *outcome), {})[variant] = None
    lines = [
        "| format | kinds of files | check | DALI | torchvision | what is taken |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {format_} | {', '.join(variants)} | {' | '.join(outcome)} |"
            for (format_, *outcome), variants in rows.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def test_training_crops_of_odd_files_agree(tmp_path: Path, new_loader: NewLoader) -> None:
    """Their sizes come from headers: a TIFF that is to be turned, CMYK, 16 bits, one animated."""
    pytest.importorskip("nvidia.dali")
    photo, more = textured_image(90, 60, 1), textured_image(90, 60, 2)
    wide = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    contents = [
        encoded(photo, "TIFF", tiffinfo={274: 6}),
        encoded(photo.convert("CMYK"), "JPEG", quality=95),
        encoded(wide, "PNG"),
        encoded(photo, "WEBP", lossless=True, save_all=True, append_images=[more]),
        encoded(photo, "JPEG", quality=95),
    ]
    files = [tmp_path / f"{number}.jpg" for number in range(len(contents))]
    for path, data in zip(files, contents, strict=True):
        path.write_bytes(data)
    folder, transform = folder_of(files, tmp_path), train_transform(32)
    request = Request(range(len(files)), 5)
    ours, theirs = (
        next(new_loader(name, folder, transform).batches([request])).images * 0.225 * 255
        for name in ("dali", "torchvision")
    )
    difference = (ours - theirs).abs()[..., 2:-2, 2:-2]
    assert difference.max() <= 2.1


def test_a_file_that_is_too_large_is_refused_by_all(
    tmp_path: Path, kind: str, new_loader: NewLoader
) -> None:
    """Pillow's limit on pixels holds for DALI too."""
    photo = tmp_path / "huge.jpg"
    Image.new("L", (14_000, 14_000)).save(photo, "JPEG")
    folder = folder_of([photo], tmp_path)
    with pytest.raises(DataError, match=r"huge\.jpg \(index 0 of train: DecompressionBomb"):
        next(new_loader(kind, folder, AS_STORED, batch_size=1).batches([Request([0], 0)]))
    with pytest.raises(DataError, match=r"huge\.jpg \(index 0 of train: DecompressionBomb"):
        try_some(folder)


def test_an_image_file_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has Ghostscript carry out what an EPS says."""
    told = tmp_path / "gs_ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {told}\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (eps,) = (one.data for one in KINDS if one.format == "EPS")
    with pytest.raises(UndecodableError, match="not an image of a known format"):
        decode(eps)
    assert not told.exists()
    path = tmp_path / "image.eps"
    path.write_bytes(eps)
    with pytest.raises(subprocess.CalledProcessError), Image.open(path) as image:
        image.load()
    assert told.exists()  # what the test relies on


def fifo(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def socket_file(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [fifo, sparse, socket_file, device])
def test_what_is_no_plain_file_is_refused_by_name(
    tmp_path: Path,
    make: Callable[[Path], None],
    prepare: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = plant(tmp_path / "data", *GOOD)
    make(root / "train/a/zz.jpg")
    assert prepare("check", "--root", str(root)) == 1
    said = "".join(capsys.readouterr())
    assert f"{root}/train/a/zz.jpg" in said
    assert ("larger than any supported image" if make is sparse else "not a file or folder") in said
    assert said.count("\n") <= 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [fifo, sparse])
def test_what_became_no_plain_file_after_the_listing_is_not_waited_for(
    tmp_path: Path, make: Callable[[Path], None], new_loader: NewLoader
) -> None:
    train, _ = open_image_folders(plant(tmp_path, *GOOD))
    Path(train.path(1)).unlink()
    make(Path(train.path(1)))
    with pytest.raises(DataError, match=r"2\.JPEG \(index 1 of train: "):
        next(new_loader("torchvision", train, AS_STORED).batches([Request([0, 1], 0)]))


def test_a_sparse_file_stops_dali_by_name(tmp_path: Path, new_loader: NewLoader) -> None:
    pytest.importorskip("nvidia.dali")
    train, _ = open_image_folders(plant(tmp_path, *GOOD))
    sparse(Path(train.path(1)))
    with pytest.raises(DataError, match=r"2\.JPEG \(index 1 of train: 1,099,511,627,776 bytes, l"):
        next(new_loader("dali", train, AS_STORED).batches([Request([0, 1], 0)]))


def test_the_largest_file_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, MAX_BYTES)
    open_plain(path).close()
    os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(UndecodableError):
        open_plain(path)


def unusable(name: str) -> bytes:
    return KINDS[NAMES.index(name)].data


@pytest.mark.parametrize("name", ["TIFF floating point", "ICO any", "TIFF 12 bits"])
def test_a_run_on_such_files_does_not_start(tmp_path: Path, name: str) -> None:
    """Before a run folder is made."""
    root = plant(tmp_path / "data", *GOOD)
    (root / "train/b/x.png").write_bytes(unusable(name))
    settings = [*RUN, "data=folder", f"data.root={root}", f"runs_dir={tmp_path / 'runs'}"]
    with pytest.raises(DataError, match=r"train/b/x\.png \(index 2 of train: .*qsr prepare check"):
        build.prepare(load_config([*settings, "global_batch=2"]))
    assert not (tmp_path / "runs").exists()


def test_the_command_refuses_them_in_one_line(digits: Path, tmp_path: Path) -> None:
    root = plant(tmp_path / "data", *GOOD)
    (root / "val/a/1.jpg").write_bytes(unusable("TIFF floating point"))
    extra = ("data=folder", "global_batch=2", f"data.root={root}")
    line = refusal(command(digits, tmp_path / "runs", *extra))
    assert line.startswith(f"refused: cannot read {root}/val/a/1.jpg (index 0 of val: signed or fl")
    assert not (tmp_path / "runs").exists()


def test_a_model_file_sees_what_validation_saw() -> None:
    """`load_model(...).transform` takes images that its user opened."""
    wide = Image.fromarray(np.asarray(GREY_IMAGE).astype(np.uint16) * 256 + 7)
    expected = validation_input(GREY_IMAGE, AS_STORED)
    assert torch.equal(validation_input(wide, AS_STORED), expected)
    swapped = Image.frombytes("I;16B", wide.size, np.asarray(wide).astype(">u2").tobytes())
    assert torch.equal(validation_input(swapped, AS_STORED), expected)
    for mode in ("F", "I"):
        with pytest.raises(ValueError, match=f"mode {mode}: convert it"):
            validation_input(IMAGE.convert(mode), AS_STORED)
