"""Builds all parts of a run from its Config, and executes the run in one rank."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from qsr.cluster.group import choose_device, join
from qsr.cluster.place import find_place
from qsr.cluster.signals import StopFlag
from qsr.config.load import check_plan, config_hash
from qsr.config.planning import make_sampler, plan_to_follow
from qsr.config.schema import Config, OwnModelConfig
from qsr.core.cost import averaged_bytes, ring_bytes
from qsr.core.open_plan import AnyPlan, OpenPlan
from qsr.data import (
    EvalTransform,
    ImageFolder,
    Loader,
    TrainTransform,
    decoders_at_work,
    fallback_note,
    open_data,
    open_loader,
    resolve_decode,
    try_some,
    uses_dali,
    with_label_noise,
)
from qsr.errors import CheckpointError, ClusterError, ConfigError, DataError
from qsr.output import warn
from qsr.planner.cost_model import make_cost_model, moment_bytes, overlaps, parameter_bytes
from qsr.run.checkpoint import Checkpointer
from qsr.run.environment import code_that_runs, other_code, write_records
from qsr.run.folder import RunFolder
from qsr.run.identity import check_run_folder, make_run_folder
from qsr.run.lock import check_free, claim
from qsr.run.results import ModelFile, missing_room, reserve_results, write_results
from qsr.run.tracking import NullTracker, Tracker, build_tracker
from qsr.sync.communicator import Communicator
from qsr.sync.synchronizer import Synchronizer, SyncOptions
from qsr.sync.topology import Topology
from qsr.train.compiling import CompileClock, compile_errors
from qsr.train.evaluation import BatchNormSource, Evaluation, Evaluator
from qsr.train.losses import TrainingLoss
from qsr.train.model_file import Description
from qsr.train.models import check_network, initial_model
from qsr.train.monitor import Monitor
from qsr.train.optim import averaged_state_keys
from qsr.train.precision import Precision
from qsr.train.profile import StepProfiler
from qsr.train.state import RunState, checkpoint_bytes
from qsr.train.step import Stepper
from qsr.train.trainer import Due, Trainer, TrainingData
from qsr.train.weight_average import WeightAverages
from qsr.train.worker import make_workers


class Prepared(NamedTuple):
    """What a run needs on this machine, already checked."""

    train: ImageFolder
    val: ImageFolder
    data: dict[str, Any]
    """The facts that identify the data set, for data.json."""
    folder: RunFolder
    summary: dict[str, Any] | None
    """The summary if the run is already finished."""


def prepare(config: Config) -> Prepared:
    """Check the settings and data on this machine, and create the run folder. Raises DataError or
    ConfigError; files of an earlier run are not changed."""
    data = config.data
    check_network(config)
    loader = "dali" if uses_dali(data.loader) else "torchvision"
    train, val = open_data(data)
    check_plan(config, len(train))
    train = with_label_noise(train, data.label_noise, config.seed)
    record = {
        "train_images": len(train),
        "val_images": len(val),
        "train_files": train.fingerprint,
        "val_files": val.fingerprint,
        "loader": loader,  # training pixels of DALI and torchvision differ slightly
    }
    folder = check_run_folder(config, record)
    summary = folder.summary_if_finished()
    if summary is None:  # do not write to a finished run: its disk may be full or read-only
        try_some(train, val)
        make_run_folder(folder)
        check_free(folder.path)
    return Prepared(train, val, record, folder, summary)


@dataclass(frozen=True)
class Stopped:
    """A session that stopped before the end of the run, after saving everything."""

    step: int
    """Number of completed steps of the run."""
    reason: str
    """The name of a signal, or stop_after_steps."""
    by_signal: bool
    """Whether a signal stopped it: then no further run should be started."""


def run(config: Config, flag: StopFlag | None = None) -> dict[str, Any] | Stopped:
    """Collective: start or resume the run as one rank of a launch.

    Returns the summary, or a Stopped if the session stopped before the end because of
    stop_after_steps or the `flag` of some rank. Errors in the settings, the data, the folder or the
    devices raise before a process group exists. Raises CheckpointError at the end, on every rank,
    if the session's last checkpoint or the results could not be written.
    """
    train, val, data, folder, finished = prepare(config)
    if finished is not None:
        return finished
    plan = plan_to_follow(config, len(train))
    decoder = _gpu_decoder(config, train)
    communicator = join(config, f"{config.experiment}/seed_{config.seed}")
    place = communicator.topology
    _check_same_code_and_data(communicator, data)
    communicator.barrier()  # every rank has checked the folder; now it may be changed
    lock = claim(folder.path, communicator)
    tracker: Tracker = NullTracker()
    loaders: list[Loader] = []
    profiler = None
    if config.profile.steps is not None:
        profiler = StepProfiler(*config.profile.steps, folder.profile, communicator)
    try:
        if place.is_main:
            warning = other_code(folder)
            if warning is not None:
                warn(f"warning: {warning}")
            for note in (*train.notes, *val.notes):
                warn(f"note: {note}")

        def begin() -> None:
            nonlocal tracker
            write_records(folder, config, data, place, str(communicator.device), decoder)
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
            profiler,
        )
        model = evaluator.model.state_dict()
        about = describe(config, train.classes, plan.total_steps).metadata()
        each = checkpoint_bytes(
            evaluator.model, config.optimizer, plan, config.workers, config.sync, config.ema
        )
        over_time = config.ema.names
        checkpointer.check_space(each, missing_room(folder, model, about, over_time))
        _on_main(communicator, folder, lambda: reserve_results(folder, model, about, over_time))
        trainer.restore()
        with compile_errors(config.compile):
            trainer.train()
        unsaved = trainer.checkpoint_failure
        if not trainer.finished:
            if unsaved is not None:
                raise CheckpointError(f"{unsaved}; run the same command to resume")
            received = (flag and flag.reason) or "a signal to another rank"
            reason = received if trainer.stopping else "stop_after_steps"
            return Stopped(trainer.progress.step, reason, by_signal=trainer.stopping)
        summary = _summary(config, plan, trainer, place, len(train))
        _on_main(
            communicator,
            folder,
            lambda: _write(folder, config, train.classes, trainer, evaluator.model, summary),
        )
        if unsaved is not None:
            raise CheckpointError(
                f"{unsaved}; training is complete, however, and the results were written"
            )
        return summary
    finally:
        if profiler is not None:
            profiler.close()
        for loader in loaders:
            loader.close()
        tracker.close()
        if lock is not None:
            lock.release()


def _gpu_decoder(config: Config, train: ImageFolder) -> str | None:
    """On the first rank of a machine, if JPEGs are to be decoded on its GPU: what decodes them.
    Warns if that is not a GPU's decoder. Raises DataError if they cannot be decoded there."""
    data, place = config.data, find_place()
    if place.local_rank > 0 or not uses_dali(data.loader):
        return None
    device = choose_device(config.cluster.device, place.local_rank)
    decode = resolve_decode(data.decode, device)
    if decode == "cpu":
        return None
    decoder = decoders_at_work(train, decode, device)
    note = fallback_note(decoder)
    if note is not None and place.rank == 0:
        warn(f"note: {note}")
    return decoder


