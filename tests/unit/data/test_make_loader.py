"""Choosing a loader."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr.data import ImageFolder, make_loader
from qsr.data.torchvision import TorchvisionLoader
from qsr.errors import DataError
from tests.transforms import eval_transform

Photos = tuple[ImageFolder, ImageFolder]

OPTIONS: dict[str, Any] = {"batch_size": 2, "device": torch.device("cpu"), "threads": 1}


def test_auto_is_dali_where_installed(photos: Photos) -> None:
    dali = pytest.importorskip("qsr.data.dali")
    loader = make_loader("auto", photos[1], eval_transform(32), **OPTIONS)
    assert isinstance(loader, dali.DaliLoader)
    loader.close()


@pytest.fixture
def without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "qsr.data.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # its import fails
    monkeypatch.delitem(sys.modules, "qsr.data.dali_graph", raising=False)
    import nvidia

    monkeypatch.delattr(nvidia, "dali", raising=False)


@pytest.mark.usefixtures("without_dali")
def test_auto_is_torchvision_elsewhere(photos: Photos) -> None:
    loader = make_loader("auto", photos[1], eval_transform(32), **OPTIONS)
    assert isinstance(loader, TorchvisionLoader)
    loader.close()


@pytest.mark.usefixtures("without_dali")
def test_missing_dali_is_named(photos: Photos) -> None:
    with pytest.raises(DataError, match="pip install nvidia-dali"):
        make_loader("dali", photos[1], eval_transform(32), **OPTIONS)


@pytest.mark.parametrize("kind", ["auto", "torchvision"])
def test_gpu_decoding_needs_a_gpu(photos: Photos, kind: Any) -> None:
    with pytest.raises(DataError, match=r"decode=gpu needs .*decode=cpu"):
        make_loader(kind, photos[1], eval_transform(32), decode="gpu", **OPTIONS)


def test_importing_qsr_data_does_not_import_dali() -> None:
    script = "import sys, qsr.data; print('nvidia.dali' in sys.modules, 'sklearn' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["False", "False"]
