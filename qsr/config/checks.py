"""Checks across several settings: what one setting's type cannot say. Each raises ConfigError with
one line that names the settings and says how to fix them."""

from qsr.config.batch_script import check_batch_script
from qsr.config.identity import run_folder
from qsr.config.planning import plan_to_follow
from qsr.config.schema import (
    AnyModel,
    AugmentationConfig,
    Config,
    DataConfig,
    ModelConfig,
    OwnPart,
    OwnSync,
    ReplaySync,
    SlurmCluster,
    SyncConfig,
)
from qsr.core.plan import Plan
from qsr.errors import ConfigError

_SBATCH_ELSEWHERE = {
    "account": "set cluster.account",
    "array": "list values, as in seed=1,2,3, and set cluster.parallel",
    "constraint": "set cluster.constraint",
    "cpus-per-task": "set cluster.cpus_per_task",
    "error": "logs are written to slurm/ in the run folder",
    "gpus-per-node": "set cluster.gpus_per_node",
    "job-name": "jobs are named after their run",
    "mem": "set cluster.memory_gb",
    "no-requeue": "set cluster.requeue",
    "nodes": "set cluster.nodes",
    "ntasks": "set cluster.nodes and cluster.ranks_per_node",
    "ntasks-per-node": "set cluster.ranks_per_node",
    "open-mode": "a restarted job appends to its logs",
    "output": "logs are written to slurm/ in the run folder",
    "partition": "set cluster.partition",
    "qos": "set cluster.qos",
    "requeue": "set cluster.requeue",
    "reservation": "set cluster.reservation",
    "signal": "set cluster.signal and cluster.signal_lead_seconds",
    "time": "set cluster.time_limit_minutes",
}
"""Options of sbatch that cluster.sbatch must not hold, and what to do instead."""


def check(config: Config, *, run_code: bool = True) -> None:
    """Checks across several settings. `run_code`: also of a plan by a rule or a schedule that the
    user wrote. Raises ConfigError."""
    shards = _shards(config)
    if config.global_batch % config.shards:
        raise ConfigError(f"global_batch={config.global_batch} is not divisible by {shards}")
    if config.shard_size % config.micro_batch_size:
        raise ConfigError(
            f"micro_batch={config.micro_batch} does not divide the local batch {config.shard_size} "
            f"(global_batch={config.global_batch} / {shards.replace(' x ', ' / ')})"
        )
    ranks = config.cluster.ranks
    if ranks is not None and config.ranks_per_worker > 1 and ranks != config.shards:
        raise ConfigError(
            f"cluster.ranks={ranks}, but {shards} needs {config.shards} ranks: leave out "
            f"cluster.ranks"
        )
    if ranks is not None and config.ranks_per_worker == 1 and config.workers % ranks:
        raise ConfigError(
            f"cluster.ranks={ranks} does not divide workers={config.workers}: every rank holds the "
            f"same number of workers; try cluster.ranks={_divisors(config.workers)}"
        )
    if isinstance(config.cluster, SlurmCluster):
        _check_slurm(config.cluster, config)
        check_batch_script(config.cluster, config.experiment, run_folder(config))
        if config.cluster.signal not in config.checkpoint.stop_signals:
            raise ConfigError(
                f"cluster.signal={config.cluster.signal} is not in checkpoint.stop_signals: add "
                f"it, or the run would end without a checkpoint"
            )
    check_model_name(config.model)
    if config.schedule.warmup_steps is not None and config.schedule.warmup_epochs is not None:
        raise ConfigError("give schedule.warmup_steps or schedule.warmup_epochs, not both")
    if config.schedule.final_lr > config.schedule.peak_lr:
        raise ConfigError(
            f"schedule.final_lr={config.schedule.final_lr:g} exceeds "
            f"schedule.peak_lr={config.schedule.peak_lr:g}"
        )
    if config.data.augmentation.min_area > config.data.augmentation.max_area:
        raise ConfigError("data.augmentation.min_area exceeds max_area")
    if config.data.augmentation.min_aspect > config.data.augmentation.max_aspect:
        raise ConfigError("data.augmentation.min_aspect exceeds max_aspect")
    _check_randaugment(config.data.augmentation)
    if config.cuda_graphs and config.cluster.device == "cpu":
        raise ConfigError("cuda_graphs=true needs a GPU, but cluster.device=cpu: set one of them")
    check_reading(config.data, config.cluster.device)
    if getattr(config.optimizer, "nesterov", False) and not getattr(
        config.optimizer, "momentum", 0
    ):
        raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0")
    if config.sync.average_second_moment and config.optimizer.name == "sgd":
        raise ConfigError("sync.average_second_moment=true: sgd has no second moment")
    if config.sync.average_momentum and getattr(config.optimizer, "momentum", 1.0) == 0.0:
        raise ConfigError(
            "sync.average_momentum=true, but optimizer.momentum=0: there is no momentum to average"
        )
    _check_sync(config.sync)
    if config.ema.names and config.sync.delay_steps:
        raise ConfigError(
            f"sync.delay_steps={config.sync.delay_steps}: ema.* needs the workers' mean at the "
            f"round's end: set it to 0"
        )
    if config.profile.steps is not None:
        _check_profile(*config.profile.steps)
    own_plan = isinstance(config.sync, OwnPart) or isinstance(config.schedule, OwnPart)
    if config.data.train_images is not None and (run_code or not own_plan):
        check_plan(config, config.data.train_images)


