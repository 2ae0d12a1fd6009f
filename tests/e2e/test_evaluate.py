"""A trained model is used and validated by someone else, and so are published weights."""

import json
import runpy
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision.datasets
from PIL import Image
from torch import nn
from torchvision import transforms
from vit_pytorch.simple_vit import SimpleViT as Reference

from qsr import build, load_model
from qsr.config.load import load_config, run_folder
from qsr.data import EvalTransform, Request, open_image_folders
from qsr.data.torchvision import TorchvisionLoader
from qsr.run.folder import read_rows
from qsr.train.evaluation import Evaluator
from tests.cli import ROOT
from tests.support import CPU

SCRIPT = ROOT / "scripts" / "evaluate.py"


class Trained(NamedTuple):
    """A run that has come to its end."""

    folder: Path
    summary: dict[str, Any]
    module: nn.Module
    """The one that the run validated last."""


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    evaluators: list[Evaluator] = []

    class Kept(Evaluator):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            evaluators.append(self)

    config = load_config(
        [
            *("experiment=demo/quadratic", "workers=2", "epochs=1", "schedule.warmup_epochs=0"),
            *("seed=3", "cluster.ranks=1", "cluster.threads_per_rank=1", "cluster.device=cpu"),
            *("data.loader=dali", "tracking=none", "tracking.progress=false"),
            *("ema.decay=0.9", "ema.uniform_fraction=0.5"),
            *(f"data.root={digits}", f"runs_dir={tmp_path_factory.mktemp('runs')}"),
        ]
    )
    pytest.importorskip("nvidia.dali")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "Evaluator", Kept)
        summary = build.run(config)
    assert isinstance(summary, dict)
    return Trained(run_folder(config), summary, evaluators[0].model)


class Answer(NamedTuple):
    status: int
    out: list[str]
    err: list[str]


Evaluate = Callable[..., Answer]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Runs scripts/evaluate.py in this process."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert isinstance(exit_.value.code, int)
        captured = capsys.readouterr()
        return Answer(exit_.value.code, captured.out.splitlines(), captured.err.splitlines())

    return run


def numbers(line: str) -> tuple[float, float, float]:
    """top-1, top-5, loss."""
    words = line.replace("(", " ").split()
    return tuple(float(words[words.index(name) + 1]) for name in ("top-1", "top-5", "loss"))  # type: ignore[return-value]


def test_the_loaded_network_is_the_trained_one(trained: Trained, digits: Path) -> None:
    """Bit for bit, on images that its own transform has made."""
    model = load_model(trained.folder)
    _, val = open_image_folders(digits)
    images = []
    for index in range(0, len(val), 4):
        with Image.open(val.path(index)) as image:
            images.append(model.transform(image))
    batch = torch.stack(images)
    with torch.no_grad():
        assert torch.equal(model.module(batch), trained.module(batch))
    config = load_config(["experiment=demo/quadratic", "workers=2"])
    transform = EvalTransform.of(config.data)
    loader = TorchvisionLoader(val, transform, batch_size=128, device=CPU, threads=1)
    (loaded,) = loader.batches([Request(range(0, len(val), 4), 0)])
    loader.close()
    assert torch.equal(batch, loaded.images)


def test_the_file_says_what_the_run_came_to(trained: Trained) -> None:
    about = load_model(trained.folder / "model.safetensors").about
    assert about.classes == tuple("0123456789")
    assert (about.network, about.image_size, about.seed, about.step) == ("small_resnet", 32, 3, 22)
    assert (about.mean, about.std, about.crop_fraction) == ((0.5,) * 3, (0.5,) * 3, 1.0)
    assert (about.top1, about.top5) == (trained.summary["top1"], trained.summary["top5"])
    assert about.experiment == trained.summary["experiment"]


def test_a_run_gives_its_own_numbers(trained: Trained, evaluate: Evaluate) -> None:
    status, (line, said), err = evaluate(trained.folder)
    summary = trained.summary
    top1, top5 = f"top-1 {summary['top1']:.3f} %", f"top-5 {summary['top5']:.3f} %"
    loss = f"loss {summary['val_loss']:.4f}"
    assert line == f"{top1}  {top5}  {loss}  (355 images, DALI on cpu, fp32)"
    assert said == f"the file says: {top1}  {top5}, after 22 steps"
    assert (status, err) == (0, [])


