"""Small archives of the shape in which ImageNet is given out."""

import hashlib
import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

SYNSETS = {1: "n02000000", 2: "n03000000", 3: "n01000000", 4: "n00000004"}
"""ILSVRC2012_ID -> wnid. As in the devkit, the order is not alphabetical, and behind the classes
come groups of them."""

GROUND_TRUTH = (3, 1, 2, 2, 3, 1)

VAL_LABELS = {
    "ILSVRC2012_val_00000001.JPEG": "n01000000",
    "ILSVRC2012_val_00000002.JPEG": "n02000000",
    "ILSVRC2012_val_00000003.JPEG": "n03000000",
    "ILSVRC2012_val_00000004.JPEG": "n03000000",
    "ILSVRC2012_val_00000005.JPEG": "n01000000",
    "ILSVRC2012_val_00000006.JPEG": "n02000000",
}
"""The same by hand."""


def jpeg(seed: int, side: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def tar(files: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def small_train() -> dict[str, list[tuple[str, bytes]]]:
    return {
        wnid: [(f"{wnid}_{i}.JPEG", jpeg(10 * label + i)) for i in (7, 12, 3, 1)]
        for label, wnid in enumerate(("n02000000", "n01000000", "n03000000"))
    }


@dataclass
class Archives:
    """What the three official files hold; tests damage it before it is written."""

    folder: Path
    train: dict[str, list[tuple[str, bytes]]] = field(default_factory=small_train)
    val: list[tuple[str, bytes]] = field(
        default_factory=lambda: [(name, jpeg(100 + i)) for i, name in enumerate(VAL_LABELS)]
    )
    ground_truth: list[str] = field(default_factory=lambda: [str(i) for i in GROUND_TRUTH])

    def __post_init__(self) -> None:
        self.train_tar = self.folder / "ILSVRC2012_img_train.tar"
        self.val_tar = self.folder / "ILSVRC2012_img_val.tar"
        self.devkit_tar = self.folder / "ILSVRC2012_devkit_t12.tar.gz"
        self.root = self.folder / "imagenet"

    def write(self) -> None:
        inner = [(f"{wnid}.tar", tar(files)) for wnid, files in self.train.items()]
        self.train_tar.write_bytes(tar(inner))
        self.val_tar.write_bytes(tar(self.val))
        self.write_devkit(
            {
                "data/ILSVRC2012_validation_ground_truth.txt": "\n".join(
                    [*self.ground_truth, ""]
                ).encode(),
                "data/meta.mat": meta_mat(),
            }
        )

    def write_devkit(self, files: dict[str, bytes]) -> None:
        with tarfile.open(self.devkit_tar, "w:gz") as archive:
            for name, content in {"readme.txt": b"hello", **files}.items():
                member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    def command(self, threads: int = 1) -> list[str]:
        images = sum(map(len, self.train.values()))
        return [
            "imagenet", "--root", str(self.root), "--threads", str(threads),
            "--train-tar", str(self.train_tar), "--val-tar", str(self.val_tar),
            "--devkit-tar", str(self.devkit_tar),
            "--counts", str(len(self.train)), str(images), str(len(self.val)),
        ]  # fmt: skip


def meta_mat() -> bytes:
    """The devkit's meta.mat: a struct array [n, 1] with these fields."""
    fields = (
        "ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children",
        "wordnet_height", "num_train_images",
    )  # fmt: skip
    synsets = np.empty((len(SYNSETS), 1), dtype=[(name, object) for name in fields])
    for row, (number, wnid) in enumerate(SYNSETS.items()):
        group = number == len(SYNSETS)
        children = np.array([[1.0, 2.0]]) if group else np.zeros((1, 0))
        words, gloss = f"thing {number}, object {number}", "something"
        synsets[row, 0] = (
            float(number), wnid, words, gloss, 2.0 * group, children, 1.0 * group, 4.0
        )  # fmt: skip
    stream = io.BytesIO()
    savemat(stream, {"synsets": synsets})
    return stream.getvalue()


def content(root: Path) -> dict[str, str]:
    """Every file below `root`, hidden ones too, and the hash of its bytes."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def wanted(archives: Archives) -> dict[str, str]:
    """`content` of the complete tree, from what the archives were made of."""
    files = {f"train/{w}/{name}": data for w, of in archives.train.items() for name, data in of}
    files |= {f"val/{VAL_LABELS[name]}/{name}": data for name, data in archives.val}
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
