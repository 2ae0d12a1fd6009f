"""Validate a trained model, or published weights: top-1, top-5 and loss.

    qsr evaluate runs/demo/quadratic/seed_1
    qsr evaluate model.safetensors data.root=PATH
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

from qsr.cli.usage import show_help
from qsr.output import printer


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        return show_help(__doc__)
    source, overrides = None, arguments
    # a run folder may have "=" in its name
    if Path(arguments[0]).exists() or "=" not in arguments[0].partition("/")[0]:
        source, *overrides = arguments

    from qsr.train.validate import evaluate  # imports torch, which is slow

    try:
        return evaluate(source, overrides)
    except KeyboardInterrupt:
        return 130


def run() -> NoReturn:
    """Run it with the command line's arguments; exits."""
    printer(main)
