"""Make and check data sets.

python scripts/prepare.py digits                       write the small digits data set
python scripts/prepare.py check --root PATH            decode every image of a data set
python scripts/prepare.py check --root PATH --imagenet   and expect ImageNet's counts
"""

import argparse
import os
import sys
from pathlib import Path

from qsr.data import DataError, ImageFolder, open_image_folders
from qsr.data.check import check_images
from qsr.data.datasets import IMAGENET
from qsr.data.digits import DIGITS, prepare_digits

DIGITS_ROOT = Path(__file__).resolve().parents[1] / "data" / "digits"


def main() -> int:
    """Run one command; the exit status is 1 if a data set is refused or has a broken file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    digits = commands.add_parser("digits", help="write the small digits data set")
    digits.add_argument("--root", type=Path, default=DIGITS_ROOT)
    check = commands.add_parser("check", help="decode every image of a data set")
    check.add_argument("--root", type=Path, required=True)
    check.add_argument("--imagenet", action="store_true", help="expect ImageNet's counts")
    check.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    try:
        if arguments.command == "digits":
            prepare_digits(arguments.root)
            print(f"{arguments.root}: {DIGITS.train} training, {DIGITS.val} validation images")
            return 0
        return _check(arguments.root, arguments.imagenet, arguments.threads)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _check(root: Path, imagenet: bool, threads: int) -> int:
    splits = open_image_folders(
        root,
        expected_classes=IMAGENET.classes if imagenet else None,
        expected_train=IMAGENET.train if imagenet else None,
        expected_val=IMAGENET.val if imagenet else None,
    )
    broken = sum(_check_split(split, threads) for split in splits)
    print(f"{root}: {sum(map(len, splits)):,} images, {broken} broken")
    return 1 if broken else 0


def _check_split(dataset: ImageFolder, threads: int) -> int:
    """Print each broken file on a line of its own; return how many there are."""
    broken = 0
    for done, (path, defect) in enumerate(check_images(dataset, threads), start=1):
        if defect is not None:
            broken += 1
            print(f"{path}: {defect}", flush=True)
        if sys.stderr.isatty() and (done % 100 == 0 or done == len(dataset)):
            progress = f"{dataset.split}: {done:,} of {len(dataset):,}, {broken} broken"
            print(progress, end="\n" if done == len(dataset) else "\r", file=sys.stderr)
    return broken


if __name__ == "__main__":
    sys.exit(main())
