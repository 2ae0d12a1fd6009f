"""Forecasts for scripts: plain values under stable keys that include the units."""

from collections.abc import Sequence
from typing import Any

from qsr.planner import what_if
from qsr.planner.forecast import Forecast, Method
from qsr.planner.solve import Solution


def forecast_record(forecast: Forecast) -> dict[str, Any]:
    """The forecast of one run; times are null without a speed profile that fits."""
    config, plan, model = forecast.config, forecast.plan, forecast.model
    longest, rounds = plan.longest_round, list(plan.rounds())
    return {
        "experiment": config.experiment,
        "cluster": config.cluster.name,
        "speed": config.speed.name if config.speed else None,
        "rule": config.sync.rule,
        "model": config.model.label,
        "parameters": forecast.parameters,
        "precision": config.precision,
        "workers": config.workers,
        "ranks_per_worker": config.ranks_per_worker,
        "ranks": model.allreduce.ranks if model else None,
        "machines": model.allreduce.machines if model else None,
        "global_batch": config.global_batch,
        "local_batch": config.local_batch,
        "micro_batch": config.micro_batch_size,
        "epochs": config.epochs,
        "steps_per_epoch": forecast.steps_per_epoch,
        "steps": plan.total_steps,
        "rounds": plan.num_rounds,
        "volume": plan.volume,
        "h_first_steps": rounds[0].length,
        "h_last_steps": rounds[-1].length,
        "longest_round_steps": longest.length,
        "longest_round_epochs": longest.length / forecast.steps_per_epoch,
        "longest_round_start_step": longest.start,
        "speedup_over_blocking_data_parallel": forecast.speedup(overlapped=False),
        "speedup_over_overlapped_data_parallel": forecast.speedup(overlapped=True),
        "methods": [_method_record(forecast, method) for method in forecast.methods],
        "sources": {s.name: {"value": s.value, "source": s.text} for s in forecast.sources},
        "notes": forecast.notes(),
    }


def _method_record(forecast: Forecast, method: Method) -> dict[str, Any]:
    cost, speed = method.cost, forecast.config.speed
    record: dict[str, Any] = {
        "method": method.label,
        "planned": method.planned,
        "overlapped": method.overlapped,
        "rounds": method.plan.num_rounds,
        "volume": method.plan.volume,
        "bytes_sent_per_worker": method.bytes_sent_per_worker,
        "bytes_per_link": method.bytes_per_link,
        "compute_hours": None,
        "communication_hours": None,
        "total_hours": None,
        "gpu_hours": None,
        "price": None,
        "basis": None,
        "fitted_to_hours": method.fitted_hours,
        "unverified": sorted(forecast.unverified(method)),
    }
    if cost is None or speed is None:
        return record
    price = speed.price_per_gpu_hour
    return record | {
        "compute_hours": cost.compute_seconds / 3600,
        "communication_hours": cost.communication_seconds / 3600,
        "total_hours": cost.total_seconds / 3600,
        "gpu_hours": cost.gpu_hours,
        "price": price and price * cost.gpu_hours,
        "basis": "fitted" if method.fitted_hours else "predicted",
    }


def solution_record(solution: Solution) -> dict[str, Any]:
    """The rules that keep to a budget; hours are null without a speed profile that fits."""
    config = solution.config
    return {
        "budget": solution.budget,
        "model": config.model.label,
        "global_batch": config.global_batch,
        "speed": config.speed.name if config.speed else None,
        "steps": solution.steps,
        "steps_per_epoch": solution.steps_per_epoch,
        "rows": [vars(row) | {"recommended": row is solution.recommended} for row in solution.rows],
        "settings": solution.rule_settings,
        "unverified": solution.unverified,
        "sources": {s.name: {"value": s.value, "source": s.text} for s in solution.sources},
        "why_no_hours": solution.why_no_hours or None,
    }


def what_if_record(cases: Sequence[what_if.Case]) -> dict[str, Any]:
    """The cases of what_if, with their assumptions."""
    return {
        "assumptions": what_if.assumptions(),
        "cases": [
            vars(one)
            | {
                "saved_of_blocking": one.saved_of_blocking,
                "saved_of_overlapped": one.saved_of_overlapped,
            }
            for one in cases
        ],
    }
