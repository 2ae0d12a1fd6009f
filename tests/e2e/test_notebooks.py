"""The notebooks are what executing them gives, and the check that says so sees what it should."""

import base64
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat import NotebookNode
from PIL import Image

from tests.cli import ROOT, loaded_script

SCRIPT = ROOT / "scripts" / "notebooks.py"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

DRAW = """\
%load_ext qsr.report.notebook
from pathlib import Path
from matplotlib.figure import Figure
figure = Figure(figsize=(2, 1))
_ = figure.subplots().plot([0, 1, int(Path("data.txt").read_text())])"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded_script("notebooks")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_current(path: Path) -> None:
    done = run("--check", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_notebooks_are_small_and_need_no_torch() -> None:
    names = ["01_rules", "02_tables", "03_cost", "04_runs", "05_speed", "06_generalization"]
    assert [path.stem for path in NOTEBOOKS] == names
    for path in NOTEBOOKS:
        assert path.stat().st_size < 500_000
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        modules = set(re.findall(r"^(?:from|import) ([\w.]+)", code, re.MULTILINE))
        layers = {".".join(name.split(".")[:2]) for name in modules}
        assert layers <= {
            *("qsr.core", "qsr.config", "qsr.planner", "qsr.report"),
            *("IPython.display", "pathlib"),
        }


def write(path: Path, **cells: str) -> Path:
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(text, id=name) for name, text in cells.items()]
    nbformat.write(notebook, path)
    return path


def test_execution_repeats_byte_for_byte_and_the_check_names_what_is_stale(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", draw=DRAW, show="figure", add="1 + 1")
    (tmp_path / "data.txt").write_text("3")

    # what was never executed is outdated
    fix = f"run python scripts/notebooks.py {path}"
    done = run("--check", path)
    assert done.returncode == 1
    assert done.stderr == f"{path} is outdated (draw, show, add, metadata): {fix}\n"

    assert run(path).stdout == f"executed: {path}\n"
    first = path.read_bytes()
    notebook = nbformat.read(path, as_version=4)
    (picture,) = notebook.cells[1].outputs
    assert picture.metadata == {"image/png": {"width": 200, "height": 100}}
    assert notebook.cells[2].outputs[0].data == {"text/plain": "2"}
    assert run(path).returncode == 0
    assert path.read_bytes() == first
    assert run("--check", path).returncode == 0

    # one more point on the axis: the size is the same, the pixels are not
    (tmp_path / "data.txt").write_text("4")
    done = run("--check", path)
    assert (done.returncode, done.stderr) == (1, f"{path} is outdated (show): {fix}\n")
    assert path.read_bytes() == first


def test_a_cell_that_fails_or_warns_is_named(tmp_path: Path) -> None:
    broken = write(tmp_path / "broken.ipynb", fine="1", boom="raise ValueError('no such thing')")
    loud = write(
        tmp_path / "loud.ipynb", warn="import warnings; warnings.warn('old', stacklevel=1)"
    )
    dead = write(
        tmp_path / "dead.ipynb", last="import os; os.write(2, b'out of memory\\n'); os._exit(1)"
    )
    before = broken.read_bytes(), loud.read_bytes()
    done = run(broken, loud, dead, tmp_path / "nowhere.ipynb")
    assert done.returncode == 1
    first, second, third, fourth = done.stderr.splitlines()
    assert first == f"{broken} fails: cell boom: ValueError: no such thing"
    assert second == f"{loud} fails: cell warn writes to stderr"
    assert third == f"{dead} fails: its kernel died: out of memory"
    assert "nowhere.ipynb fails: [Errno 2] No such file" in fourth
    assert (broken.read_bytes(), loud.read_bytes()) == before


def test_a_copy_of_notebook_04_shows_ones_own_runs(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep with long names, one of whose runs has not finished; the tracked one is untouched."""
    recorded, own = ROOT / "results" / "runs" / "demo" / "quadratic" / "seed_1", tmp_path / "it's"
    for alpha in ("0.2", "0.3", "0.4", "0.5"):
        folder = own / f"sync.alpha={alpha}" / "seed_1"
        shutil.copytree(recorded, folder)
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace("alpha: 0.4375", f"alpha: {alpha}"))
    (folder / "summary.json").unlink()
    tracked = (ROOT / "notebooks" / "04_runs.ipynb").read_bytes()
    ignored = ["git", "check-ignore", "--quiet", str(script.OWN)]
    assert subprocess.run(ignored, cwd=ROOT, check=False).returncode == 0
    copied = tmp_path / "own" / "04_runs.ipynb"
    monkeypatch.setattr(script, "OWN", copied)  # the user's stays
    assert script.main(["--runs", str(own)]) == 0
    assert (ROOT / "notebooks" / "04_runs.ipynb").read_bytes() == tracked
    cells = {cell.id: cell for cell in nbformat.read(copied, as_version=4).cells}
    assert cells["setup"].outputs[0].text == f"left out: {folder} has not finished\n"
    table = cells["bytes"].outputs[0].data["text/markdown"]
    for alpha in ("0.2", "0.3", "0.4"):
        assert f"QSR, H_base = 4, alpha = {alpha} " in table
    assert "](../../results/runs/README.md)" in cells["title"].source
    done = run("--runs", tmp_path / "nothing")
    assert (done.returncode, done.stderr) == (2, f"refused: no runs in {tmp_path / 'nothing'}\n")


def test_pictures_drawn_elsewhere_are_compared_by_size(script: ModuleType) -> None:
    def notebook(drawn_by: str, color: str, width: int) -> NotebookNode:
        png = io.BytesIO()
        Image.new("RGB", (width, 10), color).save(png, format="png")
        output = nbformat.v4.new_output(
            "display_data", {"image/png": base64.b64encode(png.getvalue()).decode()}
        )
        cell = nbformat.v4.new_code_cell("figure", id="picture", outputs=[output])
        metadata = script.METADATA | {"pictures": drawn_by}
        drawn: NotebookNode = nbformat.v4.new_notebook(cells=[cell], metadata=metadata)
        return drawn

    here = script.DRAWN_BY
    now = notebook(here, "red", 20)
    assert script.differences(notebook(here, "red", 20), now) == []
    assert script.differences(notebook(here, "blue", 20), now) == ["picture"]
    assert script.differences(notebook("matplotlib 1.0", "blue", 20), now) == []
    assert script.differences(notebook("matplotlib 1.0", "blue", 21), now) == ["picture"]
