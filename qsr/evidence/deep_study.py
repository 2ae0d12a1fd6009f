"""Deep networks trained with each rule at its own best rate: the runs behind
results/evidence/deep.json, and their measurements."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn import functional

from qsr.build import Stopped
from qsr.cluster.place import find_place
from qsr.config.load import load_config, run_folder
from qsr.config.schema import Config, PowerSync, QuadraticSync
from qsr.data import Batch, Request, open_data, open_loader
from qsr.data.transforms import EvalTransform
from qsr.errors import RunFailedError
from qsr.evidence.hessian import hessian_trace
from qsr.evidence.pool import process_pool
from qsr.evidence.studies import study_environment
from qsr.session import execute
from qsr.train.model_file import load_model

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class DeepStudy:
    """What is compared; each pair has an experiment evidence/MODEL_RULE."""

    models: tuple[str, ...] = ("resnet", "vit")
    rules: tuple[str, ...] = ("parallel", "constant", "linear", "quadratic")
    rate_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    """The peak rates to try for every rule, relative to the experiment's."""
    tuning_seeds: tuple[int, ...] = (101, 102)
    """Seeds of the runs that choose the rate; different from those that are reported."""
    seeds: tuple[int, ...] = tuple(range(1, 9))
    """Seeds of the runs that are reported."""
    probes: int = 64
    """Probes of the tr(Hessian) estimate."""
    settings: tuple[str, ...] = ()
    """Further settings of every run, for example epochs=5."""


AT_RATE_OF = {("vit", "parallel_recipe"): "parallel"}
"""(model, experiment) that has a rule's settings but for the paper's recipe: it is not tuned, and
takes the rate that was chosen for that rule."""


class Trial(NamedTuple):
    """One run of the study."""

    model: str
    rule: str
    rate: float
    """Peak learning rate."""
    seed: int


class Measured(NamedTuple):
    """Results of a run. Errors are in percent; losses are plain cross entropy."""

    error: float
    """On the validation images: the tuning or the test part."""
    loss: float
    volume: float
    train_error: float
    """On the training images without augmentation, as are all values below."""
    train_loss: float
    hessian_trace: float
    hessian_trace_error: float
    """Standard error of the estimate."""


Rates = Mapping[tuple[str, str], float]
"""The peak rate for each (model, rule)."""


def tuning_runs(study: DeepStudy) -> dict[Trial, Config]:
    """The runs that choose the rates, validated on images outside the test part."""
    return {
        Trial(model, rule, rate, seed): at_rate(
            model, rule, rate, (*study.settings, "data=few_digits_tuning", f"seed={seed}")
        )
        for model in study.models
        for rule in study.rules
        for factor in study.rate_factors
        for rate in [factor * peak_rate(model, rule)]
        for seed in study.tuning_seeds
    }


def reported_runs(study: DeepStudy, rates: Rates) -> dict[Trial, Config]:
    """The runs that are reported, validated on the test part."""
    return {
        Trial(model, rule, rate, seed): at_rate(
            model, rule, rate, (*study.settings, f"seed={seed}")
        )
        for (model, rule), rate in rates.items()
        for seed in study.seeds
    }


Measurements = Mapping[Trial, Measured]


@functools.cache
def peak_rate(model: str, rule: str) -> float:
    """The experiment's own peak rate."""
    return load_config([f"experiment=evidence/{model}_{rule}"]).schedule.peak_lr


def at_rate(model: str, rule: str, rate: float, settings: Sequence[str]) -> Config:
    """The experiment with another peak rate. The rule's coefficient is scaled with it, so that H at
    the peak stays the same."""
    command = [f"experiment=evidence/{model}_{rule}", "tracking.progress=false", *settings]
    config = load_config(command)
    if rate == config.schedule.peak_lr:
        return config
    command.append(f"schedule.peak_lr={rate}")
    factor = rate / config.schedule.peak_lr
    match config.sync:
        case QuadraticSync(alpha=alpha):
            command.append(f"sync.alpha={factor * alpha}")
        case PowerSync(coefficient=coefficient):
            command.append(f"sync.coefficient={factor * coefficient}")
    return load_config(command)


