"""Config -> plan: the only place where settings become a schedule, a rule and a plan."""

from typing import assert_never

from qsr.config import schema
from qsr.config.own_rules import own_schedule
from qsr.core.open_plan import AnyPlan, OpenPlan
from qsr.core.plan import Plan
from qsr.core.sampling import Sampler
from qsr.core.schedules import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    PowerOfTwoSchedule,
    Schedule,
    StepSchedule,
)
from qsr.errors import UnknownPlanError

MOST_STEPS = 10_000_000
"""Most steps of a run. Its rounds are computed before it starts, which takes about a microsecond
and 200 bytes each; the paper's longest runs have 187,000 steps."""


def make_sampler(config: schema.Config, train_images: int) -> Sampler:
    """The sampler for `train_images` samples, which also knows the steps per epoch."""
    return Sampler(train_images, config.global_batch, config.shards, config.seed)


def make_plan(config: schema.Config, train_images: int) -> Plan:
    """The run's plan for `train_images` samples. Raises ValueError, which names the setting, and
    UnknownPlanError if the rule needs the loss."""
    plan = plan_to_follow(config, train_images)
    if isinstance(plan, OpenPlan):
        raise UnknownPlanError(
            f"sync={config.sync.rule}: rounds, volume and hours are not known before the run, "
            f"because H follows the training loss"
        )
    return plan


def plan_to_follow(config: schema.Config, train_images: int) -> AnyPlan:
    """What the trainer follows: the plan, or, if the rule needs the loss, one that is made on the
    way. Raises ValueError, which names the setting."""
    if config.global_batch > train_images:
        raise ValueError(
            f"global_batch={config.global_batch} exceeds the {train_images:,} training images: "
            f"lower global_batch, or train on more images"
        )
    steps_per_epoch = make_sampler(config, train_images).steps_per_epoch
    if config.epochs * steps_per_epoch > MOST_STEPS:
        raise ValueError(
            f"epochs={config.epochs} x {steps_per_epoch} steps exceed the limit of {MOST_STEPS:,} "
            f"steps: use fewer epochs, or a larger global_batch"
        )
    schedule = make_schedule(config.schedule, config.epochs, steps_per_epoch)
    rule = config.sync.rule_for(steps_per_epoch)
    return OpenPlan(schedule, rule) if rule.needs_loss else Plan(schedule, rule)


def make_schedule(settings: schema.ScheduleConfig, epochs: int, steps_per_epoch: int) -> Schedule:
    """The schedule over epochs * steps_per_epoch steps."""
    total, peak, final = epochs * steps_per_epoch, settings.peak_lr, settings.final_lr
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = (settings.warmup_epochs or 0) * steps_per_epoch
    if warmup >= total:
        name = "warmup_epochs" if settings.warmup_steps is None else "warmup_steps"
        raise ValueError(
            f"schedule.{name}={getattr(settings, name)}: the warm-up must be shorter than the run, "
            f"which has {total} steps in epochs={epochs}"
        )
    match settings:
        case schema.CosineConfig(stop_epoch=stop_epoch):
            stop = None if stop_epoch is None else stop_epoch * steps_per_epoch
            return CosineSchedule(peak, final, warmup, total, stop)
        case schema.LinearConfig():
            return LinearSchedule(peak, final, warmup, total)
        case schema.PowerOfTwoConfig():
            return PowerOfTwoSchedule(CosineSchedule(peak, final, warmup, total))
        case schema.StepConfig(milestone_epochs=epochs_, factor=factor):
            milestones = tuple(epoch * steps_per_epoch for epoch in epochs_)
            return StepSchedule(peak, milestones, factor, total, warmup, final)
        case schema.ConstantConfig():
            return ConstantSchedule(peak, total, warmup, final)
        case schema.OwnScheduleConfig():
            return own_schedule(
                settings.target,
                settings.load("schedule"),
                settings.options,
                peak_lr=peak,
                final_lr=final,
                warmup_steps=warmup,
                total_steps=total,
            )
    assert_never(settings)


def parameter_count(model: schema.AnyModel, classes: int) -> int:
    """Number of parameters of a network, without building it; not for timm's and your own (see
    train.models)."""
    match model.name:
        case "resnet152":
            return 58_143_808 + 2049 * classes
        case "resnet50":
            return 23_508_032 + 2049 * classes
        case "vit_b16":
            return 85_612_800 + 769 * classes
        case "vit_s16":
            return 21_573_504 + 385 * classes
        case "small_resnet":
            return 77_392 + 65 * classes
        case "small_vit":
            return 202_400 + 65 * classes
        case "timm" | "custom":
            raise ValueError(f"{model.label} must be built to count its parameters")
    assert_never(model)


def even_ranks(workers: int, most: int) -> int:
    """The largest number of ranks, at most `most`, that shares the workers evenly."""
    return next(ranks for ranks in range(most, 0, -1) if workers % ranks == 0)
