"""A model file says what it is, and is loaded from that alone; what does not fit is refused."""

import json
import re
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet152
from vit_pytorch.simple_vit import SimpleViT as Reference

import qsr
from qsr import load_model
from qsr.data import ImageFolder, Loader, Request
from qsr.errors import ModelFileError
from qsr.run.checkpoint_files import pack_tensors
from qsr.run.folder import RunFolder
from qsr.run.results import ModelFile, missing_room, reserve_results, write_results
from qsr.train.model_file import (
    Description,
    LoadedModel,
    put_weights,
    read_weights,
)
from qsr.train.networks import build_network

ABOUT = Description(
    network="small_resnet",
    timm_name=None,
    channels_last=False,
    classes=("Äpfel", 'the "b"', "c", "d", "e", "f"),
    image_size=32,
    crop_fraction=0.875,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
    precision="fp32",
    experiment="demo/quadratic",
    seed=3,
    step=44,
    top1=100 / 3,
    top5=99.5,
)
KINDS = {
    "small_resnet": ABOUT,
    "channels_last": replace(ABOUT, channels_last=True),
    "small_vit": replace(ABOUT, network="small_vit"),
    "timm": replace(ABOUT, network="timm", timm_name="test_resnet", top5=None),
}


def network(about: Description) -> nn.Module:
    torch.manual_seed(5)
    made = build_network(
        about.network,
        about.timm_name,
        len(about.classes),
        about.image_size,
        channels_last=about.channels_last,
    )
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after a training
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return made.eval()


def write(path: Path, about: Description, module: nn.Module | None = None) -> Path:
    state = (module or network(about)).state_dict()
    path.write_bytes(b"".join(pack_tensors(state, about.metadata())))
    return path


@pytest.mark.parametrize("about", KINDS.values(), ids=KINDS)
def test_the_file_alone_gives_the_network(about: Description, tmp_path: Path) -> None:
    trained = network(about)
    path = write(tmp_path / "any name.safetensors", about, trained)
    torch.manual_seed(1)
    draw = torch.rand(1)
    torch.manual_seed(1)
    model = load_model(path)
    assert torch.equal(torch.rand(1), draw)  # the caller's random numbers go on
    assert model.about == about
    assert model.classes == about.classes
    assert not any(module.training for module in model.module.modules())
    assert all(parameter.requires_grad for parameter in model.module.parameters())
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.module(images), trained(images))


def test_the_transform_is_that_of_validation(
    tmp_path: Path, new_loader: Callable[..., Loader]
) -> None:
    """Bit for bit that of the loader, whatever the mode of the image."""
    pixels = torch.randint(0, 256, (50, 70, 4), dtype=torch.uint8).numpy()
    colours = Image.fromarray(pixels, "RGBA")
    shapes = {"RGB": (70, 50), "RGBA": (70, 50), "L": (40, 90), "P": (33, 20), "1": (300, 200)}
    files = []
    for mode, size in shapes.items():
        file = f"{mode}.png"
        image = colours.resize(size)
        (image if mode == "RGBA" else image.convert("RGB").convert(mode)).save(tmp_path / file)
        files.append(file)
    folder = ImageFolder(tmp_path, "val", ("a",), tuple(files), (0,) * len(files))
    loader = new_loader("torchvision", folder, ABOUT.transform)
    (batch,) = loader.batches([Request(range(len(files)), 0)])
    transform = load_model(write(tmp_path / "m.safetensors", ABOUT)).transform
    for file, expected in zip(files, batch.images, strict=True):
        with Image.open(tmp_path / file) as opened:
            ours = transform(opened)
        assert ours.shape == (3, 32, 32)
        assert torch.equal(ours, expected), file


BLOCKED = ("hydra", "omegaconf", "pydantic", "wandb", "nvidia", "timm", "yaml", "rich")


def test_it_needs_nothing_of_the_settings(tmp_path: Path) -> None:
    kinds = ["small_resnet", "small_vit"]
    paths = [str(write(tmp_path / f"{kind}.safetensors", KINDS[kind])) for kind in kinds]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))\n"
        "import qsr; assert 'torch' not in sys.modules\n"
        "from qsr import load_model\n"
        "from PIL import Image\n"
        f"for path in {paths}:\n"
        "    model = load_model(path)\n"
        "    image = model.transform(Image.new('L', (50, 40), 99))\n"
        "    print(tuple(model.module(image[None]).shape), len(model.export()) > 0)\n"
    )
    root = str(Path(qsr.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.stdout == 2 * "(1, 6) True\n", done.stderr


def test_where_timm_is_missing_the_mend_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "model.safetensors", KINDS["timm"])
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelFileError, match=r"holds a timm network .*: pip install timm"):
        load_model(path)


