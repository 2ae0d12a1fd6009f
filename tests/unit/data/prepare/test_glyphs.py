"""The glyphs: letters as drawn by real fonts, split by family, the same bytes every time."""

import csv
import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from qsr.data import open_image_folders
from qsr.data.prepare.fonts import Font, installed_fonts, licence_of
from qsr.data.prepare.glyph_drawing import CHARACTERS, draw_font, drawn
from qsr.data.prepare.glyphs import Typeface, prepare_glyphs, validation_groups
from qsr.errors import DataError
from tests.unit.data.prepare.test_digits import content

FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
TEXT = ["DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "cmr10", "cmss10", "cmtt10"]
NO_TEXT = ["STIXSizOneSymReg", "STIXNonUni", "cmex10"]


def font(path: Path) -> Font:
    return Font(path, hashlib.sha256(path.read_bytes()).hexdigest(), "fonts-x", "1.0", "OFL-1.1")


@pytest.fixture(scope="module")
def fonts() -> list[Font]:
    return [font(FOLDER / f"{name}.ttf") for name in sorted(TEXT + NO_TEXT)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, fonts: list[Font]) -> Path:
    root = tmp_path_factory.mktemp("data") / "glyphs"
    assert sum(prepare_glyphs(root, fonts)) > 200
    return root


def manifest(root: Path) -> list[dict[str, str]]:
    with (root / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_same_fonts_give_the_same_bytes(root: Path, fonts: list[Font], tmp_path: Path) -> None:
    prepare_glyphs(tmp_path / "again", fonts)
    assert content(tmp_path / "again") == content(root)


def test_the_manifest_names_every_font_that_was_used(root: Path, fonts: list[Font]) -> None:
    rows = manifest(root)
    known = {font.path.name: font.sha256 for font in fonts}
    assert {row["file"] for row in rows} == {f"{name}.ttf" for name in TEXT}
    assert all(known[row["file"]] == row["sha256"] for row in rows)
    first = rows[0]
    assert (first["package"], first["version"], first["licence"]) == ("fonts-x", "1.0", "OFL-1.1")
    splits = open_image_folders(root)
    assert sum(int(row["images"]) for row in rows) == sum(map(len, splits))


def test_no_family_is_in_both_splits(root: Path) -> None:
    groups: dict[str, set[str]] = {"train": set(), "val": set()}
    numbers = {f"{int(row['number']):04d}": row for row in manifest(root)}
    for split in open_image_folders(root):
        for file in split.files:
            row = numbers[Path(file).stem]
            assert row["split"] == split.split
            groups[split.split].add(row["family"].split()[0])
    assert groups["val"]
    assert not groups["train"] & groups["val"]


def test_pictures_fill_the_box_and_come_once(root: Path) -> None:
    for split in open_image_folders(root):
        seen = set()
        for index, file in enumerate(split.files):
            with Image.open(split.path(index)) as image:
                assert (image.mode, image.size) == ("L", (32, 32))
                picture = np.asarray(image)
            rows, columns = np.flatnonzero(picture.any(1)), np.flatnonzero(picture.any(0))
            longer = max(np.ptp(rows), np.ptp(columns)) + 1
            assert 26 <= longer <= 28, file
            seen.add((split.labels[index], picture.tobytes()))
        assert len(seen) == len(split)


def test_what_a_font_lacks_is_left_out() -> None:
    shown = drawn(draw_font(FOLDER / "DejaVuSansDisplay.ttf"))  # a few symbols only
    assert not shown.any()
    assert drawn(draw_font(FOLDER / "DejaVuSans.ttf")).all()


def test_a_file_that_is_no_font_is_left_out(tmp_path: Path, fonts: list[Font]) -> None:
    broken = tmp_path / "broken.ttf"
    broken.write_bytes((FOLDER / "DejaVuSans.ttf").read_bytes()[:1000])
    assert prepare_glyphs(tmp_path / "one", [font(broken), *fonts]) == prepare_glyphs(
        tmp_path / "two", fonts
    )
    with pytest.raises(DataError, match="none of 1 fonts has the Latin letters"):
        prepare_glyphs(tmp_path / "none", [font(broken)])
    assert not (tmp_path / "none").exists()


def test_a_font_under_another_name_is_one(tmp_path: Path, fonts: list[Font]) -> None:
    from fontTools.ttLib import TTFont

    clone = tmp_path / "clone.ttf"
    with TTFont(FOLDER / "DejaVuSans.ttf") as original:
        for name_id in (1, 16):
            original["name"].setName("Zebra", name_id, 3, 1, 0x409)
        original.save(clone)
    prepare_glyphs(tmp_path / "both", [*fonts, font(clone)])
    assert "Zebra" not in {row["family"] for row in manifest(tmp_path / "both")}


def test_a_fifth_of_the_images_is_for_validation() -> None:
    glyphs = np.ones((len(CHARACTERS), 32, 32), np.uint8)
    faces = [
        Typeface(Font(Path("x"), "", "", "", ""), f"{name} {style}", glyphs)
        for name in map(str, range(50))
        for style in ("Sans", "Serif")
    ]
    assert len(validation_groups(faces)) == 10


def test_another_folder_is_refused(tmp_path: Path, root: Path, fonts: list[Font]) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"other is not the glyphs data set: there is no manifest"):
        prepare_glyphs(tmp_path / "other", fonts)
    before = content(root)
    assert sum(prepare_glyphs(root, [])) > 200  # it is there, so no font is needed
    assert content(root) == before


def fake_dpkg(folder: Path, monkeypatch: pytest.MonkeyPatch, *installed: str) -> None:
    """A system on which only these packages are installed."""
    lines = "".join(f"echo installed {name} 1.2-3;" for name in installed)
    script = folder / "dpkg-query"
    script.write_text(f"#!/bin/sh\ncase $1 in --show) {lines} exit 1;; esac\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_missing_packages_are_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_dpkg(tmp_path, monkeypatch, "fonts-here")
    with pytest.raises(DataError) as refused:
        installed_fonts(["fonts-a", "fonts-here", "fonts-b"])
    assert str(refused.value) == (
        "2 of 3 font packages are missing: apt-get install --no-install-recommends fonts-a fonts-b"
    )


def test_elsewhere_than_on_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="no dpkg-query here"):
        installed_fonts(["fonts-a"])


def packages_here() -> Sequence[str]:
    try:
        found = subprocess.run(["dpkg-query", "-W", "fonts-dejavu-core"], capture_output=True)
    except FileNotFoundError:
        return ()
    return ("fonts-dejavu-core",) if found.returncode == 0 else ()


@pytest.mark.skipif(not packages_here(), reason="fonts-dejavu-core is not installed")
def test_fonts_of_an_installed_package() -> None:
    fonts = installed_fonts(packages_here())
    assert "DejaVuSans.ttf" in {font.path.name for font in fonts}
    assert [font.path for font in fonts] == sorted(font.path for font in fonts)
    for font in fonts:
        assert font.package == "fonts-dejavu-core"
        assert font.version
        assert font.licence
        assert font.sha256 == hashlib.sha256(font.path.read_bytes()).hexdigest()


def test_licences_of_a_copyright_file(tmp_path: Path) -> None:
    file = tmp_path / "copyright"
    file.write_text("Files: *\nLicense: OFL-1.1\n text\n\nFiles: debian/*\nLicense:  GPL-2+\n\n")
    assert licence_of(file) == "OFL-1.1; GPL-2+"
    file.write_text("All of it is free.")
    assert licence_of(file) == f"see {file}"
    assert licence_of(tmp_path / "none") == f"see {tmp_path / 'none'}"
