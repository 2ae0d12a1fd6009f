"""Config -> parts -> trainer: the one factory, and the life of a run in one rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from qsr.averaging import FINGERPRINT_SIZE, MomentBuffers
from qsr.checkpoint import Checkpointer, CheckpointError
from qsr.config.costs import make_cost_model, moment_bytes, parameter_bytes
from qsr.config.load import ConfigError, check_plan, config_hash
from qsr.config.planning import make_plan, make_sampler
from qsr.config.schema import AugmentationConfig, Config
from qsr.core.cost import averaged_bytes, ring_bytes
from qsr.core.plan import Plan
from qsr.core.seeds import seed_for
from qsr.data import (
    DataError,
    EvalTransform,
    ImageFolder,
    Loader,
    TrainTransform,
    make_loader,
    open_image_folders,
    try_some,
    uses_dali,
)
from qsr.data.randaugment import RandAugment
from qsr.distributed import ClusterError, Communicator, Topology, choose_device, topology
from qsr.evaluation import BatchNormSource, Evaluation, Evaluator
from qsr.flat import FlatModule
from qsr.losses import TrainingLoss
from qsr.memory import keep_freed_memory
from qsr.model_file import Description
from qsr.models import build_model, check_network
from qsr.optim import averaged_state_keys, build_optimizer
from qsr.output import warn
from qsr.place import find_place
from qsr.precision import Precision
from qsr.runfolder import (
    RunFolder,
    check_run_folder,
    code_that_runs,
    make_run_folder,
    missing_room,
    other_code,
    reserve_results,
    write_records,
    write_results,
)
from qsr.runlock import check_free, claim
from qsr.stopping import StopFlag
from qsr.tracking import NullTracker, Tracker, build_tracker
from qsr.trainer import Due, Trainer
from qsr.worker import Worker


class Prepared(NamedTuple):
    """What a run finds on this machine, checked."""

    train: ImageFolder
    val: ImageFolder
    data: dict[str, Any]
    """What makes the data what they are, for data.json."""
    folder: RunFolder
    summary: dict[str, Any] | None
    """Of a run that has come to its end before."""


def prepare(config: Config) -> Prepared:
    """Check everything that can be wrong with the settings on this machine, and make the run's
    folder. Raises DataError, ConfigError; nothing of an earlier run is touched."""
    data = config.data
    check_network(config)
    loader = "dali" if uses_dali(data.loader) else "torchvision"
    train, val = open_image_folders(
        data.root,
        expected_train=data.train_images,
        expected_val=data.val_images,
        expected_classes=data.classes,
    )
    check_plan(config, len(train))
    record = {
        "train_images": len(train),
        "val_images": len(val),
        "train_files": train.fingerprint,
        "val_files": val.fingerprint,
        "loader": loader,  # DALI's and torchvision's training pixels differ a little
    }
    folder = check_run_folder(config, record)
    summary = folder.summary_if_finished()
    if summary is None:  # a finished run is not written to: its disk may be full, or read-only
        try_some(train, val)
        make_run_folder(folder)
        check_free(folder.path)
    return Prepared(train, val, record, folder, summary)


@dataclass(frozen=True)
class Stopped:
    """A session that ended before its run did, everything saved."""

    step: int
    """Steps of the run that are done."""
    reason: str
    """A signal's name, or stop_after_steps."""
    by_signal: bool
    """Whether no other run should be started either."""


def run(config: Config, flag: StopFlag | None = None) -> dict[str, Any] | Stopped:
    """Collective: carry out the run, or what is left of it, as one rank of a launch.

    Returns the summary, or where the session stopped before the end: because it was to, or because
    some rank's `flag` asked for it. Whatever is wrong with the settings, the data, the folder or
    the devices raises before a process group exists. Raises CheckpointError at the end, on every
    rank, if the session's last checkpoint, or the results, could not be written.
    """
    train, val, data, folder, finished = prepare(config)
    if finished is not None:
        return finished
    plan = make_plan(config, len(train))
    communicator = join(config, f"{config.experiment}/seed_{config.seed}")
    place = communicator.topology
    _check_same_code_and_data(communicator, data)
    communicator.barrier()  # every rank has looked at the folder; now it may be written
    lock = claim(folder.path, communicator)
    tracker: Tracker = NullTracker()
    loaders: list[Loader] = []
    try:
        if place.is_main:
            warning = other_code(folder)
            if warning is not None:
                warn(f"warning: {warning}")
            for note in (*train.notes, *val.notes):
                warn(f"note: {note}")

        def begin() -> None:
            nonlocal tracker
            write_records(folder, config, data, place, str(communicator.device))
            tracker = build_tracker(config, folder.path, plan.total_steps)

        _on_main(communicator, folder, begin)
        checkpointer = Checkpointer(
            folder.checkpoints,
            config.checkpoint.keep,
            communicator,
            lock.locate if lock is not None else None,
        )
        trainer, evaluator = _build(
            config,
            train,
            val,
            plan,
            communicator,
            tracker,
            checkpointer,
            loaders,
            flag or StopFlag(),
        )
        model = evaluator.model.state_dict()
        about = describe(config, train.classes, plan.total_steps)
        trainer.check_space(missing_room(folder, model, about))
        _on_main(communicator, folder, lambda: reserve_results(folder, model, about))
        trainer.restore()
        trainer.train()
        unsaved = trainer.checkpoint_failure
        if not trainer.finished:
            if unsaved is not None:
                raise CheckpointError(f"{unsaved}; the same command goes on from there")
            received = (flag and flag.reason) or "a signal to another rank"
            reason = received if trainer.stopping else "stop_after_steps"
            return Stopped(trainer.progress.step, reason, by_signal=trainer.stopping)
        summary = _summary(config, plan, trainer, place, len(train))
        results = evaluator.model.state_dict()
        final = describe(config, train.classes, trainer.progress.step, trainer.evaluation)
        _on_main(communicator, folder, lambda: write_results(folder, results, final, summary))
        if unsaved is not None:
            raise CheckpointError(f"{unsaved}; but training is done, and the results are written")
        return summary
    finally:
        for loader in loaders:
            loader.close()
        tracker.close()
        if lock is not None:
            lock.release()


