"""Settings of any run -> the same run with the quadratic rule, whatever its own rule is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from qsr.config.load import load_config
from qsr.config.schema import Config, RuleConfig
from qsr.errors import ConfigError


@dataclass(frozen=True)
class QuadraticRun:
    """A run whose rule was replaced by the quadratic one."""

    settings: list[str]
    """Overrides that ask for it, but for sync.h_base and sync.alpha."""
    config: Config
    """The run, with an h_base and an alpha that mean nothing."""
    replaced: str
    """The label of its own rule; empty if that is the quadratic one, or incomplete."""


def with_quadratic_rule(overrides: Sequence[str], more: Sequence[Path] = ()) -> QuadraticRun:
    """The run that these overrides ask for, with the quadratic rule. `more`: as in load_config.
    Raises ConfigError."""
    own = {
        f"sync.{field.name}"
        for kind in RuleConfig.__subclasses__()
        for field in fields(kind)
        if field not in fields(RuleConfig)
    }
    names = [text.partition("=")[0].lstrip("+~") for text in overrides]
    settings = [
        text for name, text in zip(names, overrides, strict=True) if name not in {"sync", *own}
    ]
    replaced = ""
    try:
        before = load_config(overrides, more=more).sync
        if before.rule != "quadratic":
            replaced = before.label
    except ConfigError:  # its rule may be incomplete; what else is wrong is wrong below, too
        pass
    if replaced or "sync" in names:
        settings.append("sync=quadratic")
    # H_base must be larger than a delay
    delays = (re.fullmatch(r"sync\.delay_steps=(\d{1,9})", text) for text in overrides)
    h_base = 1 + max((int(delay[1]) for delay in delays if delay), default=0)
    config = load_config([*settings, f"sync.h_base={h_base}", "sync.alpha=1.0"], more=more)
    return QuadraticRun(settings, config, replaced)
