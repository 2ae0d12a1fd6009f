"""Settings of scripts/simulate.py: a small problem, and the rules to compare on it."""

from collections.abc import Sequence
from dataclasses import replace
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
from qsr.core.plan import Plan
from qsr.core.rules import ConstantRule, EveryStepRule, PowerRule, QuadraticRule, Rule
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
class ExponentConfig:
    """A rule H = max(h_base, floor((coefficient / lr)^exponent)), matched at the peak: all rules
    with the same h_base begin with rounds of h_base steps."""

    exponent: NonNegative | None
    """0: constant H. 1: H ~ 1 / lr. 2: QSR. null: data parallel training."""
    h_base: PositiveInt | None = None
    """Shortest round; null: the simulation's h_base."""
    scale: Positive = 1.0
    """Factor of the coefficient; with 1, (coefficient / peak_lr)^exponent is h_base."""


@dataclass(frozen=True, config=STRICT)
class SimulationConfig:
    """One problem, and the rules to compare on it with everything else equal."""

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
    rules: dict[str, ExponentConfig]
    """The rules, by their names in tables; the others are compared with the first."""


def load_simulation(overrides: Sequence[str], more: Sequence[Path] = ()) -> SimulationConfig:
    """Settings from configs/simulation/, the folders in `more`, and the command line. Raises
    ConfigError."""
    settings = compose_settings(parse_overrides(overrides), [SIMULATIONS, *more], "simulate")
    config = parse(SimulationConfig, settings)
    try:
        for rule in config.rules.values():
            make_simulated_plan(config, rule)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not config.rules:
        raise ConfigError("rules={}: name at least one")
    return config


def simulation_names() -> list[str]:
    """Names of all experiments."""
    return sorted(path.stem for path in (SIMULATIONS / "experiment").glob("*.yaml"))


def make_simulated_plan(config: SimulationConfig, settings: ExponentConfig) -> Plan:
    """The plan of one of the rules. Raises ValueError, which names the setting."""
    h_base = config.h_base if settings.h_base is None else settings.h_base
    rule = _make_rule(replace(settings, h_base=h_base), config.peak_lr)
    return Plan(_make_schedule(config), rule)


def _make_schedule(config: SimulationConfig) -> Schedule:
    final = config.final_fraction * config.peak_lr
    if config.schedule == "cosine":
        return CosineSchedule(config.peak_lr, final, 0, config.total_steps)
    return ExponentialSchedule(config.peak_lr, final, config.total_steps)


def _make_rule(settings: ExponentConfig, peak_lr: float) -> Rule:
    exponent, h_base = settings.exponent, settings.h_base
    assert h_base is not None
    if exponent is None:
        return EveryStepRule()
    if exponent == 0:
        return ConstantRule(h_base)
    coefficient = settings.scale * h_base ** (1 / exponent) * peak_lr
    if exponent == 2:
        return QuadraticRule(h_base, coefficient)
    return PowerRule(h_base, coefficient, exponent)
