"""Local SGD as one tensor program: against a plain loop, its controls, and the order of the rules
at small size."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qsr.core.adaptive import AdaptiveRule
from qsr.core.open_plan import OpenPlan
from qsr.core.plan import Plan
from qsr.core.rules import ConstantRule, EveryStepRule, QuadraticRule, Rule
from qsr.core.schedules import ConstantSchedule, ExponentialSchedule
from qsr.core.seeds import seed_for
from qsr.evidence.arms import simulate_arm
from qsr.evidence.problems import DiagonalNetwork, Parameters
from qsr.evidence.settings import (
    ArmConfig,
    OuterConfig,
    SimulationConfig,
    load_simulation,
    make_simulated_plan,
)
from qsr.evidence.simulation import LastAverage, MovingAverage, Outcome, join, simulate

SCHEDULE = ExponentialSchedule(0.02, 0.002, 30)
RULES: dict[str, Rule] = {
    "data parallel": EveryStepRule(),
    "every step": EveryStepRule("parameters"),
    "constant": ConstantRule(4),
    "QSR": QuadraticRule(2, 0.02),
}


def problem(seeds: tuple[int, ...]) -> DiagonalNetwork:
    return DiagonalNetwork(seeds, train_size=8, weights=12, truth=(1.0, 1.0))


def run(rule: Rule | OpenPlan, seeds: tuple[int, ...], workers: int, noise: float = 0.5) -> Outcome:
    plan = Plan(SCHEDULE, rule) if isinstance(rule, Rule) else rule
    return simulate(problem(seeds), plan, seeds, workers=workers, local_batch=2, label_noise=noise)


@pytest.mark.parametrize("name", RULES)
def test_it_is_local_sgd(name: str) -> None:
    """In numpy, one worker after the other, with derivatives by hand."""
    seed, workers, plan = 5, 3, Plan(SCHEDULE, RULES[name])
    network = problem((seed,))
    inputs, targets = network._inputs[0].numpy(), network._targets[0].numpy()
    generator = torch.Generator().manual_seed(seed_for(seed, "simulation"))
    shape = (200, workers, 2)  # as many steps are drawn at once
    samples = torch.randint(8, shape, generator=generator).numpy()
    noise = 0.5 * torch.randn(*shape, 1, generator=generator)[..., 0].numpy()
    u, v = (np.repeat(each.numpy(), workers, axis=0) for each in network.start())
    for round_ in plan.rounds():
        for step in range(round_.start, round_.end):
            gradients = []
            for worker in range(workers):
                x = inputs[samples[step, worker]]
                weights = u[worker] ** 2 - v[worker] ** 2
                residuals = x @ weights - targets[samples[step, worker]] - noise[step, worker]
                by_weight = residuals @ x / 2
                gradients.append((2 * u[worker] * by_weight, -2 * v[worker] * by_weight))
            by_u, by_v = (np.stack(each) for each in zip(*gradients, strict=True))
            if round_.averages == "gradients":
                by_u[:], by_v[:] = by_u.mean(0), by_v.mean(0)
            u -= plan.schedule(step) * by_u
            v -= plan.schedule(step) * by_v
        if round_.averages == "parameters":
            u[:], v[:] = u.mean(0), v.mean(0)
    expected = network.measure([torch.from_numpy(u[:1]), torch.from_numpy(v[:1])])
    found = run(RULES[name], (seed,), workers)
    assert found.volume == plan.volume
    assert found.diverged == [False]
    for quantity, values in expected.items():
        assert found.measured[quantity] == pytest.approx(values.tolist(), rel=1e-4), quantity


def test_one_worker_is_the_same_run_under_every_rule() -> None:
    first, *others = (run(rule, (1, 2), workers=1).measured for rule in RULES.values())
    assert others == [first] * 3


def test_averages_in_every_step_are_data_parallel_training() -> None:
    gradients, parameters = (run(RULES[n], (1, 2), 4) for n in ("data parallel", "every step"))
    for quantity, values in gradients.measured.items():
        assert parameters.measured[quantity] == pytest.approx(values, rel=1e-4)


def test_a_seeds_run_does_not_depend_on_the_others() -> None:
    together, alone = run(RULES["QSR"], (1, 2), 4), run(RULES["QSR"], (2,), 4)
    for quantity, values in alone.measured.items():
        assert together.measured[quantity][1] == pytest.approx(values[0], rel=1e-5)


def test_runs_that_diverge_are_told_apart() -> None:
    plan = Plan(ExponentialSchedule(5.0, 5.0, 30), ConstantRule(4))
    found = simulate(problem((1, 2)), plan, (1, 2), workers=2, local_batch=2, label_noise=0.5)
    assert found.diverged == [True, True]


class Weights(DiagonalNetwork):
    """Measures the parameters too, as lists."""

    def measure(self, parameters: Parameters) -> dict[str, torch.Tensor]:
        return super().measure(parameters) | {"weights": torch.cat([*parameters], dim=-1)}


def weights(rule: Rule, steps: int, **options: Any) -> np.ndarray:
    """The parameters [2 seeds, 24] after so many steps at a constant rate."""
    seeds = (1, 2)
    network = Weights(seeds, train_size=8, weights=12, truth=(1.0, 1.0))
    if steps == 0:
        return torch.cat(network.start(), dim=-1).numpy()
    plan = Plan(ConstantSchedule(0.02, steps), rule)
    found = simulate(network, plan, seeds, workers=3, local_batch=2, label_noise=0.5, **options)
    return np.array(found.measured["weights"])


@pytest.mark.parametrize("name", ["data parallel", "constant"])
def test_averages_over_the_steps_are_of_the_workers_mean(name: str) -> None:
    """A run that ends after a step, with an average of the workers, shows their mean there."""
    steps = 6
    models = [weights(RULES[name], count) for count in range(steps + 1)]
    moving = models[0]
    for model in models[1:]:
        moving = 0.7 * moving + 0.3 * model
    found = weights(RULES[name], steps, average=MovingAverage(0.7))
    assert found == pytest.approx(moving, rel=1e-5)
    assert found != pytest.approx(models[-1], rel=1e-3)
    found = weights(RULES[name], steps, average=LastAverage(0.5))
    assert found == pytest.approx(np.mean(models[4:], axis=0), rel=1e-5)


def test_an_outer_optimizer_of_rate_1_without_momentum_changes_nothing() -> None:
    plain = weights(RULES["constant"], 12)
    found = weights(RULES["constant"], 12, outer=OuterConfig(lr=1.0, momentum=1e-9))
    assert found == pytest.approx(plain, rel=1e-5)


def test_an_outer_optimizer_goes_further_along_what_a_round_changed() -> None:
    """Nesterov's first step is lr (1 + momentum) times the change."""
    start, end = (weights(RULES["constant"], count) for count in (0, 4))
    found = weights(RULES["constant"], 4, outer=OuterConfig(lr=0.7, momentum=0.9))
    assert found == pytest.approx(start + 0.7 * 1.9 * (end - start), rel=1e-4)


