"""The individual checks of the doctor. Each returns a short description of what it found, or raises
an error with a one-line message that says what is wrong and how to fix it."""

import contextlib
import importlib.util
import math
import netrc
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch

from qsr.cluster.place import find_place
from qsr.cluster.slurm import partitions
from qsr.config.load import check_plan, run_folder
from qsr.config.planning import plan_to_follow
from qsr.config.schema import Config, SlurmCluster
from qsr.data import (
    ImageFolder,
    Request,
    TrainTransform,
    decoders_at_work,
    open_data,
    open_loader,
    resolve_decode,
    try_some,
    uses_dali,
)
from qsr.errors import CheckError, SlurmError, UnknownPlanError
from qsr.ops.loading import LoadingTrial, measure_step, trial_pass
from qsr.ops.shortage import shortage, speeds
from qsr.ops.space import run_sizes, unnamed
from qsr.planner.forecast import forecast
from qsr.planner.text import plan_line
from qsr.run.checkpoint import readable, room_for_checkpoints
from qsr.run.folder import RunFolder
from qsr.run.folder_trial import refusing, try_folder
from qsr.run.identity import check_run_folder
from qsr.run.lock import check_free
from qsr.sync.communicator import Communicator
from qsr.train.models import check_network, count_parameters


class Slow(NamedTuple):
    """The run would work, but slowly."""

    text: str


class DataChecks:
    """Checks of the data set, and of everything that depends on its size."""

    def __init__(self, config: Config) -> None:
        self.train: ImageFolder | None = None
        self._config = config

    def open(self, *, elsewhere: bool = False) -> str:
        """List the files and try some of them. `elsewhere`: other machines will train, which alone
        must have them."""
        if elsewhere and not Path(self._config.data.root).is_dir():
            return f"{self._config.data.root} is not here: the nodes must see it"
        train, val = open_data(self._config.data)
        try_some(train, val)
        self.train = train
        return f"{len(train):,} and {len(val):,} images of {len(train.classes)} classes"

    def plan(self) -> str:
        """The plan of the run: its rounds and estimated time."""
        config, images, classes = self._counted()
        check_plan(config, images)
        parameters = count_parameters(config.model, classes, config.data.image_size)
        try:
            return plan_line(forecast(config, parameters))
        except UnknownPlanError as error:
            return str(error)

    def space(self) -> str:
        """Disk space for the kept checkpoints, the next one, and the results."""
        config, images, classes = self._counted()
        folder, keep = RunFolder(run_folder(config)), config.checkpoint.keep
        names = self.train.classes if self.train is not None else unnamed(classes)
        each, results = run_sizes(config, plan_to_follow(config, images), names)
        wanted, free = room_for_checkpoints(folder.checkpoints, keep, each, results)
        there = f"{readable(free)} free" if math.isfinite(free) else "free space unknown"
        return (
            f"{readable(wanted)} needed ({keep} + 1 checkpoints of {readable(each)} and the "
            f"results), {there}"
        )

    def _counted(self) -> tuple[Config, int, int]:
        """The settings completed with the numbers of training images and classes, and both
        numbers."""
        data = self._config.data
        if self.train is not None:
            data = replace(data, train_images=len(self.train), classes=len(self.train.classes))
        if data.train_images is None or data.classes is None:
            raise CheckError(
                "unknown without the data: set data.train_images and data.classes, or fix data.root"
            )
        return replace(self._config, data=data), data.train_images, data.classes

    def decode(self, device: torch.device) -> str:
        """Load a few images with the run's loader. Call `open` first."""
        assert self.train is not None
        data, number = self._config.data, min(8, len(self.train))
        loader = open_loader(
            data,
            self.train,
            TrainTransform.of(data),
            batch_size=number,
            device=device,
            cores=find_place().cores,
        )
        try:
            batch = next(iter(loader.batches([Request(range(number), seed=0)])))
        finally:
            loader.close()
        if not bool(batch.images.isfinite().all()):
            raise CheckError(
                f"decoding {self.train.path(0)} or one of the next images gives pixels that are "
                f"not finite: check these files"
            )
        if not uses_dali(data.loader):
            return f"torchvision on {batch.images.device}"
        by = decoders_at_work(self.train, resolve_decode(data.decode, device), device)
        return f"DALI on {batch.images.device}" + (f", JPEGs by {by}" if by else "")

    def load(self, device: torch.device) -> str | Slow:
        """Measure the loader alone and the step alone, in this rank, for a few seconds. Call `open`
        first."""
        assert self.train is not None
        trial = LoadingTrial(self._config, self.train, device, find_place().cores)
        feed = trial.measure(measure_step(self._config, device))
        return Slow(shortage(feed, trial, self._config, device)) if feed.parts else speeds(feed)


