"""Records -> tables. Numbers become text only in the Markdown."""

from collections.abc import Mapping, Sequence

import pandas as pd

from qsr.report.collect import Run


def rule_table(groups: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """One row per rule: means over its seeds, and the standard deviation of top-1."""
    return pd.DataFrame([_row(label, runs) for label, runs in groups.items()])


def _row(label: str, runs: Sequence[Run]) -> dict[str, str | float]:
    data = pd.DataFrame([run.summary for run in runs])
    row: dict[str, str | float] = {
        "rule": label,
        "seeds": len(runs),
        "top1_mean": data["top1"].mean(),
        "top1_std": data["top1"].std(),
        "averages": data["averages"].mean(),
        "volume": data["volume"].mean(),
        "bytes_sent_per_worker": data["bytes_sent_per_worker"].mean(),
        "train_seconds": data["train_seconds"].mean(),
    }
    if "communication_seconds" in data:
        row["communication_seconds"] = data["communication_seconds"].mean()
    return row


def rule_table_markdown(table: pd.DataFrame) -> str:
    """A rule_table as Markdown, with units in the header and a dash for missing values."""
    text = pd.DataFrame(
        {
            "rule": table["rule"],
            "seeds": table["seeds"].astype(str),
            "top-1 %": [
                f"{mean:.2f} ± {std:.2f}" if count > 1 else f"{mean:.2f}"
                for mean, std, count in zip(
                    table["top1_mean"], table["top1_std"], table["seeds"], strict=True
                )
            ],
            "rounds": table["averages"].map("{:.0f}".format),
            "volume %": (100 * table["volume"]).map("{:.1f}".format),
            "MB sent per worker": (table["bytes_sent_per_worker"] / 1e6).map("{:.1f}".format),
            "training s": table["train_seconds"].map("{:.1f}".format),
            "of it communication s": [
                "-" if pd.isna(value) else f"{value:.1f}"
                for value in table.get("communication_seconds", [float("nan")] * len(table))
            ],
        }
    )
    return markdown_table(text)


def averages_table_markdown(runs: Mapping[str, Run]) -> str:
    """Averages and bytes of each run, planned and counted in training."""
    rows = []
    for label, run in runs.items():
        planned = run.summary["planned"]
        known = bool(planned)  # not if the rounds followed the loss
        rows.append(
            {
                "run": label,
                "steps": f"{run.plan.total_steps:,}",
                "averages planned": f"{planned['averages']:,}" if known else "-",
                "averages made": f"{run.summary['averages']:,}",
                "volume %": f"{100 * run.summary['volume']:.1f}",
                "MB per worker, planned": f"{planned['bytes_sent_per_worker'] / 1e6:,.3f}"
                if known
                else "-",
                "MB per worker, sent": f"{run.summary['bytes_sent_per_worker'] / 1e6:,.3f}",
            }
        )
    return markdown_table(pd.DataFrame(rows))


def markdown_table(text: pd.DataFrame) -> str:
    """A table of strings as Markdown; columns are aligned in the source too."""
    rows = [text.columns.tolist(), *text.to_numpy().tolist()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def time_unit(seconds: float) -> tuple[str, int]:
    """The unit for times up to `seconds`, and the seconds in it."""
    if seconds >= 2 * 3600:
        return "hours", 3600
    return ("minutes", 60) if seconds >= 2 * 60 else ("seconds", 1)
