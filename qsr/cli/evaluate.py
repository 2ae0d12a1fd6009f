"""Validate a trained model, or published weights: top-1, top-5 and loss.

    qsr evaluate runs/demo/quadratic/seed_1
    qsr evaluate model.safetensors data.root=PATH
    qsr evaluate runs/demo/quadratic/seed_1/model_ema.safetensors data.root=PATH
    qsr evaluate weights=resnet152-394f9c45.pth model=resnet152 data=imagenet \\
        data.root=PATH
    qsr evaluate weights=FILE model=timm model.timm_name=resnet50 data=imagenet \\
        data.root=PATH data.image_size=288 data.eval_crop_fraction=1.0

The first argument is a run folder, which provides all settings, or a model file, which provides
those of its network. Published weights are a local file; if their accuracy is known, they verify
the data and the loader before you pay for a training run. The images are PATH/val/CLASS/*. More
settings: data.loader=dali|torchvision, evaluation.batch=N, precision=fp32, cluster.device=cpu|cuda;
all are in configs/evaluate.yaml and qsr/config/evaluate.py. Uses one process and writes nothing.
Exit status: 0 done, 1 an image cannot be read, 2 refused, 130 interrupted.
"""

from pathlib import Path
from typing import NoReturn

from qsr.cli.options import print_help, print_settings, read
from qsr.errors import showing_errors
from qsr.output import printer


@showing_errors
def main(arguments: list[str]) -> int:
    line = read(arguments)
    if not arguments or "--help" in line.given:
        print_help(__doc__, line.folders, only=("data", "model"))
        return 0
    source, overrides = None, line.settings
    first = (overrides or [""])[0]
    # a run folder may have "=" in its name
    if first and (Path(first).exists() or "=" not in first.partition("/")[0]):
        source, *overrides = overrides

    from qsr.train.validate import evaluate, settings_of  # imports torch, which is slow

    config = settings_of(source, overrides, line.folders)
    if "--cfg" in line.given:
        print_settings(
            line,
            {source or str(config.weights): config},
        )
        return 0
    try:
        return evaluate(source, config)
    except KeyboardInterrupt:
        return 130


def run() -> NoReturn:
    """Run it with the command line's arguments; exits."""
    printer(main)
