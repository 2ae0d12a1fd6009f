"""Checks whether a run would start here: tries what it needs, and says how to fix each failure."""

import hashlib
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from qsr.cluster.group import choose_device, join_process_group, topology
from qsr.cluster.place import Place, find_place
from qsr.config.schema import Config, SlurmCluster
from qsr.errors import CheckError
from qsr.ops import checks
from qsr.output import say

_UNEXPECTED = {
    "device": "the GPU does not start: see nvidia-smi, or use cluster.device=cpu",
    "data": "the images cannot be read: see whether the disk of data.root works",
    "network": "the network cannot be tried: see whether torch, torchvision and timm fit together "
    "(pip check), or choose another model",
    "plan": "the run cannot be planned: see the settings with --cfg job",
    "run folder": "the run folder cannot be used: choose another runs_dir",
    "free space": "the free space cannot be found: choose another runs_dir",
    "decoding": "the loader fails: try data.decode=cpu, then data.loader=torchvision",
    "training": "a training pass fails: try compile=none, then precision=fp32, then "
    "cluster.device=cpu",
    "loading": "the loader fails under load: lower data.loader_threads and data.prefetch_batches",
    "wandb": "wandb cannot be tried: use tracking=offline",
    "Slurm": "Slurm cannot be asked: ask on a login node",
    "submitit": "submitit cannot be found: pip install submitit",
    "tensorboard": "tensorboard cannot be found: pip install tensorboard",
    "ranks": "the ranks cannot exchange data: see NCCL in docs/cluster.md, with NCCL_DEBUG=INFO",
}
"""What is wrong and how to fix it where a check fails with an error of a library's, which
follows."""

_PATIENCE_SECONDS = 60.0
"""How long to wait for the other ranks; a rank that cannot join says why itself."""


def examine(config: Config) -> bool:
    """Collective: check what the ranks of a run need, print a line per check, and return whether
    all checks passed on all ranks. Raises ClusterError if the launch is wrong or this rank has no
    device, because then nothing else can be checked."""
    place = find_place()
    own = topology(config.cluster, config.workers, config.ranks_per_worker)
    device = choose_device(config.cluster.device, own.local_rank)
    report = _Report(place)
    report.check("device", lambda: f"{_name(device)}, {place.cores} cores per rank")
    torch.set_num_threads(config.cluster.threads_per_rank or place.cores)
    if place.local_rank == 0:  # once per machine
        data = _check_files(report, config)
        if data.train is not None:
            report.check("decoding", lambda: data.decode(device))
        if "network" not in report.failed:
            report.check("training", lambda: checks.check_training(config, device))
        if not {"data", "network", "decoding", "training"} & report.failed:
            report.check("loading", lambda: data.load(device))
    if own.is_main:
        report.check("tensorboard", lambda: checks.check_tensorboard(config))
        report.check("wandb", lambda: checks.check_wandb(config))
    digest = hashlib.sha256(place.attempt.encode()).hexdigest()[:16]  # the name may hold anything
    mark = Path(config.runs_dir) / f".doctor-{digest}"
    patience = min(_PATIENCE_SECONDS, config.cluster.timeout_seconds)
    everyone_well = False

    def meet() -> str:
        nonlocal everyone_well
        communicator = join_process_group(own, device, patience)
        wrong = checks.check_ranks(communicator, mark)
        everyone_well = not communicator.any(bool(report.failed) or wrong is not None)
        if wrong is not None:  # not earlier: the others would wait for this rank
            raise CheckError(wrong)
        if own.ranks == 1:
            return "a single rank"
        kind = "NCCL" if device.type == "cuda" else "gloo"
        return f"{own.ranks} ranks, all-reduce with {kind}"

    report.check("ranks", meet)
    return everyone_well and not report.failed


def examine_login_node(config: Config) -> bool:
    """Run the checks that are possible on a login node, print a line per check, and return whether
    all passed."""
    cluster = config.cluster
    assert isinstance(cluster, SlurmCluster)
    report = _Report(find_place())
    _check_files(report, config, elsewhere=True)
    report.check("tensorboard", lambda: checks.check_tensorboard(config))
    report.check("wandb", lambda: checks.check_wandb(config))
    report.check("Slurm", lambda: checks.check_slurm(cluster))
    report.check("submitit", checks.check_submitit)
    return not report.failed


def _check_files(
    report: "_Report", config: Config, *, elsewhere: bool = False
) -> checks.DataChecks:
    data = checks.DataChecks(config)
    report.check("data", lambda: data.open(elsewhere=elsewhere))
    report.check("network", lambda: checks.check_passes(config))
    report.check("plan", data.plan)
    report.check("run folder", lambda: checks.check_folder(config))
    if "plan" not in report.failed:
        report.check("free space", data.space)
    return data


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return "the CPU"
    return f"{torch.cuda.get_device_name(device)} ({device})"


class _Report:
    """Prints a line per check: passed checks on rank 0 only, the others on every rank."""

    def __init__(self, place: Place) -> None:
        self.failed: set[str] = set()
        """Names of the failed checks."""
        self._place = place

    def check(self, name: str, action: Callable[[], str | checks.Slow]) -> None:
        """Run a check; `action` returns what it found, or raises. Where the run would only be slow
        it has not failed."""
        try:
            found = action()
        except Exception as error:  # any error: the other checks should run too
            self.failed.add(name)
            kind = type(error)
            own = kind.__module__.startswith("qsr.")
            text = str(error) if own else f"{_UNEXPECTED[name]} ({kind.__name__}: {error})"
            self._say("FAIL", name, f"{self._where()}{' '.join(text.split())}")
        else:
            if isinstance(found, checks.Slow):
                self._say("slow", name, f"{self._where()}{found.text}")
            elif self._place.rank == 0:
                self._say("ok", name, found)

    def _where(self) -> str:
        if self._place.ranks == 1:
            return ""
        return f"rank {self._place.rank} on {platform.node()}: "

    @staticmethod
    def _say(verdict: str, name: str, text: str) -> None:
        say(f"{verdict:4}  {name:11}  {text}")
