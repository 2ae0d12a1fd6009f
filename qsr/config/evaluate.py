"""Settings of qsr evaluate: a network, and the images to validate it on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from qsr.config.compose import compose_settings
from qsr.config.load import add_sources, check_model_name, check_reading
from qsr.config.overrides import expand_sweeps, parse_overrides
from qsr.config.parsing import flatten, parse
from qsr.config.places import CONFIG_DIR
from qsr.config.schema import STRICT, AnyModel, BatchSize, DataConfig
from qsr.errors import ConfigError

OF_NETWORK = ("data.image_size", "data.eval_crop_fraction", "data.mean", "data.std")
"""Preprocessing of a network's input; a model file has it, whatever the data set."""


@dataclass(frozen=True, config=STRICT)
class BatchConfig:
    """Settings of the forward pass."""

    batch: BatchSize
    """Images per forward pass."""


@dataclass(frozen=True, config=STRICT)
class DeviceConfig:
    """Where the one process runs."""

    device: Literal["auto", "cpu", "cuda"]
    """auto: CUDA if there is a GPU."""


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """Settings of one validation."""

    weights: str | None
    """A weight file without a description of its network: .safetensors or torch.save. null: a run
    folder or a model file is given instead."""
    model: AnyModel | None
    """The network of `weights`, or the code of a network of your own; otherwise null."""
    data: DataConfig
    """Images in root/val; only the settings that validation needs are used."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Autocast type of the forward pass; by default the run's, and fp32 for `weights`."""
    evaluation: BatchConfig
    """Batch size of the validation."""
    cluster: DeviceConfig
    """The device."""


def load_evaluate(
    overrides: Sequence[str],
    known: Mapping[str, Any] | None = None,
    config_dir: Path = CONFIG_DIR,
    *,
    more: Sequence[Path] = (),
    needs_code: bool = False,
) -> EvaluateConfig:
    """Settings from the command line, then from what is `known` from a model file (by dotted name;
    None: no model file), then from configs/evaluate.yaml. `needs_code`: the network of the model
    file is not one of ours, and model=custom must name its code. `more`: folders with further
    files of groups. Raises ConfigError."""
    folders = [config_dir, *more]
    if len(expand_sweeps(overrides, folders)) > 1:
        raise ConfigError("these settings ask for several evaluations: ask for one")
    parsed = parse_overrides(overrides)
    given = {override.key_or_group for override in parsed}
    ours = ("weights",) if needs_code else ("weights", "model")
    of_network = sorted(key for key in given if key.split(".")[0] in ours)
    if known is not None and of_network:
        raise ConfigError(
            f"{of_network[0]}: the model file already says which network it holds; leave it out"
        )
    raw = compose_settings(parsed, folders, "evaluate")
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
    add_sources(raw)
    config = parse(EvaluateConfig, raw)
    if known is None and (config.weights is None or config.model is None):
        raise ConfigError(
            "give a run folder, a model.safetensors file, or weights=FILE with its model=NAME"
        )
    if config.model is not None:
        check_model_name(config.model)
    check_reading(config.data, config.cluster.device)
    return config


def settings_of_run(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run's validation from its config.yaml, by dotted name."""
    return {
        name: value
        for name, value in flatten(raw)
        if (name.startswith("data.") and not name.startswith("data.augmentation."))
        or name in ("precision", "evaluation.batch")
    }
