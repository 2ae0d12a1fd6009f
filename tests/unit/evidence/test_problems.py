"""Small problems: their gradients and Hessians against torch's, their data against their word."""

import pytest
import torch
from torch import Tensor

from qsr.evidence.problems import DiagonalNetwork, DigitsMlp, Problem

SEEDS = (1, 2)


@pytest.fixture(scope="module")
def digits() -> DigitsMlp:
    pytest.importorskip("sklearn")
    return DigitsMlp(SEEDS, train_size=80, split_seed=0)


@pytest.fixture(scope="module")
def relu() -> DigitsMlp:
    pytest.importorskip("sklearn")
    return DigitsMlp(SEEDS, train_size=80, split_seed=0, activation="relu")


@pytest.fixture(scope="module")
def diagonal() -> DiagonalNetwork:
    return DiagonalNetwork(SEEDS, train_size=6, weights=10, truth=(1.0, 1.0))


def training_loss(problem: Problem, parameters: list[Tensor], seed: int) -> Tensor:
    """Noise-free, of all training samples, of one seed's model as its only worker's."""
    count = len(SEEDS)
    samples = torch.arange(problem.train_size).expand(count, 1, -1)
    noise = torch.zeros(count, 1, problem.train_size, problem.outputs)
    return problem.losses([p.unsqueeze(1) for p in parameters], samples, noise)[seed, 0]


def exact_trace(problem: Problem, parameters: list[Tensor], seed: int) -> float:
    """From torch's whole Hessian by one seed's parameters."""
    trace = 0.0
    for number, own in enumerate(parameters):

        def loss(flat: Tensor, number: int = number, own: Tensor = own) -> Tensor:
            changed = list(parameters)
            rows = [own[0], own[1]]
            rows[seed] = flat.view_as(own[seed])
            changed[number] = torch.stack(rows)
            return training_loss(problem, changed, seed)

        hessian = torch.autograd.functional.hessian(loss, own[seed].flatten())
        trace += float(torch.as_tensor(hessian).trace())
    return trace


@pytest.mark.parametrize("name", ["digits", "relu", "diagonal"])
def test_the_trace_of_the_hessian_is_exact(name: str, request: pytest.FixtureRequest) -> None:
    problem: Problem = request.getfixturevalue(name)
    generator = torch.Generator().manual_seed(3)
    # away from the minimum, where residuals count too
    parameters = [p + 0.1 * torch.randn(p.shape, generator=generator) for p in problem.start()]
    measured = problem.measure(parameters)
    for seed in range(len(SEEDS)):
        loss = training_loss(problem, parameters, seed)
        assert float(measured["train_loss"][seed]) == pytest.approx(float(loss), rel=1e-5)
        trace = exact_trace(problem, parameters, seed)
        assert float(measured["hessian_trace"][seed]) == pytest.approx(trace, rel=1e-4)


def test_the_digits_start_where_all_training_images_are_fitted(digits: DigitsMlp) -> None:
    measured = digits.measure(digits.start())
    assert measured["train_error"].tolist() == [0.0, 0.0]
    assert 15 < float(measured["test_error"].mean()) < 40  # of 1,717 others; by chance: 90


def test_noise_is_added_to_the_targets(digits: DigitsMlp) -> None:
    """Half the squared error, summed over the outputs: at a fit, half the noise's square."""
    start = [p.unsqueeze(1) for p in digits.start()]
    samples = torch.arange(4).expand(2, 1, -1)
    noise = torch.full((2, 1, 4, 10), 3.0)
    residual = digits.losses(start, samples, torch.zeros_like(noise))
    noisy = digits.losses(start, samples, noise)
    assert float(residual.max()) < 0.05
    assert noisy.mean().item() == pytest.approx(10 * 9 / 2, rel=0.05)


def test_the_diagonal_network_knows_its_truth(diagonal: DiagonalNetwork) -> None:
    truth = torch.zeros(2, 10)
    truth[:, :2] = 1.0
    found = diagonal.measure([truth.sqrt(), torch.zeros(2, 10)])
    assert found["train_loss"].tolist() == [0.0, 0.0]
    assert found["test_error"].tolist() == [0.0, 0.0]
    # every weight that is 0.5 too large adds 0.25 to the error of a Gaussian input
    off = diagonal.measure([(truth + 0.5).sqrt(), torch.zeros(2, 10)])
    assert off["test_error"].tolist() == pytest.approx([2.5, 2.5])


def test_a_seeds_problem_does_not_depend_on_the_others(diagonal: DiagonalNetwork) -> None:
    alone = DiagonalNetwork((2,), train_size=6, weights=10, truth=(1.0, 1.0))
    for together, own in zip(diagonal.start(), alone.start(), strict=True):
        assert torch.equal(together[1], own[0])