def test_a_run_whose_rounds_follow_the_loss() -> None:
    """Noise is all of the loss here, so that H = 2 grows nearly as under a loss that stays."""
    noisy, quiet, still = (OpenPlan(SCHEDULE, AdaptiveRule(2)) for _ in range(3))
    found = run(noisy, (1,), workers=4, noise=5.0)
    for _ in still.rounds():
        still.observe(1.0)
    assert found.volume == pytest.approx(len(still.losses) / 30, abs=0.05)
    # without noise the loss falls, so that rounds stay short
    assert run(quiet, (1,), workers=4, noise=0.0).volume > found.volume
    assert found.volume == len(noisy.losses) / 30
    assert noisy.losses[0] > 10 * quiet.losses[-1]


def test_seeds_are_joined_in_order() -> None:
    together = run(RULES["QSR"], (1, 2), workers=4)
    joined = join([run(RULES["QSR"], (seed,), workers=4) for seed in (1, 2)])
    assert (joined.volume, joined.steps, joined.peak_lr) == (together.volume, 30, 0.02)
    for quantity, values in together.measured.items():
        assert joined.measured[quantity] == pytest.approx(values, rel=1e-5)


def small(**changes: object) -> SimulationConfig:
    """The digits with fewer seeds and steps, but where the rules differ by most."""
    config = load_simulation(["experiment=digits_mlp", "seeds=4", "total_steps=2000"])
    return replace(config, **changes)  # type: ignore[arg-type]


def means(config: SimulationConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Of tr(Hessian) and of the test error over the seeds, by rule."""
    outcomes = {
        name: simulate_arm(config, name).outcome for name in config.rules if name != "cubic"
    }
    assert not any(any(outcome.diverged) for outcome in outcomes.values())
    trace, test = (
        {name: float(np.mean(outcome.measured[quantity])) for name, outcome in outcomes.items()}
        for quantity in ("hessian_trace", "test_error")
    )
    return trace, test


@pytest.mark.slow
def test_the_order_of_the_rules_and_its_controls() -> None:
    """experiment=digits_mlp at small size: four fixed seeds, a quarter of the steps. Without label
    noise, or with one worker, there is no order."""
    pytest.importorskip("sklearn")
    trace, test = means(small())
    order = ["data parallel", "constant H", "beta/eta", "QSR"]
    assert sorted(trace, key=lambda name: -trace[name]) == order
    assert trace["QSR"] < 0.75 * trace["data parallel"]
    assert test["QSR"] < test["constant H"] < test["data parallel"]
    silent, _ = means(small(label_noise=0.0, total_steps=500))
    assert max(silent.values()) < 1.02 * min(silent.values())
    alone, _ = means(small(workers=1, local_batch=32, total_steps=500))
    assert len(set(alone.values())) == 1


def test_rules_are_matched_at_the_peak() -> None:
    config = load_simulation(["experiment=digits_mlp"])
    assert config.rules["QSR"] == ArmConfig(exponent=2)
    found = {name: make_simulated_plan(config, rule) for name, rule in config.rules.items()}
    assert {name: plan.round_at(0).length for name, plan in found.items()} == {
        "QSR": 4, "data parallel": 1, "constant H": 4, "beta/eta": 4, "cubic": 4,
    }  # fmt: skip
    assert found["QSR"].rule == QuadraticRule(4, 0.68)
