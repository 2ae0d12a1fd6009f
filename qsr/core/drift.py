"""How much faster local steps drift towards flat minima: the slow SDE under label noise.

Near a manifold of minima, a worker's distance x from it along an eigenvector of the Hessian with
eigenvalue L follows x <- (1 - lr L) x + lr sqrt(L) noise. The mean of the workers moves along the
manifold by the third derivative of the loss times E[x x^T] / 2, that is, by the gradient of L times
half the variance of x, summed over the eigenvectors. In data parallel training that variance is
V / K. After an average it is V / K on all workers too, and then it grows towards V on each:

    variance after s steps = V (a^2s / K + 1 - a^2s),
    a = 1 - lr L,   V = noise^2 lr^2 L / (1 - a^2)

Its mean over a round's steps s = 0 .. H - 1, over V / K, is 1 + (K - 1) psi with

    psi = 1 - (1 - a^2H) / (H (1 - a^2)),    for small lr L: (exp(-x) - 1 + x) / x,  x = 2 H lr L

The latter is the function of Gu et al. 2023, whose slow SDE has the drift of SGD plus K - 1 times
the drift by the gradient of sum F(2 H lr L) / (2 H lr) over the eigenvalues, with F' = psi. psi
rises from 0 to 1: rounds much shorter than 1 / (lr L) steps gain nothing, much longer ones a factor
of K. docs/evidence-simulations.md has the full derivation.
"""

import math


def psi(x: float) -> float:
    """(exp(-x) - 1 + x) / x for x = 2 H lr L >= 0; 0 at 0."""
    if x < 1e-4:
        return x / 2 - x * x / 6  # where the formula's terms cancel
    return (math.expm1(-x) + x) / x


def psi_discrete(h: float, lr: float, eigenvalue: float) -> float:
    """The same for steps of finite size: 0 at H = 1, which is data parallel training."""
    rest = (1 - lr * eigenvalue) ** 2
    return 1 - (1 - math.pow(rest, h)) / (h * (1 - rest))


def drift_multiplier(workers: int, psi: float) -> float:
    """Drift along the minima relative to that of data parallel training: 1 + (K - 1) psi, for a
    Hessian with one non-zero eigenvalue."""
    return 1 + (workers - 1) * psi