def test_qsr_has_no_other_names() -> None:
    assert qsr.load_model is load_model
    with pytest.raises(AttributeError, match="no attribute 'save_model'"):
        qsr.save_model  # noqa: B018


def loaded(module: nn.Module, about: Description) -> LoadedModel:
    return LoadedModel(module, lambda image: torch.zeros(0), about.classes, about)


def test_a_vit_goes_to_vit_pytorch() -> None:
    ours = network(KINDS["small_vit"])
    theirs = Reference(
        image_size=32, patch_size=4, num_classes=6, dim=64, depth=4, heads=4, mlp_dim=256,
        dim_head=16,
    )  # fmt: skip
    theirs.load_state_dict(loaded(ours, KINDS["small_vit"]).export())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-5)


def test_resnet152_goes_to_torchvision_and_to_timm() -> None:
    about = replace(ABOUT, network="resnet152", channels_last=True)
    ours = network(about)
    state = loaded(ours, about).export()
    images = torch.randn(1, 3, 64, 64)
    with torch.device("meta"):
        others = [resnet152(num_classes=6), timm.create_model("resnet152", num_classes=6)]
    for theirs in others:
        theirs.load_state_dict(state, assign=True)
        with torch.no_grad():
            torch.testing.assert_close(theirs.eval()(images), ours(images), rtol=1e-3, atol=1e-3)


def test_timms_networks_keep_timms_names() -> None:
    theirs = timm.create_model("test_resnet", num_classes=6)
    theirs.load_state_dict(loaded(network(KINDS["timm"]), KINDS["timm"]).export())