_MOST_PROFILED_STEPS = 100
"""More would fill the host's memory, and no viewer opens their trace."""


def _check_profile(first: int, last: int) -> None:
    steps = f"profile.steps=[{first},{last}]"
    if first > last:
        raise ConfigError(f"{steps}: the first step comes first, as in [{last},{first}]")
    if last - first >= _MOST_PROFILED_STEPS:
        raise ConfigError(
            f"{steps}: record at most {_MOST_PROFILED_STEPS} steps, as in "
            f"[{first},{first + _MOST_PROFILED_STEPS - 1}]"
        )


def check_model_name(model: AnyModel) -> None:
    """Raise ConfigError unless model.timm_name is set exactly if model.name is timm."""
    if isinstance(model, ModelConfig) and (model.timm_name is None) == (model.name == "timm"):
        raise ConfigError("model.timm_name must be set if model.name=timm, and only then")


def check_reading(data: DataConfig, device: str) -> None:
    """Checks of the settings for reading images. Raises ConfigError."""
    if min(data.std) <= 0:
        raise ConfigError(f"data.std must be positive, got {list(data.std)}")
    if data.decode == "gpu" and device == "cpu":
        raise ConfigError("data.decode=gpu needs a GPU: use data.decode=auto")
    if data.decode == "gpu" and data.loader in ("torchvision", "memory"):
        raise ConfigError("data.decode=gpu needs DALI: use data.loader=dali")
    if data.loader == "memory" and data.augmentation != _NO_AUGMENTATION:
        raise ConfigError(
            "data.loader=memory keeps every image as it is, without data.augmentation: use "
            "data.loader=auto, or set min_area, max_area, min_aspect and max_aspect to 1, "
            "flip_probability to 0 and randaugment to none, as in configs/data/glyphs.yaml"
        )


_NO_AUGMENTATION = AugmentationConfig(
    min_area=1.0,
    max_area=1.0,
    min_aspect=1.0,
    max_aspect=1.0,
    flip_probability=0.0,
    randaugment="none",
    randaugment_depth=None,
    randaugment_severity=None,
)
"""Every image as it is, if it is square."""


_RANDAUGMENT_SEVERITY = {"composer": 10, "torchvision": 30, "timm": 10}
"""The highest data.augmentation.randaugment_severity of each library."""


def _check_randaugment(settings: AugmentationConfig) -> None:
    kind = f"data.augmentation.randaugment={settings.randaugment}"
    depth, severity = settings.randaugment_depth, settings.randaugment_severity
    if settings.randaugment == "none":
        if depth is not None or severity is not None:
            raise ConfigError(
                f"{kind}: set randaugment_depth and randaugment_severity to null, or choose "
                f"composer (the paper's), torchvision or timm"
            )
        return
    highest = _RANDAUGMENT_SEVERITY[settings.randaugment]
    if depth is None or severity is None:
        raise ConfigError(
            f"{kind} needs data.augmentation.randaugment_depth (usually 2) and "
            f"randaugment_severity (0 to {highest})"
        )
    if severity > highest or (settings.randaugment == "torchvision" and severity % 1):
        whole = " and a whole number" if settings.randaugment == "torchvision" else ""
        raise ConfigError(
            f"data.augmentation.randaugment_severity={severity:g}: {settings.randaugment}'s must "
            f"be between 0 and {highest}{whole}"
        )


def _check_sync(sync: SyncConfig) -> None:
    smallest = 1 if isinstance(sync, OwnSync) else sync.smallest_h or 1
    if sync.h_max is not None and sync.h_max < smallest:
        raise ConfigError(
            f"sync.h_max={sync.h_max} is below the rule's smallest H, {smallest}: set it to null, "
            f"or use sync=constant"
        )
    try:
        outer = sync.outer
    except ValueError as error:
        raise ConfigError(f"sync.outer_*: {error}") from None
    if sync.delay_steps:
        _check_delay(sync)
    if outer.ends_at_mean:
        return
    if sync.rule == "every_step" and sync.average == "gradients":
        raise ConfigError("sync.outer_*: data parallel training averages no parameters")
    if sync.delay_steps:
        raise ConfigError(
            f"sync.delay_steps={sync.delay_steps}: the outer optimizer needs the average at the "
            f"round's end: set it to 0"
        )


