"""Which decoder decodes: asked of the real DALI, and read from the logs of one with a GPU."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qsr.data.datasets import ImageFolder, open_validation_folder
from qsr.data.decoder import (
    LOG_LEVEL,
    decoders_at_work,
    fallback_note,
    log_errors_only,
    resolve_decode,
    summary_of,
)
from qsr.errors import DataError

pytest.importorskip("nvidia.dali")

CPU = torch.device("cpu")


def folder(root: Path, **files: str) -> ImageFolder:
    """Images of 60 x 40 pixels, by name and format."""
    (root / "val" / "a").mkdir(parents=True)
    for name, kind in files.items():
        pixels = (np.arange(60 * 40 * 3) % 256).astype(np.uint8).reshape(40, 60, 3)
        Image.fromarray(pixels).save(root / "val" / "a" / f"{name}.{kind}")
    return open_validation_folder(root)


def test_on_a_cpu_libjpeg_turbo_decodes(tmp_path: Path) -> None:
    images = folder(tmp_path, one="jpg", two="png", three="jpg")
    assert decoders_at_work(images, "cpu", CPU) == "libjpeg_turbo_decoder"


def test_other_formats_are_not_asked_about(tmp_path: Path) -> None:
    assert decoders_at_work(folder(tmp_path, one="png"), "cpu", CPU) is None


def test_a_decoder_that_fails_is_refused_before_the_run(tmp_path: Path) -> None:
    """There is no GPU here; with one, a driver may be missing or a decoder crash."""
    with pytest.raises(
        DataError, match=r"data\.decode=gpu: DALI fails on 1 images: use data.decode=cpu \("
    ):
        decoders_at_work(folder(tmp_path, one="jpg"), "gpu", torch.device("cuda:0"))


def test_an_image_counts_for_the_decoder_that_takes_it_last() -> None:
    log = "\x1b[0;32m[INFO] \x1b[0m[nvimgcodec] {}: {} process #{}"
    lines = [
        log.format(0, "nvjpeg_cuda_decoder", 0),
        log.format(0, "nvjpeg_cuda_decoder", 1),
        log.format(0, "nvjpeg_cuda_decoder", 2),
        "[WARNING] [nvjpeg_cuda_decoder] ROI decode with fancy upsampling may produce wrong ...",
        log.format(2, "libjpeg_turbo_decoder", 2),
    ]
    assert summary_of("a log of another form", 3) is None
    assert summary_of("\n".join(lines[:3]), 3) == "nvjpeg_cuda_decoder"
    assert summary_of("\n".join(lines), 3) == (
        "nvjpeg_cuda_decoder (2 of 3), libjpeg_turbo_decoder (1 of 3)"
    )


def test_images_that_the_log_does_not_name_were_decoded_by_the_hardware() -> None:
    """It takes batches; seen on an H100, whose log names no image."""
    created = "[INFO] [nvimgcodec] create nvjpeg_hw_decoder load_hint 1 load_hint_policy 3"
    assert summary_of(created, 16) == "nvjpeg_hw_decoder"
    given_up = f"{created}\n[INFO] [nvimgcodec] 0: libjpeg_turbo_decoder process #3"
    assert summary_of(given_up, 4) == "nvjpeg_hw_decoder (3 of 4), libjpeg_turbo_decoder (1 of 4)"


def test_a_fallback_to_the_cpu_is_one_line() -> None:
    assert fallback_note(None) is None
    assert fallback_note("nvjpeg_cuda_decoder") is None
    note = fallback_note("libjpeg_turbo_decoder")
    assert note is not None
    assert "\n" not in note
    assert note.startswith("data.decode=gpu, but libjpeg_turbo_decoder on the CPU")
    # also if it is so for some images only
    note = fallback_note("nvjpeg_hw_decoder (14 of 16), libjpeg_turbo_decoder (2 of 16)")
    assert note is not None
    assert note.startswith("data.decode=gpu, but libjpeg_turbo_decoder (2 of 16) on the CPU")
    assert fallback_note("nvjpeg_hw_decoder (9 of 16), nvjpeg_cuda_decoder (7 of 16)") is None


def test_where_to_decode() -> None:
    assert resolve_decode("auto", CPU) == "cpu"
    assert resolve_decode("auto", torch.device("cuda:1")) == "gpu"
    assert resolve_decode("cpu", torch.device("cuda:1")) == "cpu"


def test_warnings_for_every_image_are_off_unless_the_user_wants_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(LOG_LEVEL, raising=False)
    log_errors_only()
    assert os.environ[LOG_LEVEL] == "1"
    monkeypatch.setenv(LOG_LEVEL, "4")
    log_errors_only()
    assert os.environ[LOG_LEVEL] == "4"