def _check_same_code_and_data(communicator: Communicator, data: dict[str, Any]) -> None:
    """Collective: check that all ranks have the same code and data, because machines may have their
    own copies. Raises ClusterError or DataError on every rank."""
    if differs := communicator.first_difference(code_that_runs()):
        raise ClusterError(
            f"rank {differs.rank} runs different code than rank 0 ({differs.what}): install the "
            f"same qsr, Python and packages on all machines"
        )
    if differs := communicator.first_difference(data):
        raise DataError(
            f"rank {differs.rank} has different data than rank 0 ({differs.what}): use the same "
            f"files and packages on all machines"
        )


def _on_main(communicator: Communicator, folder: RunFolder, write: Callable[[], None]) -> None:
    """Collective: call `write` on rank 0. Raises CheckpointError on every rank if it fails."""
    try:
        communicator.try_on_all(lambda: write() if communicator.topology.is_main else None)
    except OSError as error:
        raise CheckpointError(
            f"{folder.path} could not be written ({error}); fix this, then run the same command to "
            f"resume from the newest checkpoint"
        ) from None


def _build(
    config: Config,
    train: ImageFolder,
    val: ImageFolder,
    plan: AnyPlan,
    communicator: Communicator,
    tracker: Tracker,
    checkpointer: Checkpointer,
    loaders: list[Loader],
    flag: StopFlag,
    profiler: StepProfiler | None,
) -> tuple[Trainer, Evaluator]:
    """Build all parts of the run; loaders are appended to `loaders` for the caller to close."""
    device = communicator.device
    precision = Precision(config.precision, device, config.fp16_overflow == "repeat")
    num_classes = len(train.classes)

    cores = find_place().cores

    def opened(data: ImageFolder, transform: Any, batch: int) -> Loader:
        loader = open_loader(
            config.data, data, transform, batch_size=batch, device=device, cores=cores
        )
        loaders.append(loader)
        return loader

    workers = make_workers(config, num_classes, communicator)
    sampler = make_sampler(config, len(train))
    train_transform = TrainTransform.of(config.data)
    batchnorm = BatchNormSource(
        opened(train, train_transform, config.micro_batch_size),
        sampler,
        config.micro_batch_size,
        config.evaluation.batchnorm_micro_batches,
    )
    evaluator = Evaluator(
        initial_model(config, num_classes, device),
        opened(val, EvalTransform.of(config.data), config.evaluation.batch),
        len(val),
        config.evaluation.batch,
        batchnorm,
        communicator,
        precision,
    )
    synchronizer = Synchronizer(
        plan,
        [worker.model for worker in workers],
        [worker.optimizer for worker in workers],
        communicator,
        sampler=sampler,
        config_hash=config_hash(config),
        options=sync_options(config),
        asked_to_stop=lambda: flag.reason is not None,
    )
    stepper = Stepper(
        workers,
        synchronizer,
        Monitor(plan, sampler, communicator, precision),
        loss=TrainingLoss(config.loss),
        micro_batch=config.micro_batch_size,
        clip_norm=config.optimizer.clip_norm,
        precision=precision,
        seed=sampler.seed,
        compile_clock=CompileClock() if config.compile != "none" else None,
        cuda_graphs=config.cuda_graphs,
    )
    due = Due(
        log_every=config.tracking.log_every_steps,
        evaluate_every=config.evaluation.every_epochs * sampler.steps_per_epoch,
        checkpoint_every=config.checkpoint.every_steps,
        stop_after=config.stop_after_steps,
    )
    data = TrainingData(opened(train, train_transform, config.shard_size), sampler)
    averages = WeightAverages(workers[0].model, config.ema, plan.total_steps)
    state = RunState(workers, synchronizer, checkpointer, averages)
    trainer = Trainer(data, stepper, synchronizer, evaluator, state, tracker, due, profiler)
    return trainer, evaluator


