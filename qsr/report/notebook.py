"""Figures in notebooks: after `%load_ext qsr.report.notebook` a notebook displays Figures.

It replaces `%matplotlib inline`, so that a figure gives the same small file wherever the notebook
is executed.
"""

from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure

from qsr.report.style import png

_SHOWN_DPI = 100


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Called by IPython."""
    assert shell.display_formatter is not None  # only shells without output have none
    shell.display_formatter.formatters["image/png"].for_type(Figure, _show)


def _show(figure: Figure) -> tuple[bytes, dict[str, Any]]:
    """PNG of the figure, and its size on the screen in pixels."""
    width, height = figure.get_size_inches() * _SHOWN_DPI
    return png(figure), {"width": round(width), "height": round(height)}
