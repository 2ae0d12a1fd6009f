"""A study's tables for the terminal, in Markdown and in LaTeX."""

import re
from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qsr.report.study import Study
from qsr.report.study_numbers import study_table
from qsr.report.study_sheets import Cell, Sheet, sheets, summary_lines
from qsr.report.symbols import SYMBOL, SYMBOLS
from qsr.report.tables import markdown_table

WIDTH = 140
"""Columns of a table where the output is no terminal."""

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def print_study(study: Study, console: Console | None = None) -> None:
    """Print the tables on the terminal."""
    console = console or _console()
    for line in summary_lines(study):
        console.print(Text(line))
    for sheet in sheets(study):
        console.print()
        console.print(Text(sheet.title, style="bold"))
        for columns in _fitting(sheet, console.width):
            console.print(_rich_table(sheet, columns))
        for note in sheet.notes:
            console.print(Text(note, style="dim"))


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


_GAP = 3
"""Blanks between columns, at most."""
_NAME = 32
"""Width of a group's name before it is broken; a third of a narrow terminal's width."""


def _fitting(sheet: Sheet, width: int) -> list[list[int]]:
    """The numbers of the columns of each table into which a sheet is divided, so that no number is
    broken; each table has the first column."""
    names, *others = (
        max(
            len(line)
            for cell in [Cell(title), *(row[place] for row in sheet.rows)]
            for line in cell
        )
        for place, title in enumerate(sheet.header)
    )
    tables, left = [[0]], 0
    for place, needed in enumerate(others, start=1):
        if left < needed + _GAP or place == 1:
            tables.append([0])
            left = width - min(names, _NAME, width // 3) - _GAP
        tables[-1].append(place)
        left -= needed + _GAP
    return tables[1:] or tables


def _rich_table(sheet: Sheet, columns: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place in columns:
        numbers = place > 0
        table.add_column(
            Text(sheet.header[place]),
            justify="right" if numbers else "left",
            overflow="fold",
            no_wrap=numbers,
        )
    for row in sheet.rows:
        table.add_row(*(Text("\n".join(filter(None, row[place]))) for place in columns))
    return table


def study_markdown(study: Study) -> str:
    """The tables in Markdown."""
    parts = [f"{line}." for line in summary_lines(study)]
    for sheet in sheets(study):
        rows = [[_markdown(" ".join(filter(None, cell))) for cell in row] for row in sheet.rows]
        table = markdown_table(pd.DataFrame(rows, columns=sheet.header)).rstrip("\n")
        parts += [f"**{_markdown(sheet.title)}**", table, *map(_markdown, sheet.notes)]
    return "\n\n".join(parts) + "\n"


def _markdown(text: str) -> str:
    return re.sub(r"([|*_<`])", r"\\\1", text)


def study_csv(study: Study) -> str:
    """The `study_table` as CSV; unknown numbers are empty."""
    return study_table(study).to_csv(index=False)


def study_latex(study: Study) -> str:
    """The tables in LaTeX, for the package booktabs: intervals stand below means."""
    comments = [f"% {line}" for line in summary_lines(study)]
    tables = [_latex_table(sheet) for sheet in sheets(study)]
    return "\n".join([*comments, r"% \usepackage{booktabs}", *tables])


def _latex_table(sheet: Sheet) -> str:
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(sheet.title)}. {latex(' '.join(sheet.notes))}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(sheet.header) - 1)}}}",
        r"\toprule",
        _latex_row(sheet.header),
        r"\midrule",
    ]
    for place, row in enumerate(sheet.rows):
        lines += [r"\addlinespace"] * bool(place) + _latex_rows(row)
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _latex_rows(row: Sequence[Cell]) -> list[str]:
    """A row, and one below it for the intervals if it has any."""
    lines = [_latex_row([cell.value for cell in row])]
    if any(cell.interval for cell in row):
        lines.append(_latex_row([cell.interval for cell in row], r"\footnotesize "))
    return lines


def _latex_row(cells: Sequence[str], size: str = "") -> str:
    texts = (f"{{{size}{latex(cell)}}}" if cell else "" for cell in cells)
    return " & ".join(texts) + r" \\"


def latex(text: str) -> str:
    """Text as LaTeX shows it; symbols and signed numbers are set as mathematics."""
    pieces = re.split(SYMBOL, text)
    pieces[::2] = (_latex_words(words) for words in pieces[::2])
    pieces[1::2] = (SYMBOLS[name] for name in pieces[1::2])
    return "".join(pieces)


def _latex_words(text: str) -> str:
    escaped = "".join(_LATEX.get(sign, sign) for sign in text)
    return re.sub(r"(?<![\w.])[+-](?=\d)[\d.,]*\d", r"$\g<0>$", escaped)
