"""Forecasts as tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from qsr.config.schema import SpeedConfig
from qsr.core.cost import Link
from qsr.planner import what_if
from qsr.planner.forecast import Forecast, Method
from qsr.planner.profiles import Measurement
from qsr.planner.solve import Solution

WIDTH = 100


def print_forecast(forecast: Forecast) -> None:
    """Print one run: its rounds, and a row for each way to train."""
    console = make_console()
    config, plan, longest = forecast.config, forecast.plan, forecast.plan.longest_round
    rounds = list(plan.rounds())
    speeds = f", speeds of {config.speed.name}" if config.speed else ""
    console.print(f"{config.experiment}, cluster {config.cluster.name}{speeds}", style="bold")
    console.print(
        f"{config.model.label}, {forecast.parameters:,} parameters; "
        f"{_workers(forecast)}{_place(forecast)}; global batch {config.global_batch:,}"
    )
    console.print(
        f"{plan.total_steps:,} steps = {config.epochs} epochs of {forecast.steps_per_epoch:,}; "
        f"{plan.num_rounds:,} rounds, volume {100 * plan.volume:.1f} %"
    )
    console.print(
        f"H {rounds[0].length:,} at the start, {rounds[-1].length:,} at the end; longest round "
        f"{longest.length:,} steps ({longest.length / forecast.steps_per_epoch:.1f} epochs), from "
        f"step {longest.start:,}"
    )
    console.print(_method_table(forecast))
    blocking, overlapped = (forecast.speedup(overlapped=flag) for flag in (False, True))
    if blocking is not None and overlapped is not None:
        console.print(
            f"{forecast.planned.label}: {blocking:.2f} times as fast as blocking data parallel "
            f"training, {overlapped:.2f} times as fast as overlapped data parallel training"
        )
    for note in forecast.notes():
        console.print(f"  {note}")
    print_sources(console, [forecast])


def plan_line(forecast: Forecast) -> str:
    """One line about a run, before it starts."""
    config, plan, run = forecast.config, forecast.plan, forecast.planned
    longest = plan.longest_round
    text = (
        f"{plan.total_steps:,} steps in {config.epochs} epochs, {plan.num_rounds:,} rounds (volume "
        f"{100 * plan.volume:.1f} %), the longest of H={longest.length:,} from step "
        f"{longest.start:,}; {_workers(forecast)}, global batch {config.global_batch:,}; "
    )
    if run.cost is None:
        return text + forecast.why_no_times
    hours = hours_text(forecast, run, "total")
    return text + f"{hours} h ({basis_text(run)}), {number_text(run.cost.gpu_hours)} GPU hours"


def print_sweep(settings: Sequence[Mapping[str, str]], forecasts: Sequence[Forecast]) -> None:
    """Print a row for each of several runs, with the settings that distinguish them."""
    console = make_console()
    table = make_table(
        *(".\n".join(name.rsplit(".", 1)) for name in settings[0]),
        *("rounds", "volume\n%", "longest\nround", "in\nepochs", "total\nh"),
        *("", "vs blocking\ndata parallel", "vs overlapped\ndata parallel"),
    )
    for values, forecast in zip(settings, forecasts, strict=True):
        plan, own = forecast.plan, forecast.planned
        longest = plan.longest_round.length
        table.add_row(
            *values.values(),
            f"{plan.num_rounds:,}",
            f"{100 * plan.volume:.1f}",
            f"{longest:,}",
            f"{longest / forecast.steps_per_epoch:.1f}",
            hours_text(forecast, own, "total"),
            basis_text(own),
            *(_ratio(forecast.speedup(overlapped=flag)) for flag in (False, True)),
        )
    console.print(table)
    for note in dict.fromkeys(note for forecast in forecasts for note in forecast.notes()):
        console.print(f"  {note}")
    if any(f.planned.overlapped and f.plan.gradient_rounds for f in forecasts):
        console.print(
            "  data parallel overlaps its averages with the backward pass here; the paper's does "
            "not: cluster.overlap_gradients=false"
        )
    print_sources(console, forecasts)


def print_calibration(speed: SpeedConfig, found: Measurement) -> None:
    """Print the measured times beside the fitted ones."""
    console = make_console()
    console.print(f"{found.key}: {1000 * found.seconds_per_image:.4g} ms per image and rank")
    if speed.link_gbit_per_second is None:
        console.print("one rank: no all-reduce to measure")
        return
    steps = found.data_parallel
    if steps is not None:
        text = f"a step of {steps.images} images per rank takes "
        text += f"{1000 * found.seconds_per_image * steps.images:.4g} ms alone, "
        text += f"{1000 * steps.blocking_seconds:.4g} ms with its all-reduce"
        if steps.overlapped_seconds is not None:
            text += f", {1000 * steps.overlapped_seconds:.4g} ms if they overlap"
        console.print(text)
    link = Link(
        found.ranks,
        found.machines,
        speed.link_gbit_per_second * 1e9 / 8,
        speed.latency_seconds,
    )
    table = make_table("all-reduce\nMB", "measured\nms", "fit\nms")
    for size, seconds in zip(found.sizes_bytes, found.allreduce_seconds, strict=True):
        fit = 1000 * link.seconds(size)
        table.add_row(f"{size / 1e6:.4g}", f"{1000 * seconds:.4g}", f"{fit:.4g}")
    console.print(table)
    console.print(
        f"link {speed.link_gbit_per_second:.4g} Gbit/s, latency "
        f"{1e6 * speed.latency_seconds:.4g} microseconds: "
        f"{speed.sources['link_gbit_per_second'].partition(';')[0]}"
    )
    if speed.inside_gbit_per_second is not None:
        console.print(
            f"between the ranks of a machine {speed.inside_gbit_per_second:.4g} Gbit/s: "
            f"{speed.sources['inside_gbit_per_second']}"
        )


def print_what_if(cases: Sequence[what_if.Case]) -> None:
    """Print a row per network and GPU and a column per link, for the smallest number of workers."""
    console = make_console()
    fewest = [case for case in cases if case.workers == min(case.workers for case in cases)]
    links = sorted({case.link_gbit_per_second for case in cases})
    console.print(
        f"Time that QSR saves with {fewest[0].workers} workers, in % of blocking/overlapped "
        f"data parallel training; columns: effective link of a machine in Gbit/s"
    )
    table = make_table("", "GPU", *(f"{link:g}" for link in links))
    for network, gpu in dict.fromkeys((case.network, case.gpu) for case in fewest):
        row = {c.link_gbit_per_second: c for c in fewest if (c.network, c.gpu) == (network, gpu)}
        shares = [(row[x].saved_of_blocking, row[x].saved_of_overlapped) for x in links]
        cells = [f"{round(100 * blocking)}/{round(100 * over)}" for blocking, over in shares]
        mark = "?" if next(iter(row.values())).unverified else ""
        table.add_row(network + mark, f"{what_if.GPUS[gpu]}x", *cells)
    console.print(table)
    console.print(f"Up to {max(case.workers for case in cases):,} workers: {_spread(cases)}.")
    console.print("All times are predicted; ?: from an unverified speed. Assumptions:")
    for assumption in what_if.assumptions():
        console.print(f"  {assumption}")


def _spread(cases: Sequence[what_if.Case]) -> str:
    """How much the saved time changes with the number of workers."""
    alike: dict[tuple[str, str, float], list[float]] = {}
    for case in cases:
        key = (case.network, case.gpu, case.link_gbit_per_second)
        alike.setdefault(key, []).append(case.saved_of_overlapped)
    most = max(max(values) - min(values) for values in alike.values())
    return f"within {100 * most:.1f} points of these"


def _workers(forecast: Forecast) -> str:
    each = forecast.config.ranks_per_worker
    return f"{forecast.config.workers} workers" + (f" of {each} ranks each" if each > 1 else "")


def _place(forecast: Forecast) -> str:
    if forecast.model is None:
        return ""
    allreduce = forecast.model.allreduce
    return f" on {_count(allreduce.ranks, 'rank')} of {_count(allreduce.machines, 'machine')}"


def _method_table(forecast: Forecast) -> Table:
    speed, with_times = forecast.config.speed, forecast.model is not None
    price = with_times and speed is not None and speed.price_per_gpu_hour
    names = ["", "rounds", "volume\n%", "GB per\nworker"]
    if with_times:
        names += ["GB per\nlink", "compute\nh", "comm.\nh", "total\nh", "GPU\nh"]
        names += ["price", ""] if price else [""]
    table = make_table(*names)
    for method in forecast.methods:
        cells = [
            method.label,
            f"{method.plan.num_rounds:,}",
            f"{100 * method.plan.volume:.1f}",
            _gigabytes(method.bytes_sent_per_worker),
        ]
        if method.cost is not None:
            cells += [
                _gigabytes(method.bytes_per_link or 0),
                *(
                    hours_text(forecast, method, name)
                    for name in ("compute", "communication", "total")
                ),
                number_text(method.cost.gpu_hours),
                *([f"{price * method.cost.gpu_hours:,.2f}"] if price else []),
                basis_text(method),
            ]
        table.add_row(*cells, style="bold" if method.planned else None)
    return table


def hours_text(forecast: Forecast, method: Method, name: str) -> str:
    """Hours of "compute", "communication" or "total": with a question mark if they depend on an
    unverified constant, a dash if they are not known."""
    if method.cost is None:
        return "-"
    hours = getattr(method.cost, f"{name}_seconds") / 3600
    return number_text(hours) + ("?" if name in forecast.unverified(method) else "")


def number_text(hours: float) -> str:
    """A number of hours, with about three digits."""
    if 0 < hours < 0.1:
        return f"{hours:.2g}"
    return f"{hours:,.{2 if hours < 100 else 1}f}"


def basis_text(method: Method) -> str:
    """Whether the profile was fitted to the method's time, or predicts it."""
    if method.cost is None:
        return ""
    return "fitted" if method.fitted_hours else "predicted"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.{0 if num_bytes >= 1e11 else 3}f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def print_sources(console: Console, forecasts: Sequence[Forecast | Solution]) -> None:
    """Print where the constants of the times come from, once for each profile."""
    known = [(f.config.speed.name, f.sources) for f in forecasts if f.config.speed and f.sources]
    for profile in dict.fromkeys(name for name, _ in known):
        console.print(f"Constants of {profile}:")
        its = (sources for name, sources in known if name == profile)
        for name, value, text in dict.fromkeys(source for sources in its for source in sources):
            console.print(f"  {name} = {value:.6g}: {text}")


def make_table(*columns: str) -> Table:
    """An empty table without frame, the first column on the left."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, header_style="")
    for index, name in enumerate(columns):
        # the first column folds where the terminal is narrow
        side: Literal["left", "right"] = "right" if index else "left"
        table.add_column(name, justify=side, no_wrap=index > 0, overflow="fold")
    return table


def make_console() -> Console:
    """The terminal, or a file of WIDTH columns."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH  # a file has none
    return console
