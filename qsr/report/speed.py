"""Results of benchmarks/ -> Markdown tables for docs/performance.md and its notebook."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from qsr.report.tables import markdown_table

Record = Mapping[str, Any]
"""The record that a benchmark wrote: results/bench/NAME.json."""


def read_benchmarks(folder: Path) -> dict[str, Record]:
    """The records of the benchmarks that have a table, by name."""
    return {
        name: json.loads(path.read_text())
        for name in SPEED_TABLES
        if (path := folder / f"{name}.json").exists()
    }


def speed_markdown(name: str, record: Record) -> str:
    """The table of a benchmark, and the machine that it ran on."""
    about = record["environment"]
    packages = about["packages"]
    machine = f"{about['gpu'] or about['cpu']}, {about['cores']} cores, torch {packages['torch']}"
    return f"{SPEED_TABLES[name](record)}\nRecorded on {machine}.\n"


def slow_link_markdown(record: Record) -> str:
    """One row per link: times relative to blocking data parallel training, measured and (in
    brackets) predicted."""
    lines = []
    for row in record["shares"]:
        methods = dict(row["methods"])
        blocking = next(iter(methods))
        rate, published = row["rate_mbit_per_second"], row["published_relative"]
        deviations = sorted(
            100 * (about["ratio_to_prediction"]["median"] - 1) for about in methods.values()
        )
        del methods[blocking]
        lines.append(
            {
                "communication": f"{100 * row['measured_share']['median']:.1f} %",
                "link": "not limited" if rate is None else f"{rate:,.0f} Mbit/s",
                **{
                    name: f"{about['relative']['median']:.3f} "
                    f"({about['predicted_relative']['median']:.3f})"
                    for name, about in methods.items()
                },
                "the paper's QSR": "" if published is None else f"{published:.3f}",
                "off prediction": f"{deviations[0]:+.1f} to {deviations[-1]:+.1f} %",
            }
        )
    return markdown_table(pd.DataFrame(lines))


def average_markdown(record: Record) -> str:
    """One row per way to average."""
    return markdown_table(
        pd.DataFrame(
            [
                {
                    "one average of ViT-B/16": name,
                    "seconds": f"{about['seconds']['median']:.3f}",
                    "ratio to the floor": _ratio(about["ratio_to_floor"]),
                    "extra memory (MB)": f"{about['extra_bytes'] / 1e6:.0f}",
                }
                for name, about in record["contenders"].items()
            ]
        )
    )


def trainer_markdown(record: Record) -> str:
    """One row per size of a step."""
    lines = []
    for name, found in record["cases"].items():
        seconds, overhead = found["seconds_per_step"], found["overhead_seconds"]
        low, high = (1e3 * quartile for quartile in overhead["quartiles"])
        lines.append(
            {
                "": _step(name, found["case"]),
                **{f"{k} (ms)": f"{1e3 * v['median']:.2f}" for k, v in seconds.items()},
                "overhead (ms)": f"{1e3 * overhead['median']:+.2f} ({low:+.2f} to {high:+.2f})",
                "ratio": _ratio(found["ratio"]),
            }
        )
    return markdown_table(pd.DataFrame(lines))


def host_memory_markdown(record: Record) -> str:
    """One row per size of a step."""
    lines = []
    for name, found in record["cases"].items():
        kinds, peak = found["seconds_per_step"], found["peak_bytes"]
        lines.append(
            {
                "": _step(name, found["case"]),
                **{f"{kind} (ms)": f"{1e3 * v['median']:.2f}" for kind, v in kinds.items()},
                "ratio": _ratio(found["ratio"]),
                **{f"{kind}, peak (MB)": f"{v['median'] / 1e6:.0f}" for kind, v in peak.items()},
            }
        )
    return markdown_table(pd.DataFrame(lines))


def loaders_markdown(record: Record) -> str:
    """One row per way to load: images per CPU-second, and the ratio to the reference."""
    texts: dict[tuple[str, str], str] = {}
    for part, loads in record["parts"].items():
        for name, about in loads.items():
            rate = about["images_per_cpu_second"]["median"]
            times = about["ratio_to_torchvision_on_pil"]["median"]
            texts[name, part] = f"{rate:,.0f} ({times:.2f})"
    return markdown_table(
        pd.DataFrame(
            [
                {
                    "images per CPU-second": name,
                    **{part: texts.get((name, part), "") for part in record["parts"]},
                }
                for name in dict.fromkeys(name for name, _ in texts)
            ]
        )
    )


def delay_markdown(record: Record) -> str:
    """One row per delay."""
    return markdown_table(
        pd.DataFrame(
            [
                {
                    "delay (steps)": delay,
                    "top-1, mean %": f"{about['mean']:.2f}",
                    **{
                        f"seed {seed}": f"{top1:.2f}"
                        for seed, top1 in zip(record["seeds"], about["top1"], strict=True)
                    },
                }
                for delay, about in record["by_delay"].items()
            ]
        )
    )


def scale_markdown(record: Record) -> str:
    """One row per number of workers: time of QSR's averages in steps per 1,000 steps, for each
    network and link."""
    rows = pd.DataFrame(record["modelled"])
    rows["workers"] = rows["workers"].map("{:,}".format)
    rows["of"] = rows["network"] + ", " + rows["link"]
    table = rows.pivot_table(
        index="workers", columns="of", values="steps_lost_per_1000", sort=False
    )
    return markdown_table(table.map("{:.2f}".format).reset_index())


def _step(name: str, case: Record) -> str:
    return f"{name}: {case['model']}, {case['batch']} images of {case['image_size']} px"


def _ratio(values: Record) -> str:
    low, high = values["quartiles"]
    return f"{values['median']:.3f} ({low:.3f} to {high:.3f})"


def gpu_steps_markdown(record: Record) -> str:
    """One row per network, precision and way to train."""
    rows = [
        {
            "network, precision": case,
            "loop": name,
            "images/s": f"{about['images_per_second']['median']:,.0f}",
            "speed to timm": _ratio(about["speed_to_timm"]),
            "of the matrix ceiling": f"{100 * about['share_of_matrix_products']['median']:.0f} %",
            "memory (GB)": f"{about['peak_memory_bytes'] / 1e9:.1f}",
        }
        for case, found in record["steps"].items()
        if "contenders" in found
        for name, about in found["contenders"].items()
    ]
    at = record.get("measured_at")
    when = f"\nMeasured on {at['date']} at revision {at['revision']}.\n" if at else ""
    return markdown_table(pd.DataFrame(rows)) + when


def gpu_loading_markdown(record: Record) -> str:
    """One row per way to load: images per second."""
    rows = [
        {
            "from JPEG files to normalised tensors": name,
            "images/s": f"{about['images_per_second']['median']:,.0f}",
        }
        for name, about in record.items()
        if isinstance(about, Mapping) and "images_per_second" in about
    ]
    return markdown_table(pd.DataFrame(rows))


SPEED_TABLES: dict[str, Callable[[Record], str]] = {
    "slow_link": slow_link_markdown,
    "average": average_markdown,
    "trainer": trainer_markdown,
    "host_memory": host_memory_markdown,
    "loaders": loaders_markdown,
    "delay": delay_markdown,
    "scale": scale_markdown,
    "gpu_steps_nvidia-h100-80gb-hbm3": gpu_steps_markdown,
    "gpu_graphs_nvidia-h100-80gb-hbm3": gpu_steps_markdown,
    "gpu_loading_nvidia-h100-80gb-hbm3": gpu_loading_markdown,
}
"""The benchmarks that have a table, and the functions that make it."""
