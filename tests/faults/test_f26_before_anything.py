"""F26: only a pass through the network shows that it rejects images of this size or a batch of one,
gives no logits, or does not exist in timm. The start, the submission and the doctor refuse it in
one line that says what to use instead, before anything is created."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from qsr import build
from qsr.config.load import load_config
from qsr.config.schema import Config
from qsr.errors import ConfigError
from qsr.ops.doctor import examine
from qsr.ops.jobs import check_submissions
from qsr.train import models
from qsr.train.networks import build_network
from tests.cli import call, command, refusal
from tests.image_trees import write_tree

ONE = ("cluster.ranks=1", "cluster.threads_per_rank=1", "tracking.progress=false")


class Logits(nn.Module):
    """A network of the simplest kind; the others differ in one thing."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.body(images).mean(dim=(2, 3)))


class WithFeatures(Logits):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images), self.body(images)


class AuxiliaryInTraining(Logits):
    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return {"out": logits, "aux": logits} if self.training else logits


class AMap(Logits):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images)[:, :, None]


class FewerClasses(Logits):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes - 1)


class Grey(Logits):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.body = nn.Conv2d(1, 8, 3)


class SqueezedInEvaluation(Logits):
    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return logits if self.training else logits.squeeze()


class LooksAtNumbers(Logits):
    """What a network cannot do where shapes alone are computed."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images if images.sum().item() < 1e9 else -images)


class BuiltFromNumbers(Logits):
    """So are many networks of timm 1.0.20."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]


class NotFinite(Logits):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images) / 0.0


