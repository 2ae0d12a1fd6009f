"""The rules that keep to a budget, as a table for the terminal."""

from qsr.output import in_words_of_caller
from qsr.planner.forecast import UNVERIFIED_NOTE
from qsr.planner.solve import WHY_RECOMMENDED, Solution
from qsr.planner.text import make_console, make_table, number_text, print_sources


def print_solution(solution: Solution, replaced: str, command: str) -> None:
    """Print a row for each H_base, and the command that plans the recommended one. `replaced`: the
    run's own rule, if it was not QSR."""
    console, config, best = make_console(), solution.config, solution.recommended
    speeds = f", speeds of {config.speed.name}" if config.speed else ""
    console.print(
        f"QSR with {solution.budget}{' %' * solution.budget.startswith('volume')}: "
        f"{config.model.label}, global batch {config.global_batch:,}{speeds}",
        style="bold",
    )
    console.print(
        f"{solution.steps:,} steps = {config.epochs} epochs of {solution.steps_per_epoch:,}, "
        f"peak learning rate {config.schedule.peak_lr:g}"
    )
    if replaced:
        console.print(f"QSR takes the place of the run's own rule ({replaced}); all else stays")
    with_hours = best.hours is not None
    table = make_table(
        *("H_base", "alpha", "rounds", "volume\n%"),
        *(["total\nh", ""] if with_hours else []),
        *("H at\nthe peak", "half\nway", "at the\nend", "longest\nround", "in\nepochs", ""),
    )
    for row in solution.rows:
        hours = []
        if row.hours is not None:
            mark = "?" * solution.unverified
            hours = [f"{number_text(row.hours)}{mark}", "fitted" if row.fitted else "predicted"]
        table.add_row(
            str(row.h_base),
            f"{row.alpha:g}",
            f"{row.rounds:,}",
            f"{100 * row.volume:.4g}",
            *hours,
            *(f"{h:,}" for h in (row.h_at_peak, row.h_half_way, row.h_at_end)),
            f"{row.longest_round_steps:,}",
            f"{row.longest_round_steps / solution.steps_per_epoch:.1f}",
            "recommended" * (row is best),
            style="bold" if row is best else None,
        )
    console.print(table)
    console.print(f"  {WHY_RECOMMENDED}")
    if solution.why_no_hours:
        console.print(f"  {solution.why_no_hours}")
    if solution.unverified:
        console.print(f"  {UNVERIFIED_NOTE}")
    print_sources(console, [solution])
    console.print("Plan the recommended rule, or train with these settings:")
    print(in_words_of_caller(command))
