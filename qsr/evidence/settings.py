"""Settings of scripts/simulate.py: a small problem, and the arms to compare on it."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from qsr.config.compose import compose_settings
from qsr.config.overrides import parse_overrides
from qsr.config.parsing import parse
from qsr.config.places import CONFIG_DIR
from qsr.config.planning import MOST_STEPS
from qsr.config.schema import STRICT, Finite, Fraction, NonNegative, Positive, PositiveInt
from qsr.core.adaptive import AdaptiveRule
from qsr.core.open_plan import AnyPlan, OpenPlan
from qsr.core.plan import Plan
from qsr.core.rules import (
    ConstantRule,
    EveryStepRule,
    GrowingRule,
    PowerRule,
    QuadraticRule,
    Rule,
    StagewiseRule,
)
from qsr.core.schedules import CosineSchedule, ExponentialSchedule, Schedule
from qsr.errors import ConfigError

SIMULATIONS = CONFIG_DIR / "simulation"


@dataclass(frozen=True, config=STRICT)
class DigitsMlpConfig:
    """A two-layer network on handwritten digits, qsr.evidence.problems.DigitsMlp."""

    kind: Literal["digits_mlp"]
    """Kind of problem."""
    train_size: Annotated[int, Field(ge=20, le=1700)]
    """Training images, at least the 20 components; the rest of the 1,797 are for testing."""
    split_seed: Annotated[int, Field(ge=0)]
    """Seed of the choice of these images, the same for all seeds."""
    activation: Literal["tanh", "relu"]
    """Activation of the hidden units."""
    tuning_images: Annotated[int, Field(ge=0)] = 0
    """Number of the test images that measure tuning_error, and not test_error."""


@dataclass(frozen=True, config=STRICT)
class DiagonalConfig:
    """A diagonal linear network, qsr.evidence.problems.DiagonalNetwork."""

    kind: Literal["diagonal"]
    """Kind of problem."""
    train_size: PositiveInt
    """Training samples."""
    weights: PositiveInt
    """Number of inputs, d."""
    truth: tuple[Finite, ...]
    """The first of the true weights; the others are 0."""


@dataclass(frozen=True, config=STRICT)
class TimeAverageConfig:
    """The model is an average over the steps of a run; exactly one of both is set."""

    ema: Fraction | None = None
    """Decay per step of an exponential moving average."""
    last: Fraction | None = None
    """Last part of the steps over which the average is uniform."""


@dataclass(frozen=True, config=STRICT)
class OuterConfig:
    """An outer optimizer (DiLoCo): SGD with Nesterov momentum on the workers' mean at the end of
    every round, whose gradient is the negative of what the round changed."""

    lr: Positive
    """Its learning rate."""
    momentum: Annotated[float, Field(gt=0, lt=1)]
    """Its momentum."""


@dataclass(frozen=True, config=STRICT)
class SameTimeConfig:
    """As many steps as fit into the time of another arm: steps + averages x allreduce_steps."""

    arm: str
    """The other arm."""
    allreduce_steps: NonNegative
    """Time of an all-reduce, in steps."""


@dataclass(frozen=True, config=STRICT)
class ArmConfig:
    """A rule, and all in which its arm differs from the others. The power rule is H = max(h_base,
    floor((coefficient / lr)^exponent)), matched at the peak: all power rules with the same h_base
    begin with rounds of h_base steps."""

    rule: Literal["power", "growing", "stagewise", "adaptive"] = "power"
    """power, growing (H grows linearly with the round), stagewise (H doubles when the rate has
    halved), or adaptive (H grows with the square root of loss / rate: AdaComm)."""
    exponent: NonNegative | None = None
    """Of the power rule. 0: constant H. 1: H ~ 1 / lr. 2: QSR. null: data parallel training."""
    h_base: PositiveInt | None = None
    """Shortest round; null: the simulation's h_base."""
    scale: Positive = 1.0
    """Factor of the coefficient; with 1, (coefficient / peak_lr)^exponent is h_base."""
    growth: Positive | None = None
    """Of the growing rule: steps that H grows in a round."""
    peak_lr: Positive | None = None
    """Learning rate of the first step; null: the simulation's."""
    final_fraction: Fraction | None = None
    """Final learning rate / peak learning rate; null: the simulation's."""
    same_time: SameTimeConfig | None = None
    """Another number of steps than the simulation's."""
    average: TimeAverageConfig | None = None
    """What is measured; null: the model after the last step."""
    outer: OuterConfig | None = None
    """An outer optimizer; null: the workers' mean is the model."""


@dataclass(frozen=True, config=STRICT)
class TuningConfig:
    """Every arm's peak rate is chosen on other seeds, and on other images if the problem has them
    (tuning_images)."""

    factors: tuple[Positive, ...]
    """The peak rates to try, relative to the arm's peak_lr: from the lowest up, until all seeds
    diverge."""
    seeds: PositiveInt
    """Number of seeds of each try; they are 101 and the following."""