def _check_delay(sync: SyncConfig) -> None:
    delay, smallest = f"sync.delay_steps={sync.delay_steps}", sync.smallest_h
    if isinstance(sync, OwnSync):
        raise ConfigError(
            f"{delay}: not with sync=custom, whose smallest H is not known: set it to 0"
        )
    if smallest is None:
        raise ConfigError(f"{delay}: sync=swap averages once, at the end of the run: set it to 0")
    if sync.delay_steps >= smallest:
        raise ConfigError(
            f"{delay}: must be less than the smallest H, {smallest}, because an average must be "
            f"applied before the next round ends"
        )
    if sync.average_momentum or sync.average_second_moment:
        raise ConfigError(f"{delay}: only parameters, not moments, can be averaged with a delay")


def _check_slurm(cluster: SlurmCluster, config: Config) -> None:
    each, ranks, several = cluster.tasks_per_node, cluster.job_ranks, config.ranks_per_worker
    if not each:
        raise ConfigError("cluster.gpus_per_node=0 needs cluster.ranks_per_node: set it")
    if cluster.device != "cpu" and 0 < cluster.gpus_per_node < each:
        raise ConfigError(
            f"cluster.ranks_per_node={each} exceeds cluster.gpus_per_node={cluster.gpus_per_node}: "
            f"every rank needs a GPU of its own"
        )
    if several > 1 and ranks != config.shards:
        raise ConfigError(
            f"cluster.nodes={cluster.nodes} x {each} ranks per node = {ranks} ranks, but "
            f"{_shards(config)} needs {config.shards}: change one of them"
        )
    if several > 1 and several % each and each % several:
        raise ConfigError(
            f"ranks_per_worker={several} and {each} ranks per node: the ranks of a worker would "
            f"lie on different nodes; let one number divide the other"
        )
    if several == 1 and config.workers % ranks:
        raise ConfigError(
            f"cluster.nodes={cluster.nodes} x {each} ranks per node = {ranks} ranks do not divide "
            f"workers={config.workers}: every rank holds the same number of workers; try "
            f"{_divisors(config.workers)} ranks"
        )
    if cluster.ranks not in (None, ranks):
        raise ConfigError(
            f"cluster.ranks={cluster.ranks}, but cluster.nodes x ranks per node = {ranks}: leave "
            f"out cluster.ranks"
        )
    if cluster.signal_lead_seconds >= 60 * cluster.time_limit_minutes:
        raise ConfigError(
            f"cluster.signal_lead_seconds={cluster.signal_lead_seconds} is not shorter than "
            f"cluster.time_limit_minutes={cluster.time_limit_minutes}: the job would be told to "
            f"stop as soon as it starts"
        )
    for option in cluster.sbatch:
        fix = _SBATCH_ELSEWHERE.get(option.replace("_", "-"))
        if fix is not None:
            raise ConfigError(f"cluster.sbatch.{option}: {fix}")


def _shards(config: Config) -> str:
    """The settings that say how a step's samples are divided."""
    several = f" x ranks_per_worker={config.ranks_per_worker}"
    return f"workers={config.workers}{several if config.ranks_per_worker > 1 else ''}"


def check_plan(config: Config, train_images: int) -> None:
    """Check the plan, which depends on the size of the training set. Raises ConfigError."""
    try:
        plan = plan_to_follow(config, train_images)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if isinstance(config.sync, OwnSync) and isinstance(plan, Plan):
        list(plan.rounds())  # asks the rule for every H
    if isinstance(config.sync, ReplaySync):
        _check_replay(config.sync, plan.total_steps)
    switch_epoch = getattr(config.sync, "switch_epoch", 0)
    if switch_epoch > config.epochs:
        raise ConfigError(
            f"sync.switch_epoch={switch_epoch} lies after the last epoch, epochs={config.epochs}"
        )
    if config.stop_after_steps is not None and config.stop_after_steps > plan.total_steps:
        raise ConfigError(
            f"stop_after_steps={config.stop_after_steps} exceeds the run's {plan.total_steps} steps"
        )
    profiled = config.profile.steps
    if profiled is not None and profiled[1] > plan.total_steps:
        raise ConfigError(
            f"profile.steps=[{profiled[0]},{profiled[1]}] exceeds the run's {plan.total_steps} "
            f"steps: choose earlier ones"
        )


def _check_replay(sync: ReplaySync, total_steps: int) -> None:
    given = sum(sync.lengths)
    if given < total_steps:
        raise ConfigError(
            f"sync.file={sync.file}: its rounds have {given:,} steps, but the run has "
            f"{total_steps:,}: add rounds, or shorten the run"
        )


def _divisors(number: int) -> str:
    return " or ".join(str(d) for d in range(1, number + 1) if number % d == 0)
