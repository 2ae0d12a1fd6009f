"""The benchmarks' programs. Their numbers come from a quiet machine; here they only have to run."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from benchmarks import gpu
from benchmarks.photos import write_photos
from qsr.train.vit import SimpleViT
from tests.cli import ROOT, call

BENCH = [sys.executable, str(ROOT / "scripts" / "bench.py")]


def benchmark(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Where no GPU is to be seen."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return call(["env", f"--chdir={ROOT}", "CUDA_VISIBLE_DEVICES=", *command])


def numbers(found: Any) -> Iterator[float]:
    """All of them, however deep."""
    if isinstance(found, bool | str) or found is None:
        return
    if isinstance(found, int | float):
        yield found
        return
    for value in found.values() if isinstance(found, dict) else found:
        yield from numbers(value)


def test_a_benchmark_that_there_is_not_is_refused() -> None:
    refused = call([*BENCH, "nonsense"])
    assert refused.returncode == 2
    error = refused.stderr.splitlines()[-1]
    assert "no benchmark is named nonsense: choose from slow_link, average, trainer, " in error
    parts = ", ".join(f"gpu_{part}" for part in gpu.PARTS)
    assert error.endswith(f", {parts}, gpu")


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    refused = benchmark("gpu", "graphs", "--folder", str(tmp_path))
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr == (
        "this benchmark needs a GPU, and torch sees none: use --rehearsal to test on the CPU\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_shows_why() -> None:
    failed = call(["env", "CUDA_VISIBLE_DEVICES=", *BENCH, "gpu_loading"])
    assert failed.returncode == 1
    reason, last = failed.stderr.splitlines()
    assert "torch sees none" in reason
    assert last == "failed: gpu_loading"


def rehearsed(part: str, folder: Path) -> dict[str, Any]:
    done = benchmark("gpu", part, "--rehearsal", "--folder", str(folder))
    assert done.returncode == 0, done.stderr
    path = folder / f"gpu_{part}_rehearsal.json"
    assert done.stdout.endswith(f"{path}\n")
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["environment"]["device"] == "cpu"
    assert '"error"' not in json.dumps(found)
    assert all(math.isfinite(number) and number >= 0 for number in numbers(found))
    return found


NETWORKS = {
    f"{network}, {precision}"
    for network in ("small_vit", "small_resnet")
    for precision in ("bf16", "fp16")
}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["steps_eager", "steps_compiled"])
def test_steps_on_a_gpu_are_rehearsed_on_the_cpu(tmp_path: Path, part: str) -> None:
    found = rehearsed(part, tmp_path)
    assert found["matrix_product_flop_per_second"].keys() == {"bf16", "fp16"}
    if part == "steps_eager":
        assert found["average"].keys() == {"2 workers", "4 workers"}
    assert found["steps"].keys() == NETWORKS
    workers = {"timm", "qsr, 1 worker", "qsr, 4 workers", "qsr, 16 workers"}
    for name, case in found["steps"].items():
        tuned = {"qsr, 1 worker, cudnn.benchmark"} if "resnet" in name else set()
        searching = {"qsr, 1 worker, scale searched"} if "fp16" in name else set()
        assert case["contenders"].keys() == workers | tuned | searching, name
        for about in case["contenders"].values():
            assert about["images_per_second"]["median"] > 0
            assert about["host_never_waits"] is None  # not to be known here


@pytest.mark.slow
def test_graphs_are_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    found = rehearsed("graphs", tmp_path)
    assert found["steps"].keys() == NETWORKS
    for case in found["steps"].values():
        assert case["images_per_step"] == 32
        assert case["contenders"].keys() == {
            "timm",
            "qsr, 1 worker",
            "qsr, 1 worker, CUDA graphs",
            "qsr, 4 workers, CUDA graphs",
            "qsr, 1 worker, compiled, CUDA graphs",
        }


@pytest.mark.slow
def test_loading_on_a_gpu_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    assert rehearsed("loading", tmp_path).keys() == {
        "environment",
        "seconds",
        "crop, flip; decoded on the CPU, 1 threads",
        "crop, flip, RandAugment; decoded on the CPU, 1 threads",
    }


@pytest.mark.slow
def test_the_recipes_run_end_to_end_from_files_and_from_memory(tmp_path: Path) -> None:
    found = rehearsed("end_to_end", tmp_path)
    assert found["vit_b16"].keys() == {"eager", "compiled"}
    assert found["resnet152"].keys() == {"eager", "CUDA graphs", "compiled, CUDA graphs"}
    for about in (*found["vit_b16"].values(), *found["resnet152"].values()):
        assert about["precision"] == "fp16"
        rates = about["images_per_second"]
        assert rates.keys() == {"from JPEG files", "from memory"}
        assert all(rate["repetitions"] == 6 and rate["median"] > 0 for rate in rates.values())
        assert about["files_to_memory"]["median"] > 0


def test_a_case_that_fails_is_recorded_and_the_rest_goes_on() -> None:
    size = gpu.rehearsal_size()
    network = replace(size.networks[0], timm_name="no_such_model", variants=(gpu.Variant(2),))
    found = gpu.measure_steps(network, "bf16", False, 1e12, size)["contenders"]
    assert found.keys() == {"timm", "qsr, 2 workers"}
    assert found["timm"] == {"error": "RuntimeError: Unknown model (no_such_model)"}
    assert found["qsr, 2 workers"]["images_per_second"]["median"] > 0


def test_what_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LIMIT_SECONDS", -1)
    found = gpu.graphs(gpu.rehearsal_size())
    assert found["steps"].keys() == NETWORKS
    for case in found["steps"].values():
        assert case == {"error": "left out: it would begin after -1 s"}


@pytest.mark.parametrize("variant", [None, gpu.Variant(1), gpu.Variant(4), gpu.Variant(16)])
def test_a_step_is_of_as_many_images_whoever_takes_it(variant: gpu.Variant | None) -> None:
    size = gpu.rehearsal_size()
    network = size.networks[0]
    if variant is None:
        step = gpu.timm_step(network, "bf16", False, size)
    else:
        step = gpu.qsr_step(network, "bf16", False, variant, size)
    batches = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, VisionTransformer | SimpleViT):
            batches.append(len(inputs[0]))

    hook = register_module_forward_pre_hook(count)
    step()
    hook.remove()
    assert batches == [size.micro_batch] * size.micro_batches


def test_flops_are_those_of_the_published_networks() -> None:
    """17.5 and 11.5 billion multiply-adds forward; twice as many backward, but for the gradients of
    the images."""
    for network, forward in zip(gpu.NETWORKS, (17.5e9, 11.5e9), strict=True):
        flops = gpu.flops_per_image(network, classes=1000, pixels=224)
        assert flops == pytest.approx(6 * forward, rel=0.01)


def test_every_way_of_loading_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from benchmarks import loaders

    photos, _ = write_photos(tmp_path / "photos", 6, size=(300, 280))
    found = loaders.measure(photos, images=6, repetitions=2)
    ways = {"qsr", "torchvision on PIL images", "torchvision on tensors", "timm"}
    assert {part: set(loads) for part, loads in found.items()} == {
        "training: crop, flip": ways,
        "training: crop, flip, RandAugment": ways,
        "validation": ways,
        "decoding alone": {"DALI", *ways} - {"qsr", "timm"},
    }
    assert all(math.isfinite(number) and number > 0 for number in numbers(found))


def test_photos_are_as_large_as_photographs(tmp_path: Path) -> None:
    train, val = write_photos(tmp_path / "photos", 8)
    sizes = [Path(train.path(index)).stat().st_size for index in range(len(train))]
    assert 60_000 < sum(sizes) / len(sizes) < 76_000
    assert sorted(train.labels) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert val.labels == train.labels
