"""Config -> forecast: what a run would take, beside data parallel training and constant H."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qsr.config import schema
from qsr.config.load import GIVEN
from qsr.config.planning import make_plan, make_sampler, parameter_count
from qsr.core.cost import CostModel, RunCost, averaged_bytes, ring_bytes
from qsr.core.plan import Plan
from qsr.core.rules import ConstantRule, EveryStepRule
from qsr.errors import ConfigError, UnknownSpeedError
from qsr.planner.cost_model import (
    make_cost_model,
    moment_bytes,
    overlaps,
    parameter_bytes,
    speed_key,
)

PRICE = "price_per_gpu_hour"
UNVERIFIED_NOTE = "?: this number depends on an unverified constant, see the sources"


def is_unverified(source: str) -> bool:
    """Whether results that depend on a constant from this source must be marked."""
    return source.startswith("unverified")


class Source(NamedTuple):
    """A constant of the speed profile that a forecast uses, and where it comes from."""

    name: str
    value: float
    text: str


@dataclass(frozen=True)
class Method:
    """One way to train for the run's steps."""

    label: str
    plan: Plan
    overlapped: bool | None
    """Whether DDP overlaps gradient averages; None: there are none, or no times."""
    planned: bool
    """Whether this is the run itself, as the trainer would execute it."""
    bytes_sent_per_worker: int
    """For ring all-reduces with one worker per machine, as in a run's summary."""
    bytes_per_link: int | None
    """Over the link of each machine, per direction; None: the machines are not known."""
    cost: RunCost | None
    fitted_hours: float | None
    """The published time of this run, if the speed profile was fitted to it."""


@dataclass(frozen=True)
class Forecast:
    """Forecast of a run. Times are None without a speed profile that fits the run."""

    config: schema.Config
    plan: Plan
    steps_per_epoch: int
    parameters: int
    methods: tuple[Method, ...]
    sources: tuple[Source, ...]
    model: CostModel | None
    why_no_times: str
    """Why the profile gives none and how to fix it; empty if nothing."""

    @property
    def planned(self) -> Method:
        """The run itself."""
        return next(method for method in self.methods if method.planned)

    def by_volume(self) -> list[Method]:
        """The methods, in order of decreasing communication."""
        return sorted(self.methods, key=lambda m: (-m.plan.num_rounds, m.overlapped is True))

    def data_parallel(self, *, overlapped: bool) -> Method:
        """Data parallel training for the same steps. Only if there are times."""
        return next(
            method
            for method in self.methods
            if method.plan.gradient_rounds == self.plan.total_steps
            and method.overlapped is overlapped
        )

    def plans(self) -> dict[str, Plan]:
        """The plans of the run and of the constant H beside it, by method."""
        return {
            method.label: method.plan
            for method in self.methods
            if method.planned or not method.plan.gradient_rounds
        }

    def speedup(self, *, overlapped: bool) -> float | None:
        """Time of data parallel training / time of the run; None without times."""
        if self.planned.cost is None:
            return None
        reference = self.data_parallel(overlapped=overlapped).cost
        assert reference is not None  # all methods have times, or none
        return reference.total_seconds / self.planned.cost.total_seconds

    def unverified(self, method: Method) -> frozenset[str]:
        """Which of the method's numbers ("compute", "communication", "total") depend on an
        unverified constant."""
        if method.cost is None:
            return frozenset()
        return unverified_times(self.config, overlapped=bool(method.overlapped))

    def notes(self) -> list[str]:
        """What a reader must know about the times."""
        if self.model is None:
            return [self.why_no_times]
        speed, allreduce = self.config.speed, self.model.allreduce
        assert speed is not None
        notes = []
        if any(method.fitted_hours for method in self.methods):
            notes.append(
                "fitted: the profile was fitted to this time, so it proves nothing that they agree"
            )
        if any(self.unverified(method) for method in self.methods):
            notes.append(UNVERIFIED_NOTE)
        if allreduce.ranks > 1 and self.model.overlapped_step_seconds is None:
            notes.append(
                "overlapped: assumes that hidden all-reduces do not slow down the backward pass"
            )
        if allreduce.ranks < self.config.shards and self.config.cluster.overlap_gradients:
            notes.append("a rank holds several workers here, so qsr train does not overlap")
        if allreduce.machines == 1 < speed.machines and allreduce.ranks > 1:
            notes.append(
                "the run fits on one machine, whose internal links are not in the profile: "
                "communication is an upper bound, at the speed of the link between machines"
            )
        if self.model.parts is not None:
            notes.append(
                "compute: local steps with their averages of gradients among the ranks of a worker"
            )
        return notes