@dataclass(frozen=True, config=STRICT)
class SimulationConfig:
    """One problem, and the arms to compare on it with everything else equal."""

    problem: Annotated[DigitsMlpConfig | DiagonalConfig, Field(discriminator="kind")]
    """The problem."""
    workers: PositiveInt
    """Number of workers, K."""
    local_batch: PositiveInt
    """Samples per worker and step, drawn with replacement."""
    label_noise: NonNegative
    """Standard deviation of the noise on every target, drawn anew in every step."""
    schedule: Literal["exponential", "cosine"]
    """Decay of the learning rate."""
    peak_lr: Positive
    """Learning rate of the first step."""
    final_fraction: Fraction
    """Final learning rate / peak learning rate."""
    total_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    """Steps of every worker."""
    h_base: PositiveInt
    """Shortest round of the rules that do not set their own."""
    seeds: PositiveInt
    """Number of seeds; they are 1 to this."""
    rules: dict[str, ArmConfig]
    """The arms, by their names in tables; the others are compared with the first."""
    tuning: TuningConfig | None = None
    """The choice of every arm's peak rate; null: rates are as given."""


def load_simulation(overrides: Sequence[str], more: Sequence[Path] = ()) -> SimulationConfig:
    """Settings from configs/simulation/, the folders in `more`, and the command line. Raises
    ConfigError."""
    settings = compose_settings(parse_overrides(overrides), [SIMULATIONS, *more], "simulate")
    config = parse(SimulationConfig, settings)
    try:
        for arm in config.rules.values():
            _check(arm)
            make_simulated_plan(config, arm)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not config.rules:
        raise ConfigError("rules={}: name at least one")
    return config


def _check(arm: ArmConfig) -> None:
    if (arm.rule == "growing") != (arm.growth is not None):
        raise ValueError("growth belongs to rule: growing, and that needs it")
    if arm.rule != "power" and arm.exponent is not None:
        raise ValueError(f"exponent belongs to rule: power, not to {arm.rule}")
    if arm.average is not None and (arm.average.ema is None) == (arm.average.last is None):
        raise ValueError("average: set one of ema and last")


def simulation_names() -> list[str]:
    """Names of all experiments."""
    return sorted(path.stem for path in (SIMULATIONS / "experiment").glob("*.yaml"))


def make_simulated_plan(config: SimulationConfig, arm: ArmConfig) -> AnyPlan:
    """The plan of one of the arms. Raises ValueError, which names the setting."""
    if arm.same_time is None:
        return _plan(config, arm, config.total_steps)
    if arm.same_time.arm not in config.rules:
        raise ValueError(f"same_time.arm={arm.same_time.arm} is not one of the rules")
    other = make_simulated_plan(config, config.rules[arm.same_time.arm])
    if isinstance(other, OpenPlan):
        raise ValueError(f"same_time.arm={arm.same_time.arm}: its rounds are not known before it")
    allreduce = arm.same_time.allreduce_steps
    budget = time_in_steps(other, allreduce)

    def time_of(steps: int) -> float:
        plan = _plan(config, arm, steps)
        if isinstance(plan, OpenPlan):
            raise ValueError("same_time: not for rule: adaptive, whose rounds are not known")
        return time_in_steps(plan, allreduce)

    return _plan(config, arm, bisect_right(range(1, int(budget) + 1), budget, key=time_of))


def time_in_steps(plan: Plan, allreduce_steps: float) -> float:
    """Time of a run whose averages take this many steps each."""
    return plan.total_steps + plan.num_rounds * allreduce_steps


def _plan(config: SimulationConfig, arm: ArmConfig, total_steps: int) -> AnyPlan:
    peak_lr = config.peak_lr if arm.peak_lr is None else arm.peak_lr
    share = config.final_fraction if arm.final_fraction is None else arm.final_fraction
    h_base = config.h_base if arm.h_base is None else arm.h_base
    schedule: Schedule = (
        CosineSchedule(peak_lr, share * peak_lr, 0, total_steps)
        if config.schedule == "cosine"
        else ExponentialSchedule(peak_lr, share * peak_lr, total_steps)
    )
    rule = _make_rule(arm, h_base, peak_lr)
    return OpenPlan(schedule, rule) if rule.needs_loss else Plan(schedule, rule)


def _make_rule(arm: ArmConfig, h_base: int, peak_lr: float) -> Rule:
    match arm.rule, arm.exponent:
        case "growing", _:
            assert arm.growth is not None
            return GrowingRule(h_base, arm.growth)
        case "stagewise", _:
            return StagewiseRule(h_base)
        case "adaptive", _:
            return AdaptiveRule(h_base)
        case _, None:
            return EveryStepRule()
        case _, 0:
            return ConstantRule(h_base)
        case _, exponent:
            coefficient = arm.scale * h_base ** (1 / exponent) * peak_lr
            if exponent == 2:
                return QuadraticRule(h_base, coefficient)
            return PowerRule(h_base, coefficient, exponent)