def _check_same_code_and_data(communicator: Communicator, data: dict[str, Any]) -> None:
    """Collective: machines may have copies of their own. Raises ClusterError or DataError, on every
    rank."""
    if differs := communicator.first_difference(code_that_runs()):
        raise ClusterError(
            f"rank {differs.rank} runs other code than rank 0 ({differs.what}): give all machines "
            f"the same qsr, Python and packages"
        )
    if differs := communicator.first_difference(data):
        raise DataError(
            f"rank {differs.rank} has other data than rank 0 ({differs.what}): give all machines "
            f"the same files and packages"
        )


def _on_main(communicator: Communicator, folder: RunFolder, write: Callable[[], None]) -> None:
    """Collective: let rank 0 write to the run folder. Raises CheckpointError on every rank."""
    try:
        communicator.try_on_all(lambda: write() if communicator.topology.is_main else None)
    except OSError as error:
        raise CheckpointError(
            f"{folder.path} could not be written ({error}); see to that, and the same command goes "
            f"on from the newest checkpoint"
        ) from None


def join(config: Config, name: str = "group") -> Communicator:
    """Collective: find this rank's place, device and threads, and join the others, in the process
    group of this name. Raises ClusterError before a process group exists."""
    place = topology(config.cluster, config.workers)
    device = choose_device(config.cluster.device, place.local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_num_threads(config.cluster.threads_per_rank or find_place().cores)
    return Communicator(place, device, config.cluster.timeout_seconds, name)


def _build(
    config: Config,
    train: ImageFolder,
    val: ImageFolder,
    plan: Plan,
    communicator: Communicator,
    tracker: Tracker,
    checkpointer: Checkpointer,
    loaders: list[Loader],
    flag: StopFlag,
) -> tuple[Trainer, Evaluator]:
    """All parts; opened loaders are appended to `loaders` for the caller to close."""
    device = communicator.device
    precision = Precision(config.precision, device, config.fp16_overflow == "repeat")
    num_classes = len(train.classes)

    def open_loader(data: ImageFolder, transform: Any, batch: int) -> Loader:
        loader = make_loader(
            config.data.loader,
            data,
            transform,
            batch_size=batch,
            device=device,
            threads=config.data.loader_threads,
            prefetch=config.data.prefetch_batches,
            decode=config.data.decode,
        )
        loaders.append(loader)
        return loader

    workers = make_workers(config, num_classes, communicator)
    sampler = make_sampler(config, len(train))
    train_transform, eval_transform = transforms(config)
    batchnorm = BatchNormSource(
        open_loader(train, train_transform, config.micro_batch_size),
        sampler,
        config.micro_batch_size,
        config.evaluation.batchnorm_micro_batches,
    )
    evaluator = Evaluator(
        _make_model(config, num_classes, device),
        open_loader(val, eval_transform, config.evaluation.batch),
        len(val),
        config.evaluation.batch,
        batchnorm,
        communicator,
        precision,
    )
    keys = averaged_state_keys(config.optimizer, config.sync)
    trainer = Trainer(
        plan=plan,
        sampler=sampler,
        workers=workers,
        moments=MomentBuffers([worker.optimizer for worker in workers], keys),
        loader=open_loader(train, train_transform, config.local_batch),
        loss=TrainingLoss(config.loss),
        micro_batch=config.micro_batch_size,
        clip_norm=config.optimizer.clip_norm,
        precision=precision,
        communicator=communicator,
        evaluator=evaluator,
        checkpointer=checkpointer,
        tracker=tracker,
        due=Due(
            log_every=config.tracking.log_every_steps,
            evaluate_every=config.evaluation.every_epochs * sampler.steps_per_epoch,
            checkpoint_every=config.checkpoint.every_steps,
            stop_after=config.stop_after_steps,
        ),
        config_hash=config_hash(config),
        stop=flag,
        bucket_mib=config.cluster.bucket_mib if config.cluster.overlap_gradients else None,
        delay_steps=config.sync.delay_steps,
    )
    return trainer, evaluator


def make_workers(config: Config, num_classes: int, communicator: Communicator) -> list[Worker]:
    """The workers of this rank, all with the same weights."""
    device = communicator.device
    precision = Precision(config.precision, device, config.fp16_overflow == "repeat")
    fused = device.type == "cuda" or precision.name == "fp16"
    workers = []
    for index in communicator.topology.workers:
        model = _make_model(config, num_classes, device)
        flat = FlatModule(model, extra=FINGERPRINT_SIZE)
        optimizer = build_optimizer(config.optimizer, model.parameters(), fused=fused)
        workers.append(Worker(index, flat, optimizer, precision.scaler()))
    return workers


def _make_model(config: Config, num_classes: int, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(seed_for(config.seed, "weights"))  # the same on every worker
    return build_model(config.model, num_classes, config.data.image_size).to(device)


def transforms(config: Config) -> tuple[TrainTransform, EvalTransform]:
    """What happens to training and to validation images."""
    data, change = config.data, config.data.augmentation
    train = TrainTransform(
        size=data.image_size,
        min_area=change.min_area,
        max_area=change.max_area,
        min_aspect=change.min_aspect,
        max_aspect=change.max_aspect,
        flip_probability=change.flip_probability,
        randaugment=_randaugment(change),
        mean=data.mean,
        std=data.std,
    )
    validation = EvalTransform(
        size=data.image_size, crop_fraction=data.eval_crop_fraction, mean=data.mean, std=data.std
    )
    return train, validation


def describe(
    config: Config, classes: Sequence[str], step: int, result: Evaluation | None = None
) -> Description:
    """What the model file of a run says of itself after `step` steps. Runs that compute the same
    give the same. Without a result it is what will be written but for some digits."""
    _, transform = transforms(config)
    return Description(
        network=config.model.name,
        timm_name=config.model.timm_name,
        channels_last=config.model.channels_last,
        classes=tuple(classes),
        image_size=transform.size,
        crop_fraction=transform.crop_fraction,
        mean=transform.mean,
        std=transform.std,
        precision=config.precision,
        experiment=config.experiment,
        seed=config.seed,
        step=step,
        top1=0.0 if result is None else result.top1,
        top5=None if result is None else result.top5,
    )


def _randaugment(settings: AugmentationConfig) -> RandAugment | None:
    if settings.randaugment == "none":
        return None
    depth, severity = settings.randaugment_depth, settings.randaugment_severity
    assert depth is not None  # config.load.check
    assert severity is not None
    return RandAugment(settings.randaugment, depth, severity)


def _summary(
    config: Config, plan: Plan, trainer: Trainer, place: Topology, train_images: int
) -> dict[str, Any]:
    """What the run came to; what was not measured is absent."""
    progress, result = trainer.progress, trainer.evaluation
    assert result is not None  # the last step is always evaluated
    summary = {
        "experiment": config.experiment,
        "seed": config.seed,
        "config_hash": config_hash(config),
        "rule": config.sync.rule,
        "model": config.model.name,
        "data": config.data.name,
        "workers": config.workers,
        "ranks": place.ranks,
        "global_batch": config.global_batch,
        "epochs": config.epochs,
        "train_images": train_images,
        "steps": plan.total_steps,
        "averages": progress.averages,
        "volume": progress.averages / plan.total_steps,
        "bytes_sent_per_worker": _sent(config, progress.averaged_bytes),
        "top1": result.top1,
        "val_loss": result.loss,
        "best_top1": progress.best_top1,
        "train_seconds": progress.train_seconds,
        "evaluation_seconds": progress.evaluation_seconds,
        "checkpoint_seconds": progress.checkpoint_seconds,
        "planned": _planned(config, plan, trainer.num_parameters, place.ranks),
    }
    if result.top5 is not None:
        summary["top5"] = result.top5
    if trainer.measures_communication and place.ranks > 1:
        summary["communication_seconds"] = progress.communication_seconds
    if config.precision == "fp16":
        summary["skipped_updates"] = progress.skipped_updates
        summary["repeated_batches"] = progress.repeated_batches
    return summary


def _planned(config: Config, plan: Plan, parameters: int, ranks: int) -> dict[str, Any]:
    """What the plan said of what the summary measures; seconds if the cluster's profile tells."""
    given = averaged_bytes(plan, parameter_bytes(parameters), moment_bytes(config.sync, parameters))
    planned: dict[str, Any] = {
        "averages": plan.num_rounds,
        "bytes_sent_per_worker": _sent(config, given),
    }
    here = replace(config, cluster=replace(config.cluster, ranks=ranks))
    try:
        overlapped = ranks == config.workers and config.cluster.overlap_gradients
        cost = make_cost_model(here, parameters).run(plan, overlapped=overlapped)
    except ConfigError:  # the profile is of other networks, or of a smaller cluster
        return planned
    planned["train_seconds"] = cost.total_seconds
    planned["communication_seconds"] = cost.communication_seconds
    return planned


def _sent(config: Config, averaged: int) -> int:
    """Bytes that a worker sends when it gives so many to averages, each worker a machine."""
    return round(ring_bytes(config.workers, averaged))
