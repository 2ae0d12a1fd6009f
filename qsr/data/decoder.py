"""Which decoder really decodes the JPEGs of a run.

Where a library or a driver does not suit, nvImageCodec, DALI's library, leaves JPEGs that it was
told to decode on the GPU to the CPU, and only its log says so.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

import torch

from qsr.data.datasets import ImageFolder
from qsr.errors import DataError

LOG_LEVEL = "DALI_NVIMGCODEC_LOG_LEVEL"
"""Variable for what nvImageCodec logs. 1: errors; 2, its default: warnings, of which there may be
several for each image; 3: which decoder takes an image."""

_IMAGES = 16
_PATIENCE_SECONDS = 300
_TRIAL = Path(__file__).with_name("decoder_trial.py")
_TAKES = re.compile(r"(\w+_decoder) process #(\d+)")
_IN_BATCHES = "nvjpeg_hw_decoder"
"""The JPEG hardware of data-centre GPUs takes whole batches, of which the log names no image."""


def log_errors_only() -> None:
    """Call before the first pipeline. The user's own setting of the variable stays."""
    os.environ.setdefault(LOG_LEVEL, "1")


def resolve_decode(
    decode: Literal["auto", "cpu", "gpu"], device: torch.device
) -> Literal["cpu", "gpu"]:
    """Where DALI decodes; "auto" is the run's device."""
    if decode != "auto":
        return decode
    return "gpu" if device.type == "cuda" else "cpu"


def decoders_at_work(
    dataset: ImageFolder, decode: Literal["cpu", "gpu"], device: torch.device
) -> str | None:
    """The names of nvImageCodec's decoders that decode some JPEGs of the data set, with the number
    of images if there are several; None if there are no JPEGs, or if its log does not tell. Takes
    some seconds.

    Raises DataError if the decoding fails, crashes or hangs.
    """
    paths = _some_jpegs(dataset)
    if not paths:
        return None
    instead = "data.decode=cpu" if decode == "gpu" else "data.loader=torchvision"
    failed = f"data.decode={decode}: DALI fails on {len(paths)} images"
    index = device.index if device.index is not None else 0
    try:
        trial = subprocess.run(
            [sys.executable, "-P", str(_TRIAL), decode, str(index), *paths],
            env=os.environ | {LOG_LEVEL: "3"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=_PATIENCE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{failed}: use {instead} (no answer in {_PATIENCE_SECONDS} s)") from None
    log = trial.stdout.decode(errors="replace")
    if trial.returncode:
        last = log.strip().rpartition("\n")[2]
        reason = f"signal {-trial.returncode}" if trial.returncode < 0 else last
        raise DataError(f"{failed}: use {instead} ({reason})")
    return summary_of(log, len(paths))


def summary_of(log: str, images: int) -> str | None:
    """The decoders of so many images by an nvImageCodec log at level 3. An image that one decoder
    gives up counts for the one that takes it next."""
    last = {int(number): decoder for decoder, number in _TAKES.findall(log)}
    if f"create {_IN_BATCHES}" in log:
        last = dict.fromkeys(range(images), _IN_BATCHES) | last
    counts = Counter(last.values()).most_common()
    if len(counts) <= 1:
        return counts[0][0] if counts else None
    return ", ".join(f"{decoder} ({number} of {len(last)})" for decoder, number in counts)


def fallback_note(decoders: str | None) -> str | None:
    """One line for the user if decoding was to be on the GPU and is, at least in part, not."""
    elsewhere = [] if decoders is None else decoders.split(", ")
    elsewhere = [decoder for decoder in elsewhere if not decoder.startswith("nvjpeg")]
    if not elsewhere:
        return None
    return (
        f"data.decode=gpu, but {', '.join(elsewhere)} on the CPU decodes these JPEGs: nvImageCodec "
        f"finds no decoder on this GPU that takes them (see {LOG_LEVEL}=3)"
    )


def _some_jpegs(dataset: ImageFolder) -> list[str]:
    """Paths spread over the data set."""
    found = []
    for index in range(0, len(dataset), max(1, len(dataset) // _IMAGES)):
        path = Path(dataset.path(index))
        with path.open("rb") as file:
            if file.read(2) == b"\xff\xd8":
                found.append(str(path))
    return found[:_IMAGES]