@pytest.fixture(autouse=True)
def _network(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm has "NAME" for each class above."""
    create = timm.create_model
    kinds: list[type[Logits]] = [Logits, *Logits.__subclasses__()]
    own = {kind.__name__: kind for kind in kinds}

    def create_model(name: str, num_classes: int) -> nn.Module:
        return own[name](num_classes) if name in own else create(name, num_classes=num_classes)

    is_model = timm.is_model
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(timm, "is_model", lambda name: name in own or is_model(name))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("f26") / "photos"
    write_tree(root, classes=2, train=8, val=3)
    return root


@pytest.fixture
def settings(photos: Path, tmp_path: Path) -> Callable[..., Config]:
    def load(name: str, *more: str) -> Config:
        return load_config(
            [
                *("experiment=demo/quadratic", "data=folder", "model=timm"),
                *(f"model.timm_name={name}", "data.image_size=32", f"data.root={photos}"),
                *("workers=2", "global_batch=8", "epochs=2", "schedule.warmup_epochs=0"),
                *("data.loader=torchvision", "data.loader_threads=1", "tracking=none", *ONE),
                *(f"runs_dir={tmp_path / 'runs'}", *more),
            ]
        )

    return load


CASES = [
    (
        "test_vit",
        ("data.image_size=50",),
        r"data\.image_size=50: model\.timm_name=test_vit does not accept images of this size "
        r"\(.*50.*16.*\): use data\.image_size=160, its default, or another network",
    ),
    (
        "test_resnet",
        ("global_batch=2",),
        r"model\.timm_name=test_resnet cannot process a single image of data\.image_size=32 in "
        r"training \(Expected more than 1 value per channel.*\): set micro_batch, or "
        r"global_batch / workers, to 2 or more",
    ),
    (
        "test_resnet",
        ("micro_batch=1",),
        r"cannot process a single image of data\.image_size=32 in training .*: set micro_batch, or",
    ),
    ("WithFeatures", (), r"returns a tuple instead of logits\): choose another"),
    ("AuxiliaryInTraining", (), r"returns a dict instead of logits\): choose another"),
    ("AMap", (), r"returns shape \[2, 10, 1\] instead of logits \[2, 10\]\)"),
    ("FewerClasses", (), r"returns shape \[2, 9\] instead of logits \[2, 10\]\)"),
    ("Grey", (), r"model\.timm_name=Grey cannot be used .*channels.*: choose another"),
    (
        "SqueezedInEvaluation",
        (),
        r"cannot process a single image of .* in validation \(it returns shape \[10\] ",
    ),
    (
        "test_resnet.nosuchtag",
        (),
        r"model\.timm_name=test_resnet\.nosuchtag: timm's test_resnet has no tag 'nosuchtag'; .*"
        r": use model\.timm_name=test_resnet",
    ),
    ("test_resnett", (), r"=test_resnett: timm has no such model; closest: test_resnet"),
    (
        "hf-hub:timm/test_resnet.r160_in1k",
        (),
        r"timm has no such model; closest: test_resnet",
    ),
    ("local-dir:/nets/test_resnet", (), r"timm has no such model; closest: test_resnet"),
]


@pytest.mark.parametrize(("name", "more", "message"), CASES, ids=[f"{c[0]}{c[1]}" for c in CASES])
def test_it_is_refused_by_start_submission_and_doctor(
    name: str,
    more: tuple[str, ...],
    message: str,
    settings: Callable[..., Config],
    tmp_path: Path,
) -> None:
    quoted = f"'{name}'" if ":" in name else name
    config = settings(quoted, *more)
    for check in (build.prepare, lambda run: check_submissions([run])):
        with pytest.raises(ConfigError, match=message) as refused:
            check(config)
        assert "\n" not in str(refused.value)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert not examine(config)
    lines = output.getvalue().splitlines()
    found = [line for line in lines if line.startswith("FAIL")]
    assert found[0] == f"FAIL  network      {refused.value}"
    assert not any(line[6:].startswith("training") for line in lines)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "runs"])
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("name", ["Logits", "LooksAtNumbers", "BuiltFromNumbers", "test_vit"])
def test_what_works_is_not_refused(name: str, settings: Callable[..., Config]) -> None:
    """Where shapes alone do not do, numbers decide."""
    config = settings(name, *(("data.image_size=160",) if name == "test_vit" else ()))
    build.prepare(config)
    check_submissions([config])
    count = models.count_parameters(config.model, 2, config.data.image_size)
    if name != "test_vit":
        assert count == 8 * 3 * 9 + 8 + 8 * 2 + 2


def test_nobody_is_asked_for_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model file that comes from elsewhere neither."""

    def ask(*_: Any, **__: Any) -> nn.Module:
        raise AssertionError("timm would go to the hub, or read a folder")

    monkeypatch.setattr(timm, "create_model", ask)
    for name in ("hf-hub:timm/test_resnet.r160_in1k", "hf_hub:a/b", "local-dir:/nets/resnet18"):
        with pytest.raises(ValueError, match=f"Unknown model .{name}"):
            build_network("timm", name, 10, 32, channels_last=False)


def test_a_run_of_one_image_in_a_pass(settings: Callable[..., Config]) -> None:
    """A BatchNorm that sees more than one place is content with one image."""
    build.prepare(settings("test_resnet", "micro_batch=1", "data.image_size=64"))
    build.prepare(settings("Logits", "micro_batch=1"))


def test_the_trial_leaves_no_trace(settings: Callable[..., Config]) -> None:
    """Of random numbers drawn, and of the default device."""
    models._try_passes.cache_clear()
    state = torch.get_rng_state()
    build.prepare(settings("Logits"))
    with pytest.raises(ConfigError):
        build.prepare(settings("WithFeatures"))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.zeros(1).device.type == "cpu"


def test_the_doctor_trains_a_pass(settings: Callable[..., Config]) -> None:
    """On the device, with numbers: so it finds what shapes do not show."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert not examine(settings("NotFinite"))
    (line,) = [line for line in output.getvalue().splitlines() if line.startswith("FAIL")]
    assert line.startswith("FAIL  training     the loss with initial weights is nan in fp32: use")


def test_of_a_list_of_seeds_the_network_is_tried_once(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    models._try_passes.cache_clear()
    tried: list[object] = []
    fault = models._fault

    def counted(network: nn.Module, one: Any) -> str | None:
        tried.append(one)
        return fault(network, one)

    monkeypatch.setattr(models, "_fault", counted)
    for seed in range(3):
        build.prepare(settings("Logits", f"seed={seed}"))
    assert len(tried) == 2  # in training and in validation


@pytest.mark.slow
def test_one_line_for_all_ranks(photos: Path, tmp_path: Path) -> None:
    vit_at_50 = [
        *("data=folder", "model=timm", "model.timm_name=test_vit", "data.image_size=50"),
        *("data.loader=torchvision", "global_batch=8", "schedule.warmup_epochs=0"),
    ]
    line = refusal(command(photos, tmp_path / "runs", *vit_at_50, "cluster.ranks=2"))
    assert line.startswith("refused: data.image_size=50: model.timm_name=test_vit does not ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "batch", "right"),
    [
        ("vit_tiny_patch16_224", 64, 8, False),
        ("swin_tiny_patch4_window7_224", 96, 8, False),
        ("inception_v3", 64, 8, False),
        ("resnet10t", 32, 2, False),
        ("levit_128s", 64, 8, False),
        ("resnet10t", 64, 2, True),
        ("resnet10t", 32, 4, True),
    ],
)
def test_networks_of_timm(
    name: str, size: int, batch: int, right: bool, photos: Path, tmp_path: Path
) -> None:
    """As a user starts them. None but those that train may get past the refusal."""
    done = call(
        command(
            photos,
            tmp_path / "runs",
            *("data=folder", "model=timm", f"model.timm_name={name}", f"data.image_size={size}"),
            *("data.loader=torchvision", f"global_batch={batch}", "schedule.warmup_epochs=0"),
            *("epochs=1", *ONE),
        )
    )
    assert done.returncode == (0 if right else 2), done.stderr
    assert ("refused: " in done.stderr) is not right
    assert (tmp_path / "runs").exists() is right
