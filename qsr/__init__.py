"""qsr: the Quadratic Synchronization Rule for distributed deep learning.

Importing this package imports nothing but the standard library.
"""

from qsr.core.plan import Plan, Round
from qsr.core.rules import (
    ConstantRule,
    EveryStepRule,
    PostLocalRule,
    PowerRule,
    QuadraticRule,
    SwapRule,
)
from qsr.core.schedules import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    PowerOfTwoSchedule,
    StepSchedule,
)

__version__ = "0.1.0"

__all__ = [
    "ConstantRule",
    "ConstantSchedule",
    "CosineSchedule",
    "EveryStepRule",
    "LinearSchedule",
    "Plan",
    "PostLocalRule",
    "PowerOfTwoSchedule",
    "PowerRule",
    "QuadraticRule",
    "Round",
    "StepSchedule",
    "SwapRule",
    "__version__",
]