def side_by_side(
    function: Callable[[Task], Result], tasks: Sequence[Task], processes: int
) -> Iterator[Result]:
    """`function` of each task, in order, computed in this many processes. The first error is
    raised, and no more tasks are started."""
    with process_pool(processes, __name__) as pool:
        yield from pool.map(function, tasks)


def choose_rates(tried: Measurements) -> dict[tuple[str, str], float]:
    """For each model and rule the rate with the lowest mean error over the seeds; the mean loss
    breaks ties."""
    chosen = {}
    for model, rule in dict.fromkeys((trial.model, trial.rule) for trial in tried):
        scores: dict[float, list[tuple[float, float]]] = {}
        for trial, measured in tried.items():
            if (trial.model, trial.rule) == (model, rule):
                scores.setdefault(trial.rate, []).append((measured.error, measured.loss))
        means = {
            rate: tuple(map(statistics.fmean, zip(*of_seeds, strict=True)))
            for rate, of_seeds in scores.items()
        }
        chosen[model, rule] = min(means, key=means.__getitem__)
    return chosen


def with_recipes(rates: Rates) -> dict[tuple[str, str], float]:
    """The rates, and those of the experiments that take them over."""
    more = {
        (model, name): rates[model, rule]
        for (model, name), rule in AT_RATE_OF.items()
        if (model, rule) in rates
    }
    return {**rates, **more}


def measure(config: Config, probes: int) -> Measured:
    """Execute a run, or what is left of it, and measure its final averaged model. Raises the errors
    of `execute`, and RunFailedError if a signal stopped the run."""
    (outcome,) = execute([config])
    if isinstance(outcome, Stopped):
        raise RunFailedError(f"stopped by {outcome.reason}; run the same command to resume")
    assert isinstance(outcome, dict)  # a single run that fails raises
    torch.set_num_threads(1)  # other runs execute at the same time
    batch = _training_images(config)
    model = load_model(run_folder(config)).module
    trace = hessian_trace(model, batch.images, batch.labels, probes=probes, seed=config.seed)
    with torch.no_grad():
        logits = model(batch.images)  # in evaluation mode, as hessian_trace leaves it
    return Measured(
        error=100.0 - outcome["top1"],
        loss=outcome["val_loss"],
        volume=outcome["volume"],
        train_error=100.0 * float((logits.argmax(1) != batch.labels).double().mean()),
        train_loss=float(functional.cross_entropy(logits, batch.labels)),
        hessian_trace=trace.mean,
        hessian_trace_error=trace.standard_error,
    )


def _training_images(config: Config) -> Batch:
    """All training images, preprocessed like validation images."""
    images, _ = open_data(config.data)
    transform = EvalTransform.of(config.data)
    loader = open_loader(
        config.data,
        images,
        transform,
        batch_size=len(images),
        device=torch.device("cpu"),
        cores=find_place().cores,
    )
    try:
        return next(loader.batches([Request(range(len(images)), 0)]))
    finally:
        loader.close()


def deep_record(
    study: DeepStudy, tried: Measurements, rates: Rates, reported: Measurements
) -> dict[str, Any]:
    """results/evidence/deep.json: every value of every run."""

    def runs(measurements: Measurements, model: str, rule: str) -> list[dict[str, float]]:
        return [
            {"rate": trial.rate, "seed": trial.seed, **measured._asdict()}
            for trial, measured in measurements.items()
            if (trial.model, trial.rule) == (model, rule)
        ]

    rows = [
        {
            "model": model,
            "rule": rule,
            "rate": rate,
            "tuning": runs(tried, model, rule),
            "test": runs(reported, model, rule),
        }
        for (model, rule), rate in rates.items()
    ]
    return {
        "environment": study_environment(),
        "study": dataclasses.asdict(study),
        "rows": rows,
    }
