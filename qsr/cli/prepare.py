"""Create and check data sets; see docs/data.md.

qsr prepare digits                        write the small digits data set
qsr prepare few_digits                    write two with few training images
qsr prepare glyphs                        write letters and digits of many fonts (Debian)
qsr prepare imagenet --root PATH ...      unpack ImageNet's archives
qsr prepare check --root PATH             decode every image, write a manifest
qsr prepare check --root PATH --imagenet    also expect ImageNet's counts
qsr prepare subset --root PATH --to PATH2 --classes 100    link some classes

If a command is killed, run it again to resume; if everything is done, it changes nothing. Exit
status: 0 done, 1 refused or a broken file found, 130 interrupted.
"""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from qsr.data import open_image_folders
from qsr.data.datasets import IMAGENET, Counts
from qsr.data.prepare.check import check_images
from qsr.data.prepare.digits import DIGITS, FEW_DIGITS, HeldOut, prepare_digits, prepare_few_digits
from qsr.data.prepare.fonts import installed_fonts
from qsr.data.prepare.glyphs import prepare_glyphs
from qsr.data.prepare.ground_truth import read_devkit, read_labels
from qsr.data.prepare.imagenet import prepare_imagenet
from qsr.data.prepare.subset import choose_classes, link_subset, read_classes
from qsr.errors import DataError
from qsr.output import in_words_of_caller, printable, program, warn

FEW_DIGITS_FOLDERS: dict[HeldOut, str] = {"test": "few_digits", "tuning": "few_digits_tuning"}
CORES = len(os.sched_getaffinity(0))


def main(words: list[str], data: Path = Path("data")) -> int:
    """Run one command; the exit status is 1 if a data set is refused or has a broken file. `data`:
    the folder for the digits, unless the command names another."""
    arguments = parser(data).parse_args(words)
    try:
        status: int = arguments.run(arguments)
    except DataError as error:
        warn(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        warn("interrupted; run the same command to resume")
        return 130
    return status


def parser(data: Path) -> argparse.ArgumentParser:
    """The options of all commands."""
    whole = argparse.ArgumentParser(
        description=in_words_of_caller(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True)

    digits = commands.add_parser("digits", help="write the small digits data set")
    digits.add_argument("--root", type=Path, default=data / "digits")
    digits.set_defaults(run=_digits)

    few = commands.add_parser(
        "few_digits", help="write two digits data sets with few training images: test and tuning"
    )
    few.add_argument("--to", type=Path, default=data, help="the folder for both data sets")
    few.set_defaults(run=_few_digits)

    glyphs = commands.add_parser(
        "glyphs", help="write letters and digits of the fonts in Debian's packages"
    )
    glyphs.add_argument("--root", type=Path, default=data / "glyphs")
    glyphs.set_defaults(run=_glyphs)

    imagenet = commands.add_parser("imagenet", help="unpack ImageNet's archives")
    imagenet.add_argument("--root", type=Path, required=True, help="where train/ and val/ go")
    imagenet.add_argument("--train-tar", type=Path, required=True)
    imagenet.add_argument("--val-tar", type=Path, required=True)
    labels = imagenet.add_mutually_exclusive_group(required=True)
    labels.add_argument("--devkit-tar", type=Path, help="with the labels of the val images")
    labels.add_argument("--val-labels", type=Path, help="or: a text file with lines FILE WNID")
    imagenet.add_argument(
        "--counts",
        type=int,
        nargs=3,
        default=IMAGENET,
        metavar=("CLASSES", "TRAIN", "VAL"),
        help="expected counts, for other archives of the same form (default: ImageNet's)",
    )
    imagenet.add_argument("--threads", type=_positive, default=CORES)
    imagenet.set_defaults(run=_imagenet)

    check = commands.add_parser("check", help="decode every image, write a manifest")
    check.add_argument("--root", type=Path, required=True)
    check.add_argument("--imagenet", action="store_true", help="expect ImageNet's counts")
    check.add_argument("--manifest", type=Path, help="folder for the manifest (default: the root)")
    check.add_argument("--threads", type=_positive, default=CORES)
    check.set_defaults(run=_check)

    subset = commands.add_parser("subset", help="link some classes of a data set")
    subset.add_argument("--root", type=Path, required=True)
    subset.add_argument("--to", type=Path, required=True, help="the new data set")
    which = subset.add_mutually_exclusive_group(required=True)
    which.add_argument("--classes", type=_positive, help="number of classes, chosen at random")
    which.add_argument("--list", type=Path, help="or: a text file of classes, one per line")
    subset.add_argument("--seed", type=int, default=1, help="seed of the choice (default: 1)")
    subset.set_defaults(run=_subset)
    return whole


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _digits(arguments: argparse.Namespace) -> int:
    prepare_digits(arguments.root)
    print(f"{arguments.root}: {DIGITS.train} training, {DIGITS.val} validation images")
    return 0


def _few_digits(arguments: argparse.Namespace) -> int:
    for val, (_, train_images, val_images) in FEW_DIGITS.items():
        root = arguments.to / FEW_DIGITS_FOLDERS[val]
        prepare_few_digits(root, val)
        print(f"{root}: {train_images} training, {val_images} {val} images")
    return 0


def _glyphs(arguments: argparse.Namespace) -> int:
    root = arguments.root
    train, val = prepare_glyphs(root, [] if root.exists() else installed_fonts())
    print(f"{root}: {train:,} training, {val:,} validation images")
    return 0


def _imagenet(arguments: argparse.Namespace) -> int:
    if arguments.devkit_tar:
        labels = read_devkit(arguments.devkit_tar)
    else:
        labels = read_labels(arguments.val_labels)
    train, val = prepare_imagenet(
        arguments.root,
        arguments.train_tar,
        arguments.val_tar,
        labels,
        threads=arguments.threads,
        expected=Counts(*arguments.counts),
    )
    print(f"{arguments.root}: {len(train):,} training, {len(val):,} validation images")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    root = arguments.root
    splits = open_image_folders(
        root,
        expected_classes=IMAGENET.classes if arguments.imagenet else None,
        expected_train=IMAGENET.train if arguments.imagenet else None,
        expected_val=IMAGENET.val if arguments.imagenet else None,
    )
    for note in (note for split in splits for note in split.notes):
        warn(f"note: {note}")
    broken = 0
    for line in check_images(splits, arguments.manifest or root, arguments.threads):
        broken += 1
        print(line, flush=True)
    print(printable(f"{root}: {sum(map(len, splits)):,} images, {broken} broken"))
    return 1 if broken else 0


def _subset(arguments: argparse.Namespace) -> int:
    source, _ = open_image_folders(arguments.root)
    if arguments.list:
        classes, seed = read_classes(arguments.list), None
    else:
        classes, seed = (
            choose_classes(source.classes, arguments.classes, arguments.seed),
            arguments.seed,
        )
    train, val = link_subset(source, arguments.to, classes, seed)
    counts = f"{len(classes):,} classes, {len(train):,} training, {len(val):,} validation images"
    print(printable(f"{arguments.to}: {counts}"))
    return 0


def run(data: Path = Path("data")) -> NoReturn:
    """Run it with the command line's arguments; exits."""
    program(lambda words: main(words, data))
