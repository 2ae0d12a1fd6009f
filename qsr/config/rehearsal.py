"""Rehearsals: any experiment scaled down to a run of minutes on two cores.

A rehearsal keeps the rule and H_base, the form of the schedule, the warm-up's fraction of the run,
alpha and other coefficients relative to the peak rate, the number of micro-batches, the optimizer,
the loss, RandAugment, and whatever else distinguishes the rows of a table. So the communication
volume is the same too, except that rounds are whole steps of a shorter run. A rehearsal proves that
the program runs; its accuracies belong to another task.

On the command line the settings of OWN and of `evaluation` are those of the small run; the others
are the experiment's, and are scaled with it.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal

from hydra.core.override_parser.types import Override
from pydantic import Field
from pydantic.dataclasses import dataclass

from qsr.config import schema
from qsr.config.planning import make_sampler

OWN = {
    "data": "rehearsal.data",
    "data.image_size": "rehearsal.image_size",
    "epochs": "rehearsal.epochs",
    "evaluation.batchnorm_micro_batches": "rehearsal.batchnorm_micro_batches",
    "precision": "rehearsal.precision",
    "workers": "rehearsal.workers",
}
"""Settings that a rehearsal replaces, and where it has its own."""

_OWN_EXECUTION = {"batch": "evaluation_batch", "every_epochs": "evaluate_every_epochs"}
"""The same for settings of `evaluation` that are no part of a run's name."""


@dataclass(frozen=True, config=schema.STRICT)
class Rehearsal:
    """How an experiment is scaled down (configs/rehearsal/*.yaml)."""

    data: str
    """Name of the data set in configs/data/."""
    image_size: schema.PositiveInt
    """Side of the images, in pixels."""
    models: dict[str, Literal["small_resnet", "small_vit"]]
    """The small counterpart of each model; one of your own is its own."""
    workers_divisor: schema.PositiveInt
    """Divides the experiment's number of workers; the result is at least two."""
    workers: schema.PositiveInt | None
    """Number of workers, instead of that; null: as above."""
    local_batch: schema.PositiveInt
    """Samples per worker and step."""
    epochs: schema.PositiveInt
    """Passes over the small data set."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Autocast type of the forward pass."""
    lr_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Factor for the peak and final rate and for the rule's coefficient. A power of two keeps the
    shape of the schedule that rounds to powers of two."""
    evaluate_every_epochs: schema.PositiveInt
    """Epochs between evaluations."""
    evaluation_batch: schema.BatchSize
    """Images per forward pass of an evaluation."""
    batchnorm_micro_batches: schema.PositiveInt
    """Micro-batches of the BatchNorm re-estimation, over all workers."""
    ranks: schema.PositiveInt
    """Processes, unless the command line gives another number."""


def for_rehearsal(parsed: Iterable[Override], *, keep: bool) -> list[str]:
    """The overrides of a rehearsal: those of OWN become settings of the rehearsal. `keep`: the
    experiment has no other source of them."""
    words = []
    for override in parsed:
        text, own = override.input_line or "", OWN.get(override.key_or_group)
        if own is None or override.is_delete():
            words.append(text)
            continue
        words.append(f"{own}={text.partition('=')[2]}")
        if keep:
            words.append(text)
    return words


def take_evaluation(settings: dict[str, Any], parsed: Iterable[Override]) -> None:
    """Change the rehearsal in `settings` to the evaluation that the command line asks for."""
    given = {override.key_or_group for override in parsed}
    for name, own in _OWN_EXECUTION.items():
        if f"evaluation.{name}" in given:
            settings["rehearsal"][own] = settings["evaluation"].get(name)


def rehearse(config: schema.Config, rehearsal: Rehearsal, data: schema.DataConfig) -> schema.Config:
    """The small counterpart of `config` on `data`.

    Raises ValueError with one line if there is none: the model has no counterpart, the number of
    micro-batches does not divide the local batch, or the size of a data set is unknown.
    """
    own = isinstance(config.model, schema.OwnModelConfig)
    if not own and config.model.name not in rehearsal.models:
        raise ValueError(
            f"no rehearsal of model={config.model.name}: rehearsal.models has only "
            f"{', '.join(rehearsal.models)}"
        )
    if config.data.train_images is None or data.train_images is None:
        raise ValueError("a rehearsal needs data.train_images, to scale the warm-up: set it")
    micro_batches = config.local_batch // config.micro_batch_size  # of all ranks of a worker
    if rehearsal.local_batch % micro_batches:
        raise ValueError(
            f"rehearsal.local_batch={rehearsal.local_batch} is not divisible by the experiment's "
            f"{micro_batches} micro-batches"
        )
    ranks = config.cluster.ranks
    if ranks is None and config.ranks_per_worker == 1:
        ranks = rehearsal.ranks
    workers = rehearsal.workers or max(2, config.workers // rehearsal.workers_divisor)
    small = replace(
        config,
        workers=workers,
        epochs=rehearsal.epochs,
        global_batch=workers * rehearsal.local_batch,
        micro_batch=rehearsal.local_batch // micro_batches,
        precision=rehearsal.precision,
        cuda_graphs=False,  # there may be no GPU
        model=config.model
        if own
        else schema.ModelConfig(rehearsal.models[config.model.name], None, channels_last=False),
        data=replace(data, image_size=rehearsal.image_size),
        evaluation=schema.EvaluationConfig(
            rehearsal.evaluate_every_epochs,
            rehearsal.evaluation_batch,
            rehearsal.batchnorm_micro_batches,
        ),
        cluster=replace(config.cluster, ranks=ranks),
    )
    steps = config.epochs * make_sampler(config, config.data.train_images).steps_per_epoch
    small_steps = small.epochs * make_sampler(small, data.train_images).steps_per_epoch
    warmup = config.schedule.warmup_steps
    if warmup is None:
        warmup = (config.schedule.warmup_epochs or 0) * (steps // config.epochs)
    return replace(
        small,
        schedule=_small_schedule(
            config.schedule,
            epochs=rehearsal.epochs / config.epochs,
            warmup_steps=round(warmup / steps * small_steps),
            lr=rehearsal.lr_factor,
        ),
        sync=config.sync.rehearsed(
            lr=rehearsal.lr_factor,
            epochs=rehearsal.epochs / config.epochs,
            steps=small_steps / steps,
        ),
        ema=_small_ema(config.ema, steps=small_steps / steps),
    )


def _small_ema(ema: schema.EmaConfig, *, steps: float) -> schema.EmaConfig:
    """Averages that reach back over the same part of a run that has `steps` as many steps."""
    if ema.decay is None:
        return ema
    return replace(ema, decay=max(ema.decay ** (1 / steps), 1e-9))


def _small_schedule(
    schedule: schema.ScheduleConfig, *, epochs: float, warmup_steps: int, lr: float
) -> schema.ScheduleConfig:
    """The schedule with rates scaled by `lr` and milestones by `epochs`."""
    small = replace(
        schedule,
        peak_lr=schedule.peak_lr * lr,
        final_lr=schedule.final_lr * lr,
        warmup_steps=warmup_steps,
        warmup_epochs=None,
    )
    match small:
        case schema.CosineConfig(stop_epoch=int(stop)):
            return replace(small, stop_epoch=round(stop * epochs))
        case schema.StepConfig(milestone_epochs=milestones):
            return replace(
                small, milestone_epochs=tuple(round(epoch * epochs) for epoch in milestones)
            )
        case _:
            return small
