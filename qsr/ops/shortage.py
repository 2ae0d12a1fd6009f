"""What the doctor says of a run's loading, in one line: whether it keeps up, or what to change."""

import math

import torch

from qsr.config.schema import Config
from qsr.data import uses_dali
from qsr.data.sizing import default_threads
from qsr.ops.loading import MORE_READERS, Feed, LoadingTrial

FASTER = 1.5
"""Reading is held up by waiting, not by the disk's rate, if more readers are so much faster."""


def speeds(feed: Feed) -> str:
    """Images per second of the loader and of the step."""
    return f"the loader gives {1 / feed.loader:,.0f} images/s, the step takes {1 / feed.step:,.0f}"


def shortage(feed: Feed, trial: LoadingTrial, config: Config, device: torch.device) -> str:
    """What a loader that does not keep up is short of, and the setting to change."""
    on_gpu = device.type == "cuda" and uses_dali(config.data.loader)
    match feed.short_of:
        case "disk":
            rate = 1 / feed.parts["disk"]
            what, mend = f"the disk, which gives {rate:,.0f} files/s", _for_disk(feed, trial)
        case "decoding" if on_gpu and config.data.decode != "cpu":
            what, mend = "the GPU's decoder", "store smaller images, or try data.decode=cpu"
        case "decoding":
            what, mend = (
                "decoder threads",
                _for_threads(feed, trial, config, "store smaller images"),
            )
            if on_gpu:
                mend = f"set data.decode=gpu, or {mend}"
        case "RandAugment" if on_gpu:
            what, mend = "the GPU, for RandAugment", "lower data.augmentation.randaugment_depth"
        case "RandAugment":
            less = "lower data.augmentation.randaugment_depth"
            what, mend = "threads for RandAugment", _for_threads(feed, trial, config, less)
        case _:
            what, mend = "the link to the GPU", "see whether other programs copy (nvidia-smi dmon)"
    return (
        f"{speeds(feed)}: training will wait for data {feed.waiting_percent:.0f} % of the time, "
        f"short of {what}: {mend}"
    )


def _for_disk(feed: Feed, trial: LoadingTrial) -> str:
    if feed.parts["disk"] < FASTER * feed.more_readers:
        return "set data.root to a copy on a faster disk, or store smaller images"
    most = MORE_READERS * trial.threads
    wanted = min(most, _wanted_threads(feed, trial))
    return (
        f"raise data.loader_threads from {trial.threads} to {wanted}, because more reads at a time "
        f"are faster here"
    )


def _for_threads(feed: Feed, trial: LoadingTrial, config: Config, otherwise: str) -> str:
    batches = math.ceil(trial.threads / config.shard_size)
    if batches > trial.prefetch + 1:
        return f"raise data.prefetch_batches from {trial.prefetch} to {batches}"
    if trial.threads < default_threads(trial.cores):
        wanted = min(default_threads(trial.cores), _wanted_threads(feed, trial))
        return f"raise data.loader_threads from {trial.threads} to {wanted}"
    return f"give each rank more than its {trial.cores} cores, or {otherwise}"


def _wanted_threads(feed: Feed, trial: LoadingTrial) -> int:
    """With which the loader would keep up if twice the threads loaded twice as fast."""
    return math.ceil(trial.threads * feed.loader / feed.step)
