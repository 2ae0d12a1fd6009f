"""qsr: the Quadratic Synchronization Rule for distributed deep learning.

Importing this package imports nothing but the standard library; torch comes with `LocalSGD` and
`load_model`.
"""

from typing import TYPE_CHECKING, Any

from qsr.core.adaptive import AdaptiveRule, ReplayRule
from qsr.core.outer import OuterOptions
from qsr.core.plan import Plan, Round
from qsr.core.rules import (
    CappedRule,
    ConstantRule,
    EveryStepRule,
    GrowingRule,
    PostLocalRule,
    PowerRule,
    QuadraticRule,
    Rule,
    StagewiseRule,
    SwapRule,
)
from qsr.core.schedules import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    PowerOfTwoSchedule,
    StepSchedule,
)

if TYPE_CHECKING:
    from qsr.sync.local_sgd import LocalSGD
    from qsr.train.model_file import load_model

__version__ = "0.1.0"

__all__ = [
    "AdaptiveRule",
    "CappedRule",
    "ConstantRule",
    "ConstantSchedule",
    "CosineSchedule",
    "EveryStepRule",
    "GrowingRule",
    "LinearSchedule",
    "LocalSGD",
    "OuterOptions",
    "Plan",
    "PostLocalRule",
    "PowerOfTwoSchedule",
    "PowerRule",
    "QuadraticRule",
    "ReplayRule",
    "Round",
    "Rule",
    "StagewiseRule",
    "StepSchedule",
    "SwapRule",
    "__version__",
    "load_model",
]


def __getattr__(name: str) -> Any:
    # torch is slow to import
    if name == "LocalSGD":
        from qsr.sync.local_sgd import LocalSGD

        return LocalSGD
    if name == "load_model":
        try:
            from qsr.train.model_file import load_model
        except ModuleNotFoundError as error:
            raise ImportError(
                f"load_model needs the training extras ({error}): pip install 'qsr-sync[train]'"
            ) from None

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
