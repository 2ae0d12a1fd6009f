"""Settings of scripts/evaluate.py: a network, and the images on which it is validated."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from qsr.config.compose import (
    CONFIG_DIR,
    ConfigError,
    compose_settings,
    expand_sweeps,
    parse_overrides,
)
from qsr.config.load import check_model_name, check_reading
from qsr.config.parsing import flatten, parse
from qsr.config.schema import STRICT, BatchSize, DataConfig, ModelConfig

OF_NETWORK = ("data.image_size", "data.eval_crop_fraction", "data.mean", "data.std")
"""How a network sees images: known of a model file, whichever data set is chosen."""


@dataclass(frozen=True, config=STRICT)
class BatchConfig:
    """How images go through the network."""

    batch: BatchSize
    """Images per forward pass."""


@dataclass(frozen=True, config=STRICT)
class DeviceConfig:
    """Where it runs: in one process."""

    device: Literal["auto", "cpu", "cuda"]
    """auto: CUDA where there is a GPU."""


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """One validation."""

    weights: str | None
    """File of weights that does not say which network it is of: .safetensors, or of torch.save.
    null: a run folder or a model file is given."""
    model: ModelConfig | None
    """The network of `weights`; null without it."""
    data: DataConfig
    """Images: those of root/val; of the rest what validation needs."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Autocast type of the forward pass; that of the run, and fp32 for `weights`."""
    evaluation: BatchConfig
    """Validation."""
    cluster: DeviceConfig
    """The device."""


def load_evaluate(
    overrides: Sequence[str],
    known: Mapping[str, Any] | None = None,
    config_dir: Path = CONFIG_DIR,
) -> EvaluateConfig:
    """From the command line; where that is silent, from what is `known` of a model file (by dotted
    name; None: none is given), and then configs/evaluate.yaml. Raises ConfigError."""
    if len(expand_sweeps(overrides)) > 1:
        raise ConfigError("these settings ask for several evaluations: give one")
    parsed = parse_overrides(overrides)
    given = {override.key_or_group for override in parsed}
    of_network = sorted(key for key in given if key.split(".")[0] in ("weights", "model"))
    if known is not None and of_network:
        raise ConfigError(f"{of_network[0]}: the model file says itself which network it is")
    raw = compose_settings(parsed, config_dir, "evaluate")
    for name, value in (known or {}).items():
        other_data = "data" in given and name.startswith("data.") and name not in OF_NETWORK
        if name in given or other_data:
            continue
        *path, leaf = name.split(".")
        target = raw
        for part in path:
            target = target[part]
        target[leaf] = value
    if raw["data"].get("root") is None:
        raise ConfigError("data.root has no value: set it to the folder that holds val/CLASS/*")
    config = parse(EvaluateConfig, raw)
    if known is None and (config.weights is None or config.model is None):
        raise ConfigError(
            "give a run folder, a model.safetensors, or weights=FILE with model=NAME of the network"
        )
    if config.model is not None:
        check_model_name(config.model)
    check_reading(config.data, config.cluster.device)
    return config


def settings_of_run(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What config.yaml of a run folder tells of its validation, by dotted name."""
    return {
        name: value
        for name, value in flatten(raw)
        if (name.startswith("data.") and not name.startswith("data.augmentation."))
        or name in ("precision", "evaluation.batch")
    }
