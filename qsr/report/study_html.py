"""A study as one HTML page that needs no other file and no network."""

import base64
import io
import re
from html import escape

import matplotlib as mpl
from matplotlib.figure import Figure

from qsr.report import study_plots
from qsr.report.study import Study
from qsr.report.study_sheets import (
    Cell,
    Sheet,
    runs_sheet,
    settings_sheet,
    sheets,
    summary_lines,
)
from qsr.report.style import STYLE
from qsr.report.symbols import SYMBOL

_SYMBOLS = {"H_base": "<i>H</i><sub>base</sub>", "alpha": "<i>&alpha;</i>", "H": "<i>H</i>"}

_PICTURES = (
    (
        study_plots.top1_figure,
        "Final top-1: dots are seeds, diamonds means, bars their 95 % intervals by Student's t. "
        "Differences, if there are any, are means over the pairs of equal seeds.",
    ),
    (
        study_plots.progress_figure,
        "Validation: lines are means over the seeds, bands (of up to six groups) reach from the "
        "lowest to the highest seed.",
    ),
    (
        study_plots.schedule_figure,
        "Learning rate and H, as planned; one learning rate in grey is that of all groups, and "
        "dots are averages.",
    ),
    (
        study_plots.times_figure,
        "Where time went: means over the runs. Waiting or communication that was not measured is "
        "part of computing.",
    ),
)

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ max-width: 72rem; margin: 0 auto; padding: 1rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  border-top: 2px solid; border-bottom: 2px solid; }}
th, td {{ padding: .35rem .7rem; text-align: right; vertical-align: top; }}
th:first-child, td:first-child {{ text-align: left; min-width: 9rem; overflow-wrap: break-word; }}
td, thead th {{ white-space: nowrap; }}
thead th {{ border-bottom: 1px solid; }}
tbody th {{ font-weight: normal; text-align: left; }}
tbody tr + tr > * {{ border-top: 1px solid #e3e3e3; }}
small {{ display: block; color: #555; }}
.note, figcaption {{ color: #555; font-size: .85rem; max-width: 60rem; }}
figure {{ margin: 2rem 0; }}
img {{ display: block; max-width: 100%; min-width: 36rem; height: auto; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def study_html(study: Study) -> str:
    """The page: tables, pictures, and every run."""
    first, *more = summary_lines(study)
    tables = [_section(sheet) for sheet in sheets(study)]
    pictures = [_figure(draw(study), caption) for draw, caption in _PICTURES]
    details = [_section(sheet) for sheet in (settings_sheet(study), runs_sheet(study))]
    notes = f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in more)}</ul>" if more else ""
    body = [f"<h1>{escape(first)}</h1>", notes, *tables, *pictures, *details]
    return _PAGE.format(title=escape(first), body="\n".join(filter(None, body)))


def _section(sheet: Sheet) -> str:
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in sheet.header)
    rows = "\n".join(
        f'<tr><th scope="row">{_symbols(first.value)}</th>{"".join(map(_data, others))}</tr>'
        for first, *others in sheet.rows
    )
    notes = "".join(f'\n<p class="note">{_symbols(note)}</p>' for note in sheet.notes)
    return (
        f'<h2>{_symbols(sheet.title)}</h2>\n<div class="scroll"><table>\n<thead><tr>{head}</tr>'
        f"</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>{notes}"
    )


def _data(cell: Cell) -> str:
    interval = f"<small>{escape(cell.interval)}</small>" if cell.interval else ""
    return f"<td>{_symbols(cell.value)}{interval}</td>"


def _symbols(text: str) -> str:
    """Text as HTML, with symbols typeset."""
    return re.sub(SYMBOL, lambda found: _SYMBOLS[found[1]], escape(text))


def _figure(figure: Figure, caption: str) -> str:
    """The figure as an SVG inside the page, at its own size or as wide as the screen."""
    drawn = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    picture = base64.b64encode(drawn.getvalue()).decode()
    width = round(96 * figure.get_size_inches()[0])
    return (
        f'<figure><div class="scroll"><img width="{width}" alt="{escape(caption)}" '
        f'src="data:image/svg+xml;base64,{picture}"></div>'
        f"<figcaption>{_symbols(caption)}</figcaption></figure>"
    )