def sync_options(config: Config) -> SyncOptions:
    """The options of the run's synchronizer."""
    cluster = config.cluster
    return SyncOptions(
        moments=averaged_state_keys(config.optimizer, config.sync),
        bucket_mib=cluster.bucket_mib if cluster.overlap_gradients else None,
        delay_steps=config.sync.delay_steps,
        outer=config.sync.outer,
    )


def describe(
    config: Config, classes: Sequence[str], step: int, result: Evaluation | None = None
) -> Description:
    """The metadata of a run's model file after `step` steps, equal for runs that compute the same.
    Without a result it has the size of the final metadata except for a few digits."""
    transform = EvalTransform.of(config.data)
    model = config.model
    if isinstance(model, OwnModelConfig):
        network: dict[str, Any] = {
            "timm_name": None,
            "target": model.target,
            "options": model.options,
        }
    else:
        network = {"timm_name": model.timm_name}
    return Description(
        network=config.model.name,
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
        **network,
    )


def _summary(
    config: Config, plan: AnyPlan, trainer: Trainer, place: Topology, train_images: int
) -> dict[str, Any]:
    """The contents of summary.json; values that were not measured are absent."""
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
        "ranks_per_worker": config.ranks_per_worker,
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
        **trainer.state.averages.measured("val_loss"),
        "train_seconds": progress.train_seconds,
        "evaluation_seconds": progress.evaluation_seconds,
        "checkpoint_seconds": progress.checkpoint_seconds,
        "data_seconds": progress.data_seconds,
        "data_idle_seconds": progress.data_idle_seconds,
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


def _write(
    folder: RunFolder,
    config: Config,
    classes: Sequence[str],
    trainer: Trainer,
    model: nn.Module,
    summary: Mapping[str, Any],
) -> None:
    """Write the results of a finished run; `model`: as evaluated last. Raises OSError."""

    def file(tensors: Mapping[str, Tensor], result: Evaluation | None) -> ModelFile:
        about = describe(config, classes, trainer.progress.step, result)
        return ModelFile(tensors, about.metadata())

    over_time = trainer.state.averages
    averages = {
        name: file(tensors, over_time.evaluations[name])
        for name, tensors in over_time.models.items()
    }
    write_results(folder, file(model.state_dict(), trainer.evaluation), summary, averages)


def _planned(config: Config, plan: AnyPlan, parameters: int, ranks: int) -> dict[str, Any]:
    """The planned values of what the summary measures, as far as there is a plan; seconds only if a
    speed profile fits."""
    if isinstance(plan, OpenPlan):
        return {}
    given = averaged_bytes(plan, parameter_bytes(parameters), moment_bytes(config.sync, parameters))
    planned: dict[str, Any] = {
        "averages": plan.num_rounds,
        "bytes_sent_per_worker": _sent(config, given),
    }
    here = replace(config, cluster=replace(config.cluster, ranks=ranks))
    try:
        overlapped = overlaps(config, plan, ranks)
        cost = make_cost_model(here, parameters).run(plan, overlapped=overlapped)
    except ConfigError:  # the profile does not cover this network or this many machines
        return planned
    planned["train_seconds"] = cost.total_seconds
    planned["communication_seconds"] = cost.communication_seconds
    return planned


def _sent(config: Config, averaged: int) -> int:
    """Bytes sent per worker to average so many bytes, if each worker is on its own machine."""
    return round(ring_bytes(config.workers, averaged))
