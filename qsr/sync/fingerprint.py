"""What all ranks must agree on in every step, as numbers that an all-reduce can compare."""

import hashlib
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

from qsr.core.sampling import Sampler
from qsr.errors import DisagreementError

_DIGITS = 2
"""12-bit numbers per field of a fingerprint. In float32 their sum over up to 4,096 workers is
exact, and so is its division by the number of workers."""


class Fingerprint(NamedTuple):
    """The values that must be equal on all workers in every step."""

    step: int
    round: int
    h: int
    lr: float
    sampler: Sampler | None
    """None where the training loop is not ours."""
    config: str

    def encode(self) -> list[float]:
        """Every field as `_DIGITS` numbers below 4,096, taken from its hash."""
        return [number for value in self for number in _draw_numbers(value)]

    def disagreement(self, rank: int, wrong: Sequence[bool]) -> DisagreementError:
        """The error of a `rank` with this fingerprint, where others have another one; `wrong` says
        which of its numbers differ."""
        digits = range(_DIGITS)
        fields = [
            name
            for number, name in enumerate(self._fields)
            if any(wrong[_DIGITS * number + digit] for digit in digits)
        ]
        values = {name: value for name, value in self._asdict().items() if value is not None}
        here = ", ".join(f"{name}={value}" for name, value in values.items())
        return DisagreementError(
            f"rank {rank}: the ranks disagree on {', '.join(fields)} (here {here}): start all "
            f"ranks with the same code, settings and data; the run resumes from its last checkpoint"
        )


@lru_cache(maxsize=64, typed=True)  # most fields are the same in the next step
def _draw_numbers(value: Hashable) -> tuple[float, ...]:
    digest = hashlib.blake2b(str(value).encode(), digest_size=2 * _DIGITS).digest()
    pairs = (digest[i : i + 2] for i in range(0, 2 * _DIGITS, 2))
    return tuple(float(int.from_bytes(pair, "big") & 0xFFF) for pair in pairs)


FINGERPRINT_SIZE = _DIGITS * len(Fingerprint._fields)
"""float32 elements of a fingerprint in the tail of a flat buffer."""