@pytest.mark.parametrize("name", ["ema", "uniform"])
def test_an_average_over_time_gives_its_own_numbers(
    trained: Trained, evaluate: Evaluate, digits: Path, name: str
) -> None:
    file, summary = trained.folder / f"model_{name}.safetensors", trained.summary
    status, (line, said), err = evaluate(file, f"data.root={digits}", "data.loader=dali")
    top1, top5 = f"top-1 {summary[f'{name}_top1']:.3f} %", f"top-5 {summary[f'{name}_top5']:.3f} %"
    loss = f"loss {summary[f'{name}_val_loss']:.4f}"
    assert line == f"{top1}  {top5}  {loss}  (355 images, DALI on cpu, fp32)"
    assert said == f"the file says: {top1}  {top5}, after 22 steps"
    assert (status, err) == (0, [])
    assert summary[f"{name}_val_loss"] != summary["val_loss"]
    row = read_rows(trained.folder / "metrics.jsonl")[0][-1]
    assert row[f"{name}_loss"] == summary[f"{name}_val_loss"]
    assert not list(trained.folder.glob("*.partial"))


def test_the_other_loader_differs_by_a_level_of_some_pixels(
    trained: Trained, evaluate: Evaluate
) -> None:
    status, (line, _), _ = evaluate(trained.folder, "data.loader=torchvision")
    assert status == 0
    assert "torchvision on cpu" in line
    top1, _, loss = numbers(line)
    assert top1 == pytest.approx(trained.summary["top1"], abs=100 / 355 + 0.001)  # one image
    assert loss == pytest.approx(trained.summary["val_loss"], abs=1e-3)


def test_the_file_alone_gives_them_too(
    trained: Trained, evaluate: Evaluate, digits: Path, tmp_path: Path
) -> None:
    """Without data/train, on which nothing depends; and with "=" in the file's name."""
    shutil.copytree(digits / "val", tmp_path / "data" / "val")
    file = tmp_path / "lr=1.safetensors"
    shutil.copyfile(trained.folder / "model.safetensors", file)
    own = evaluate(trained.folder)
    assert evaluate(file, f"data.root={tmp_path / 'data'}") == own
    # the network's own settings stay when a data set is named
    assert evaluate(file, "data=imagenet", "data.classes=10", "data.val_images=355",
                    f"data.root={digits}") == own  # fmt: skip


def expected(module: nn.Module, root: Path, size: int, resize: int) -> tuple[float, float, float]:
    """top-1, top-5 and loss as torchvision's examples count them."""
    steps = [
        transforms.Resize(resize),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    images = torchvision.datasets.ImageFolder(root / "val", transforms.Compose(steps))
    batch = torch.stack([image for image, _ in images])
    labels = torch.tensor(images.targets)
    with torch.no_grad():
        logits = module.eval()(batch)
    order = logits.argsort(dim=1, descending=True)
    hits = order == labels[:, None]
    loss = float(nn.functional.cross_entropy(logits, labels))
    return 100 * float(hits[:, 0].double().mean()), 100 * float(hits[:, :5].sum()) / 355, loss


def test_published_weights_of_timm(evaluate: Evaluate, digits: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=10)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "published.pth")
    wanted = expected(module, digits, 32, 36)
    status, (line,), err = evaluate(
        *(f"weights={tmp_path / 'published.pth'}", "model=timm", "model.timm_name=test_resnet"),
        *(f"data.root={digits}", "data.image_size=32", "data.eval_crop_fraction=0.89"),
        *("data.loader=torchvision", "cluster.device=cpu"),
    )
    assert status == 0
    assert numbers(line) == pytest.approx(wanted, abs=1e-3)
    assert err == [
        "note: timm validates test_resnet with data.image_size=160 data.eval_crop_fraction=0.95 "
        "data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5]"
    ]