def forecast(config: schema.Config, parameters: int | None = None) -> Forecast:
    """The forecast of a run. `parameters` of the network are needed only for timm's networks.

    Raises ConfigError if the number of training images or of classes is not known.
    """
    images = known_images(config)
    if parameters is None:
        parameters = parameter_count(config.model, known_classes(config))
    plan = make_plan(config, images)
    try:
        model, why_no_times = make_cost_model(config, parameters), ""
    except UnknownSpeedError as error:
        model, why_no_times = None, str(error)
    return Forecast(
        config=config,
        plan=plan,
        steps_per_epoch=make_sampler(config, images).steps_per_epoch,
        parameters=parameters,
        methods=tuple(_methods(config, plan, parameters, model)),
        sources=sources_of(config) if model else (),
        model=model,
        why_no_times=why_no_times,
    )


def unverified_times(config: schema.Config, *, overlapped: bool) -> frozenset[str]:
    """Which times ("compute", "communication", "total") of a run with a speed profile that fits it
    depend on an unverified constant. `overlapped`: DDP's averages of gradients."""
    key = speed_key(config)
    names = {s.name for s in _of_times(sources_of(config)) if is_unverified(s.text)}
    found = set()
    if key in names:
        found.add("compute")
    # what DDP hides depends on the backward pass's time
    if names - {key} or (key in names and overlapped):
        found.add("communication")
    return frozenset(found | {"total"}) if found else frozenset()


def known_images(config: schema.Config) -> int:
    """Number of training images. Raises ConfigError if the settings do not say it."""
    if config.data.train_images is None:
        raise ConfigError(
            f"data={config.data.name}: a plan needs the number of training images; set "
            f"data.train_images=N"
        )
    return config.data.train_images


def known_classes(config: schema.Config) -> int:
    """Number of classes. Raises ConfigError if the settings do not say it."""
    if config.data.classes is None:
        raise ConfigError(
            f"data={config.data.name}: the size of the network depends on the number of classes; "
            f"set data.classes=N"
        )
    return config.data.classes


def _methods(
    config: schema.Config, plan: Plan, parameters: int, model: CostModel | None
) -> Iterator[Method]:
    schedule, label = plan.schedule, config.sync.label
    overlapping = model is not None and overlaps(config, plan, model.allreduce.ranks)
    plain = Plan(schedule, EveryStepRule("gradients"))
    wanted = [(label, plan, True), ("data parallel", plain, False)]
    if plan.gradient_rounds == plan.total_steps:
        wanted = [(label, plain, True)]
    h = config.sync.smallest_h
    if h is not None and not isinstance(plan.rule, EveryStepRule | ConstantRule):
        wanted.append((f"constant H = {h}", Plan(schedule, ConstantRule(h)), False))
    for name, its_plan, planned in wanted:
        if not its_plan.gradient_rounds or model is None:
            yield _method(config, name, its_plan, None, planned, parameters, model)
            continue
        for overlapped, how in ((False, "blocking"), (True, "overlapped")):
            itself = planned and overlapped is overlapping
            its_name = f"{name}, {how}"
            yield _method(config, its_name, its_plan, overlapped, itself, parameters, model)


def _method(
    config: schema.Config,
    label: str,
    plan: Plan,
    overlapped: bool | None,
    planned: bool,
    parameters: int,
    model: CostModel | None,
) -> Method:
    moments = moment_bytes(config.sync, parameters)
    given = averaged_bytes(plan, parameter_bytes(parameters), moments)
    return Method(
        label=label,
        plan=plan,
        overlapped=overlapped,
        planned=planned,
        bytes_sent_per_worker=round(ring_bytes(config.workers, given)),
        bytes_per_link=None if model is None else round(model.bytes_per_link(plan)),
        cost=model.run(plan, overlapped=bool(overlapped)) if model else None,
        fitted_hours=None
        if model is None or overlapped
        else fitted_hours(config, model, plan.total_steps, plan.num_rounds),
    )


def fitted_hours(
    config: schema.Config, model: CostModel, steps: int, averages: int
) -> float | None:
    """The published time of a run with so many averages, if the profile was fitted to it."""
    sources = sources_of(config)
    if (
        model.moment_bytes
        or model.parts is not None
        or any(source.text == GIVEN for source in _of_times(sources))
    ):
        return None
    assert config.speed is not None
    for run in config.speed.fitted_to:
        if (run.model, run.ranks, run.global_batch, run.steps, run.averages) == (
            speed_key(config),
            model.allreduce.ranks,
            config.global_batch,
            steps,
            averages,
        ):
            return run.hours
    return None


def sources_of(config: schema.Config) -> tuple[Source, ...]:
    """The constants that the times of a run with a speed profile that fits it come from."""
    speed, key = config.speed, speed_key(config)
    assert speed is not None
    values = {
        "link_gbit_per_second": speed.link_gbit_per_second,
        "latency_seconds": speed.latency_seconds,
        "inside_gbit_per_second": speed.inside_gbit_per_second
        if config.ranks_per_worker > 1
        else None,
        key: speed.seconds_per_image[key],
        PRICE: speed.price_per_gpu_hour,
    }
    return tuple(
        Source(name, value, speed.sources.get(name, "not given"))
        for name, value in values.items()
        if value is not None
    )


def _of_times(sources: Sequence[Source]) -> list[Source]:
    return [source for source in sources if source.name != PRICE]
