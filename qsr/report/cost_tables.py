"""Forecasts beside the paper -> Markdown."""

from collections.abc import Iterable, Mapping

import pandas as pd

from qsr.planner.forecast import PRICE, Forecast, Method
from qsr.planner.text import basis_text, hours_text
from qsr.report.paper import Reference, ReferenceRow, reference_text
from qsr.report.tables import markdown_table


def published_hours(
    forecast: Forecast, method: Method, rows: Iterable[ReferenceRow]
) -> Reference | None:
    """The paper's hours for a method in the forecast of one of its rows: for the run itself, or for
    data parallel training, which blocks in the paper; otherwise None."""
    known = {row.experiment: row for row in rows}
    own = known[forecast.config.experiment]
    if method.planned:
        return own.total_hours
    if method.overlapped is not False:
        return None
    its = (row for row in known.values() if (row.table, row.model) == (own.table, own.model))
    return next(row.total_hours for row in its if row.rule == "parallel")


def cost_table_markdown(forecasts: Mapping[str, Forecast], rows: Iterable[ReferenceRow]) -> str:
    """Hours, GPU hours and price of each way to train, beside the paper's hours. The price needs
    speed.price_per_gpu_hour."""
    known, lines = tuple(rows), []
    for title, forecast in forecasts.items():
        assert forecast.config.speed is not None
        price = forecast.config.speed.price_per_gpu_hour
        for method in forecast.by_volume():
            assert method.cost is not None
            paper = published_hours(forecast, method, known)
            mark = "?" if forecast.unverified(method) else ""
            lines.append(
                {
                    "run": title,
                    "method": method.label,
                    "volume %": f"{100 * method.plan.volume:.1f}",
                    "computing h": hours_text(forecast, method, "compute"),
                    "communication h": hours_text(forecast, method, "communication"),
                    "total h": hours_text(forecast, method, "total"),
                    "basis": basis_text(method),
                    "paper h": reference_text(paper, ".1f"),
                    "GPU hours": f"{method.cost.gpu_hours:,.0f}{mark}",
                    "price": "-"
                    if price is None
                    else f"{price * method.cost.gpu_hours:,.0f}{mark}",
                }
            )
    return markdown_table(pd.DataFrame(lines))


def sources_markdown(forecasts: Iterable[Forecast]) -> str:
    """The constants behind the hours of forecasts, and where each comes from."""
    lines = [
        {
            "profile": forecast.config.speed.name,
            "constant": f"`{source.name}`",
            "value": f"{source.value:.6g}",
            "where it comes from": source.text,
        }
        for forecast in forecasts
        if forecast.config.speed is not None
        for source in forecast.sources
        if source.name != PRICE
    ]
    return markdown_table(pd.DataFrame(lines).drop_duplicates())