def test_published_weights_of_vit_pytorch(evaluate: Evaluate, digits: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Reference(
        image_size=32, patch_size=4, num_classes=10, dim=64, depth=4, heads=4, mlp_dim=256,
        dim_head=16,
    )  # fmt: skip
    torch.save(module.state_dict(), tmp_path / "published.pt")
    status, (line,), err = evaluate(
        *(f"weights={tmp_path / 'published.pt'}", "model=small_vit", f"data.root={digits}"),
        *("data.image_size=32", "data.loader=torchvision", "cluster.device=cpu"),
    )
    assert (status, err) == (0, [])
    assert numbers(line) == pytest.approx(expected(module, digits, 32, 37), abs=1e-3)


def test_what_is_wrong_is_said_in_one_line(
    trained: Trained, evaluate: Evaluate, digits: Path, tmp_path: Path
) -> None:
    file = trained.folder / "model.safetensors"
    renamed, fewer, no_config = tmp_path / "renamed", tmp_path / "fewer", tmp_path / "no_config"
    shutil.copytree(digits / "val", renamed / "val")
    (renamed / "val" / "3").rename(renamed / "val" / "33")
    shutil.copytree(digits / "val", fewer / "val")
    shutil.rmtree(fewer / "val" / "9")
    no_config.mkdir()
    shutil.copyfile(file, no_config / "model.safetensors")
    foreign = tmp_path / "foreign.pth"
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), foreign)
    weights, root = f"weights={foreign}", f"data.root={digits}"
    timms = (weights, "model=timm", "model.timm_name=test_resnet")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path / "none",), f"{tmp_path / 'none'} does not exist"),
        ((tmp_path,), f"{tmp_path} has no model.safetensors"),
        ((no_config,), "config.yaml cannot be read (No such file"),
        ((file,), "data.root has no value: set it to the folder that holds val/CLASS/*"),
        (
            (file, "data.root=/none"),
            "no folder /none/val: set data.root=PATH to a folder with val/",
        ),
        ((file, f"data.root={renamed}"), "class 3 is '3' in the model, '33' in the folder"),
        ((file, f"data.root={fewer}"), "classes (10 and 9): class 9 is '9' in the model, none in"),
        ((trained.folder, f"data.root={fewer}"), "has 9 classes, not 10"),
        (
            (file, root, "model=resnet152"),
            "model: the model file already says which network it holds",
        ),
        ((file, root, "data.decode=gpu", "cluster.device=cpu"), "data.decode=gpu needs a GPU"),
        ((file, root, "evaluation.batch=0"), "evaluation.batch=0: input should be greater than"),
        ((file, root, "evaluation.batch=100000"), "should be less than or equal to 65536"),
        ((file, root, "evaluation.bach=9"), "did you mean evaluation.batch?"),
        ((file, root, "precision=fp32,bf16"), "these settings ask for several evaluations"),
        (
            (root,),
            "give a run folder, a model.safetensors file, or weights=FILE with its model=NAME",
        ),
        ((weights, root), "give a run folder, a model.safetensors file, or weights=FILE with"),
        ((*timms[:2], root), "model.timm_name has no value: set it"),
        (("weights=/none.pth", *timms[1:], root), "/none.pth does not exist"),
        ((*timms, f"data.root={fewer}"), f"{foreign} is for 10 classes, not 9"),
        (
            (weights, "model=small_resnet", root),
            f"{foreign} holds a different network: it lacks 0.0",
        ),
        ((weights, "model=vit_b16", root, "data.image_size=30"), "is not a multiple of vit_b16's"),
        ((foreign,), "pass other files to python scripts/evaluate.py as weights=FILE model=NAME"),
    ]
    for arguments, message in cases:
        status, out, err = evaluate(*arguments)
        assert (status, out) == (2, []), arguments
        (line,) = err
        assert line.startswith("refused: ")
        assert message in line, arguments


def test_images_that_a_network_does_not_take_are_refused(
    evaluate: Evaluate, digits: Path, tmp_path: Path
) -> None:
    torch.save(timm.create_model("test_vit", num_classes=10).state_dict(), tmp_path / "v.pth")
    status, out, (line,) = evaluate(
        *(f"weights={tmp_path / 'v.pth'}", "model=timm", "model.timm_name=test_vit"),
        *(f"data.root={digits}", "data.image_size=50", "cluster.device=cpu"),
    )
    assert (status, out) == (2, [])
    assert line.startswith("refused: data.image_size=50: the network does not accept this size (")


def test_a_broken_image_is_named(
    trained: Trained, evaluate: Evaluate, digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits / "val", tmp_path / "val")
    broken = sorted((tmp_path / "val" / "4").iterdir())[0]
    broken.write_bytes(b"no image")
    status, out, (line,) = evaluate(
        trained.folder, f"data.root={tmp_path}", "data.loader=torchvision"
    )
    assert (status, out) == (1, [])
    assert line.startswith(f"failed: cannot read {broken} (index ")


def test_the_readmes_snippet(trained: Trained, digits: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("## Use a trained model")[2]
    code = section.partition("\n    ")[2].partition("\n\n")[0]
    code = textwrap.dedent("    " + code)
    assert len(code.splitlines()) == 5
    image = sorted((digits / "val" / "6").iterdir())[0]
    code = code.replace("runs/demo/quadratic/seed_1", str(trained.folder))
    names: dict[str, Any] = {}
    exec(code.replace("digit.png", str(image)), names)
    with Image.open(image) as opened:
        logits = trained.module(load_model(trained.folder).transform(opened)[None])
    assert torch.equal(names["logits"], logits)
    assert names["name"] == str(int(logits.argmax()))


def test_the_summary_is_the_files(trained: Trained) -> None:
    """What the tests above compare with is what the run wrote."""
    assert json.loads((trained.folder / "summary.json").read_text()) == trained.summary
