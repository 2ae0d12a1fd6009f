"""What is done with the mean of a round: kept as it is, as in the paper, or moved on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OuterOptions:
    """The outer optimizer's settings."""

    lr: float = 1.0
    """What the movement of a round is multiplied with."""
    momentum: float = 0.0
    """Share of the earlier movements that is kept."""
    nesterov: bool = False
    """Nesterov's momentum instead of Polyak's."""
    rate_correction: bool = False
    """Keep the momentum as movement per unit of the summed learning rate of a round. Otherwise a
    long round's movement pushes the short round after it as far as itself, and the other way round:
    H and the rate differ between rounds."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"the outer learning rate must be positive, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"the outer momentum must be in [0, 1), got {self.momentum}")
        for name in ("nesterov", "rate_correction"):
            if getattr(self, name) and not self.momentum:
                raise ValueError(f"outer {name} needs an outer momentum above 0")

    @property
    def ends_at_mean(self) -> bool:
        """Whether a step ends at the workers' mean, so that no outer optimizer is needed."""
        return self.lr == 1.0 and self.momentum == 0.0