def check_passes(config: Config) -> str:
    """Check that the network accepts images of this size, in micro-batches of the run's size. Needs
    neither the data nor a device."""
    check_network(config)
    size, name = config.data.image_size, config.model.label
    return f"{name} accepts micro-batches of {config.micro_batch_size} images, {size} x {size}"


def check_training(config: Config, device: torch.device) -> str:
    """One forward and backward pass on the device with the run's precision and micro-batch size and
    freshly initialized weights."""
    images = config.micro_batch_size
    try:
        loss = trial_pass(config, device)()
    except torch.OutOfMemoryError as error:
        raise CheckError(
            f"a pass of {images} images needs more memory than {device} has free: set a smaller "
            f"micro_batch ({error})"
        ) from None
    if not math.isfinite(loss):
        raise CheckError(
            f"the loss with initial weights is {loss} in {config.precision}: use another "
            f"network, or precision=fp32"
        )
    return f"forward and backward pass of {images} images in {config.precision}"


def check_folder(config: Config) -> str:
    """Check that this process can write to the run folder, and that no other run or session is
    using it."""
    path = check_run_folder(config, {}).path
    with refusing(path):
        Path(config.runs_dir).mkdir(parents=True, exist_ok=True)
    lacks = try_folder(path)
    check_free(path)
    return f"{path}{f' (its file system does not support {lacks})' if lacks else ''}"


def check_tensorboard(config: Config) -> str:
    """Check that metrics can be mirrored to TensorBoard as configured."""
    if not config.tracking.tensorboard:
        return "off"
    if importlib.util.find_spec("tensorboard") is None:
        raise CheckError(
            "tensorboard is not installed: pip install tensorboard, or use "
            "tracking.tensorboard=false"
        )
    return f"tensorboard --logdir {config.runs_dir}"


def check_wandb(config: Config) -> str:
    """Check that metrics can be mirrored to wandb as configured."""
    mode = config.tracking.wandb
    if mode == "none":
        return "off"
    if importlib.util.find_spec("wandb") is None:
        raise CheckError("wandb is not installed: pip install wandb, or use tracking=none")
    if mode == "offline":
        return "offline: upload later with wandb sync RUN_FOLDER/wandb/offline-*"
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = server.hostname or "", server.port or (443 if server.scheme == "https" else 80)
    if "WANDB_API_KEY" not in os.environ and not _has_login(host):
        raise CheckError(f"no API key for {host}: run wandb login, or use tracking=offline")
    try:
        socket.create_connection((host, port), 5.0).close()
    except OSError as error:
        raise CheckError(f"{host} cannot be reached: use tracking=offline ({error})") from None
    return f"online at {host}"


def _has_login(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_slurm(cluster: SlurmCluster) -> str:
    """Check that Slurm answers and has the partition."""
    try:
        there = partitions()
    except SlurmError as error:
        raise CheckError(f"Slurm does not answer: ask on a login node ({error})") from None
    if cluster.partition is not None and cluster.partition not in there:
        raise CheckError(
            f"cluster.partition={cluster.partition} does not exist: use one of {', '.join(there)}"
        )
    return f"partitions: {', '.join(there)}"


def check_submitit() -> str:
    """Check that submitit, which qsr submit needs, is installed."""
    if importlib.util.find_spec("submitit") is None:
        raise CheckError(
            "not installed: pip install submitit, or, in a checkout, use sbatch slurm/train.sbatch"
        )
    return "installed"


def check_ranks(communicator: Communicator, mark: Path) -> str | None:
    """Collective: an all-reduce on the device, and the file `mark`, which rank 0 creates and all
    ranks must see. Returns what is wrong on this rank, or None."""
    own = communicator.topology
    if own.ranks == 1:
        return None
    numbers = torch.full((1_000_000,), float(own.rank + 1), device=communicator.device)
    total = communicator.total(numbers)
    made = False
    if own.is_main:
        with contextlib.suppress(OSError):  # another check reports what is wrong there
            mark.touch()
            made = True
    made = communicator.any(made)
    blind = made and not mark.exists()
    communicator.barrier()
    if own.is_main and made:
        mark.unlink()
    expected = own.ranks * (own.ranks + 1) / 2
    if not bool((total == expected).all()):
        return (
            f"an all-reduce gave {total[0].item()} instead of {expected}: the data is damaged on "
            f"its way; see which transport does it with NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1"
        )
    if blind:
        return (
            f"{mark.parent} is not the same folder as on rank 0: choose a runs_dir that all "
            f"machines share"
        )
    return None
