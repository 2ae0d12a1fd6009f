#!/usr/bin/env python
"""Execute the notebooks.

    python scripts/notebooks.py [NOTEBOOK...]            store the new outputs
    python scripts/notebooks.py --check [NOTEBOOK...]    write nothing; list outdated notebooks
    python scripts/notebooks.py --runs FOLDER...         notebook 04 on the runs in these folders,
                                                         as notebooks/own/04_runs.ipynb, which
                                                         is written anew each time

The default is all of notebooks/. A notebook is up to date if executing it reproduces the stored
text exactly, and the stored pictures: every pixel if the same matplotlib, FreeType and processor
architecture drew them, otherwise only their sizes.
Exit status: 0 done, 1 a notebook is outdated (--check) or fails, 2 there are no runs.
"""

import argparse
import base64
import copy
import io
import os
import platform
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib as mpl
import nbformat
from matplotlib import ft2font
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from nbformat.reader import NotJSONError
from PIL import Image
from traitlets.config import Config

from qsr.output import program, warn
from qsr.report.collect import find_runs

ROOT = Path(__file__).parents[1]
OWN = ROOT / "notebooks" / "own" / "04_runs.ipynb"
DRAWN_BY = (
    f"matplotlib {mpl.__version__}, FreeType {ft2font.__freetype_version__} "
    f"({ft2font.__freetype_build_type__}), {platform.machine()}"
)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
    "pictures": DRAWN_BY,
}
"""Metadata of every executed notebook, without the date or the Python version."""


class NotebookError(Exception):
    """A notebook fails; the message is one line that says why."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="list outdated notebooks")
    parser.add_argument("--runs", nargs="+", type=Path, metavar="FOLDER", help="runs to look at")
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    options = parser.parse_args(arguments)
    if options.runs:
        return look_at(options.runs)
    status = 0
    for path in options.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb")):
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        try:
            stored = nbformat.read(path, as_version=4)
            executed = execute(stored, path.parent)
        except (OSError, NotJSONError, NotebookError) as error:
            warn(f"{name} fails: {error}")
            status = 1
            continue
        if not options.check:
            nbformat.write(executed, path)
            print(f"executed: {name}")
        elif stale := differences(stored, executed):
            warn(
                f"{name} is outdated ({', '.join(stale)}): run python scripts/notebooks.py {name}",
            )
            status = 1
    return status


def look_at(folders: list[Path]) -> int:
    """Write and execute a copy of notebook 04 for the runs in these folders; git ignores it."""
    if not find_runs(folders):
        warn(f"refused: no runs in {', '.join(map(str, folders))}")
        return 2
    copied = nbformat.read(ROOT / "notebooks" / "04_runs.ipynb", as_version=4)
    OWN.parent.mkdir(exist_ok=True)
    for cell in copied.cells:
        cell.source = cell.source.replace("](../", "](../../")  # links, one level deeper
        if cell.id == "parameters":
            listed = "".join(f"    {str(folder.resolve())!r},\n" for folder in folders)
            cell.source = f"RUNS = [\n{listed}]"
    try:
        nbformat.write(execute(copied, OWN.parent), OWN)
    except NotebookError as error:
        warn(f"{OWN} fails: {error}")
        return 1
    print(f"executed: {OWN}")
    return 0


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Execute a copy of the notebook in a new kernel, started in `folder`.

    Raises NotebookError if a cell fails, kills the kernel, or warns: a warning contains paths of
    this machine.
    """
    done = copy.deepcopy(notebook)
    with TemporaryDirectory() as scratch, Path(scratch, "kernel.log").open("w") as log:
        # sockets in a private folder, because another kernel could take the same port
        sockets = {"transport": "ipc", "ip": f"{scratch}/kernel"}
        client = NotebookClient(
            done,
            kernel_name="python3",
            config=Config({"KernelManager": sockets}),
            timeout=300,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        try:
            # Ignore the user's IPython settings. The log of the kernel is only used if it dies:
            # during shutdown it may complain about its closed sockets.
            client.execute(env=os.environ | {"IPYTHONDIR": f"{scratch}/ipython"}, stderr=log)
        except CellExecutionError as error:
            failed = next(cell.id for cell in done.cells if "error" in _kinds(cell))
            raise NotebookError(f"cell {failed}: {error.ename}: {error.evalue}") from None
        except DeadKernelError:
            last_words = Path(log.name).read_text().splitlines()[-1:]
            raise NotebookError(": ".join(["its kernel died", *last_words])) from None
    for cell in done.cells:
        if "stderr" in _kinds(cell):
            raise NotebookError(f"cell {cell.id} writes to stderr")
    done.metadata = nbformat.from_dict(METADATA)
    return done


def _kinds(cell: NotebookNode) -> set[str]:
    """The kinds of a cell's outputs; for a stream, its name."""
    return {output.get("name", output.output_type) for output in cell.get("outputs", [])}


def differences(stored: NotebookNode, executed: NotebookNode) -> list[str]:
    """The IDs of the cells whose stored outputs differ from the executed ones."""
    pixels = stored.metadata.get("pictures") == DRAWN_BY
    before, now = (_comparable(notebook, pixels=pixels) for notebook in (stored, executed))
    names = [one.id for one, other in zip(before.cells, now.cells, strict=True) if one != other]
    settings = {key: value for key, value in METADATA.items() if key != "pictures"}
    if {key: stored.metadata.get(key) for key in settings} != settings:
        names.append("metadata")
    return names


def _comparable(notebook: NotebookNode, *, pixels: bool) -> NotebookNode:
    """A copy with pictures replaced by what is compared: size and, if `pixels`, pixels."""
    result = copy.deepcopy(notebook)
    for cell in result.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
                data["image/png"] = (picture.size, picture.tobytes() if pixels else b"")
    return result


if __name__ == "__main__":
    program(main)
