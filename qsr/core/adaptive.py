"""Rules whose rounds are not a function of the learning rate: they follow the loss, or a record."""

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from qsr.core.rules import UNTIL_THE_END, Rule, check_h


@dataclass(frozen=True)
class AdaptiveRule(Rule):
    """AdaComm (Wang & Joshi 2018, arXiv 1810.08313, with a learning rate that varies): rounds are
    long at first and become shorter as the loss falls,

        H = ceil(h sqrt((first_lr / lr) (loss / first_loss))),

    where `loss` is the mean training loss of the round before, and `first_lr` and `first_loss` are
    those of the first round. lr = 0 means: until the end.
    """

    h: int
    """H of the first round."""
    first_lr: float | None = None
    first_loss: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        check_h("h", self.h)

    @property
    def needs_loss(self) -> bool:
        return True

    def length(self, start: int, lr: float) -> int | None:
        if lr <= 0.0:
            return UNTIL_THE_END
        if self.first_lr is None or not self.first_loss or self.loss is None:
            return self.h
        ratio = (self.first_lr / lr) * (self.loss / self.first_loss)
        return max(1, math.ceil(self.h * math.sqrt(max(0.0, ratio))))

    def after(self, lr: float) -> "AdaptiveRule":
        return replace(self, first_lr=lr) if self.first_lr is None else self

    def observe(self, loss: float) -> "AdaptiveRule":
        first = loss if self.first_loss is None else self.first_loss
        return replace(self, first_loss=first, loss=loss)


@dataclass(frozen=True)
class ReplayRule(Rule):
    """Given rounds, one after another, whatever the learning rate. After the last of them: until
    the end."""

    lengths: tuple[int, ...]
    """H of each round."""
    round: int = 0

    def __post_init__(self) -> None:
        if not self.round:  # once, not for the rule of every round
            check_h("each H", min(self.lengths, default=0))

    def length(self, start: int, lr: float) -> int | None:
        return self.lengths[self.round] if self.round < len(self.lengths) else UNTIL_THE_END

    def after(self, lr: float) -> "ReplayRule":
        return replace(self, round=self.round + 1)


def rounds_text(lengths: Iterable[int]) -> str:
    """The lengths of rounds as text: "100x4 8" is a hundred rounds of 4 steps, then one of 8."""
    words = []
    for h, same in itertools.groupby(lengths):
        count = sum(1 for _ in same)
        words.append(f"{count}x{h}" if count > 1 else f"{h}")
    return " ".join(words)


_MOST_ROUNDS = 10_000_000
_WORD = re.compile(r"(?:(\d{1,8})x)?(\d{1,9})")


def read_rounds(text: str) -> tuple[int, ...]:
    """The lengths of the rounds that `rounds_text`, or a person, wrote: words between spaces, tabs
    or line ends; what follows a # in a line is a comment. Raises ValueError."""
    lengths: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        for word in line.partition("#")[0].split():
            found = _WORD.fullmatch(word)
            count, h = (int(found[1] or 1), int(found[2])) if found else (0, 0)
            if not (count and h):
                raise ValueError(
                    f"line {number}: {word!r} is not a round: write H, or COUNTxH for several"
                )
            if len(lengths) + count > _MOST_ROUNDS:
                raise ValueError(f"line {number}: more than {_MOST_ROUNDS:,} rounds")
            lengths += [h] * count
    if not lengths:
        raise ValueError("no rounds in it")
    return tuple(lengths)
