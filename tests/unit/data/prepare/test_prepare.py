"""scripts/prepare.py: exit status and what it prints."""

from collections.abc import Callable
from pathlib import Path

import pytest

Prepare = Callable[..., int]


def test_digits(prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "digits")
    assert prepare("digits", "--root", root) == 0
    assert prepare("digits", "--root", root) == 0
    assert "1442 training, 355 validation images" in capsys.readouterr().out


def test_few_digits(prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("few_digits", "--to", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'few_digits'}: 200 training, 1001 test images" in printed
    assert f"{tmp_path / 'few_digits_tuning'}: 200 training, 596 tuning images" in printed


def test_check_accepts_sound_files(
    prepare: Prepare, own_photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("check", "--root", str(own_photos)) == 0
    assert "16 images, 0 broken" in capsys.readouterr().out


def test_check_lists_broken_files(
    prepare: Prepare, own_photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, cut = own_photos / "train/c0/002.jpg", own_photos / "val/c1/001.jpg"
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-300])
    assert prepare("check", "--root", str(own_photos), "--threads", "1") == 1
    printed = capsys.readouterr().out
    assert f"{empty}: " in printed
    assert f"{cut}: " in printed
    assert "16 images, 2 broken" in printed
    assert len(printed.splitlines()) == 3


def test_check_expects_imagenets_counts(
    prepare: Prepare, own_photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("check", "--root", str(own_photos), "--imagenet") == 1
    assert "has 2 classes, not 1,000" in capsys.readouterr().err