def changed(path: Path, **changes: Any) -> None:
    """Another description in the same file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = json.loads(header["__metadata__"]["qsr"]) | changes
    header["__metadata__"]["qsr"] = json.dumps({k: v for k, v in body.items() if v != "gone"})
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "vit_b17"}, "its network cannot be built (unknown network 'vit_b17')"),
        (
            {"network": "small_vit", "image_size": 30},
            "image_size 30 must be a multiple of patch_size",
        ),
        ({"network": "small_vit"}, "holds a different network: it lacks patch_norm.weight ("),
        ({"network": "timm", "timm_name": "resent"}, "cannot be built (Unknown model (resent))"),
        ({"classes": ["a", "b"]}, "is for 6 classes, not 2"),
        ({"format": 2}, "written by another version of qsr (format 2; this one reads 1)"),
        ({"step": "gone"}, "its metadata cannot be read ("),
        ({"crop_fraction": 7}, "its metadata cannot be read (crop_fraction must be in (0, 1]"),
    ],
)
def test_a_description_that_does_not_fit(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.safetensors", ABOUT)
    changed(path, **changes)
    with pytest.raises(ModelFileError) as refused:
        load_model(path)
    assert str(path) in str(refused.value)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_files(tmp_path: Path) -> None:
    old = tmp_path / "old.safetensors"
    safetensors.torch.save_file(network(ABOUT).state_dict(), old)
    with pytest.raises(ModelFileError, match="if an older version of qsr wrote it, use that v"):
        load_model(old)
    with pytest.raises(ModelFileError, match=f"{tmp_path / 'none.safetensors'} does not exist$"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(ModelFileError, match=r"has no model.safetensors: it is written when a run"):
        load_model(tmp_path)
    (tmp_path / "noise.pth").write_bytes(b"noise" * 100)
    with pytest.raises(ModelFileError, match="is not a readable safetensors file"):
        load_model(tmp_path / "noise.pth")
    whole = write(tmp_path / "cut.safetensors", ABOUT).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ModelFileError, match="is not a readable safetensors file"):
        load_model(tmp_path / "cut.safetensors")


def test_published_weights_come_in_several_wrappings(tmp_path: Path) -> None:
    state = network(ABOUT).state_dict()
    parallel = OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())
    wrapped: list[Any] = [state, {"state_dict": state}, {"model": state, "epoch": 3}, parallel]
    wrapped.append({"state_dict": parallel, "optimizer": {"lr": 0.1}})
    for number, content in enumerate(wrapped):
        torch.save(content, tmp_path / f"{number}.pth")
        found = read_weights(tmp_path / f"{number}.pth")
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    assert read_weights(tmp_path / "plain.safetensors").keys() == state.keys()


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Harmful(), "holds more than tensors, so loading it could run code"),
        ({"epoch": 3}, "does not hold a state dict: 'epoch' is not a tensor"),
        ([1, 2], "does not hold a state dict"),
        ({}, "does not hold a state dict"),
    ],
)
def test_what_is_no_state_dict(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=message) as refused:
        read_weights(tmp_path / "x.pth")
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"noise" * 1000])
def test_what_is_no_file_of_torch(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ModelFileError, match=re.escape(str(tmp_path / "x.pth"))) as refused:
        read_weights(tmp_path / "x.pth")
    assert "\n" not in str(refused.value)


def test_weights_of_another_shape_change_nothing() -> None:
    module, name = network(ABOUT), "0.0.weight"
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    other = {key: torch.ones_like(tensor) for key, tensor in before.items()}
    other[name] = torch.zeros(16, 3, 7, 7)
    message = (
        r"holds a different network: 0.0.weight has shape \[16, 3, 7, 7\], not \[16, 3, 3, 3\]$"
    )
    with pytest.raises(ModelFileError, match=r"^f.pth " + message):
        put_weights(module, other, Path("f.pth"), 6)
    with pytest.raises(ModelFileError, match=r"it has y, which this network lacks$"):
        put_weights(module, before | {"y": torch.zeros(1)}, Path("f.pth"), 6)
    assert all(torch.equal(module.state_dict()[key], tensor) for key, tensor in before.items())


def test_old_files_lack_the_counters_of_batchnorm() -> None:
    module, weights = network(ABOUT), network(ABOUT).state_dict()
    old = {n: t + 1 for n, t in weights.items() if not n.endswith("num_batches_tracked")}
    assert len(old) < len(weights)
    put_weights(module, old, Path("f.pth"), 6)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in old.items())


def test_the_room_for_many_class_names_is_taken(tmp_path: Path) -> None:
    """More than a MiB of them; and the file is not larger than what was taken."""
    names = tuple(f"n{number:08d} a long name of a class with ümläute" for number in range(21_000))
    about = replace(ABOUT, classes=names, top1=0.0, top5=None)
    folder, model = RunFolder(tmp_path), {"weight": torch.ones(1000)}
    wanted = missing_room(folder, model, about.metadata())
    assert wanted > len("".join(names).encode()) + 2**20
    reserve_results(folder, model, about.metadata())
    assert missing_room(folder, model, about.metadata()) == 0
    final = replace(about, top1=100 / 3, top5=200 / 3)
    write_results(folder, ModelFile(model, final.metadata()), {}, {})
    assert wanted - 2**20 - 2**12 <= folder.model.stat().st_size <= wanted - 2**20


def test_averages_over_time_have_their_room(tmp_path: Path) -> None:
    folder, model, about = RunFolder(tmp_path), {"weight": torch.ones(1000)}, ABOUT.metadata()
    one, three = (missing_room(folder, model, about, n) for n in ((), ("ema", "uniform")))
    assert three - 2**20 == 3 * (one - 2**20)
    reserve_results(folder, model, about, ("ema", "uniform"))
    assert missing_room(folder, model, about, ("ema", "uniform")) == 0
    files = {n: ModelFile({"weight": torch.full((1000,), v)}, about) for n, v in (("ema", 2.0),)}
    write_results(folder, ModelFile(model, about), {}, files)
    (weights,) = read_weights(folder.averaged_model("ema")).values()
    assert torch.equal(weights, torch.full((1000,), 2.0))


def test_the_pixels_are_normalised(tmp_path: Path) -> None:
    image: Tensor = load_model(write(tmp_path / "m.safetensors", ABOUT)).transform(
        Image.new("RGB", (40, 40), (102, 128, 153))
    )
    expected = (torch.tensor([102, 128, 153]) / 255 - torch.tensor(ABOUT.mean)) / torch.tensor(
        ABOUT.std
    )
    torch.testing.assert_close(image[:, 3, 4], expected, rtol=1e-5, atol=1e-5)
