"""What a run would take: methods, their marks, and what is printed and drawn of them."""

import dataclasses
import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torchvision
from matplotlib.patches import StepPatch

from qsr.config.load import CONFIG_DIR, load_config
from qsr.planner.as_json import forecast_record, what_if_record
from qsr.planner.forecast import Forecast, forecast
from qsr.planner.text import print_forecast, print_sweep, print_what_if
from qsr.planner.what_if import GPUS, LINKS_GBIT_PER_SECOND, WORKERS, all_cases, case, networks
from qsr.report.cost_plots import what_if_figure
from qsr.report.plan_plots import plan_figure
from qsr.train.models import count_parameters

VIT = (
    *("model=vit_b16", "data=imagenet", "optimizer=adamw", "epochs=300", "micro_batch=128"),
    *("precision=fp16", "global_batch=4096", "workers=16", "schedule.peak_lr=0.008"),
    *("schedule.warmup_steps=10000", "speed=paper_2x8"),
)
QSR = ("sync.h_base=4", "sync.alpha=0.0175")


@cache
def of(*overrides: str) -> Forecast:
    return forecast(load_config(overrides))


def hours(found: Forecast) -> dict[str, float | None]:
    return {
        m.label: None if m.cost is None else round(m.cost.total_seconds / 3600, 2)
        for m in found.methods
    }


def test_the_run_stands_beside_data_parallel_training_and_the_constant_h() -> None:
    found = of(*VIT, *QSR)
    assert hours(found) == {
        "QSR, H_base = 4, alpha = 0.0175": 20.2,
        "data parallel, blocking": 26.7,
        "data parallel, overlapped": 20.22,
        "constant H = 4": 21.26,
    }
    assert [m.planned for m in found.methods] == [True, False, False, False]
    assert found.speedup(overlapped=False) == pytest.approx(26.7 / 20.2)
    assert found.speedup(overlapped=True) == pytest.approx(20.2175 / 20.2, abs=1e-4)
    # 9,711 rounds of 4 x 86,381,800 bytes, of which a ring sends 30/16
    assert found.planned.bytes_sent_per_worker == 9711 * 4 * 86_381_800 * 30 // 16
    assert found.planned.bytes_per_link == found.planned.bytes_sent_per_worker


RULES = {
    ("sync=parallel",): (None, 2),
    ("sync=every_step",): (None, 3),
    ("sync=constant", "sync.h=5"): (None, 3),
    ("sync=quadratic", *QSR): (4, 4),
    ("sync=power", "sync.h_base=6", "sync.coefficient=0.0175", "sync.exponent=3"): (6, 4),
    ("sync=post_local", "sync.switch_epoch=150", "sync.h=7"): (7, 5),
    ("sync=swap", "sync.switch_epoch=150"): (None, 4),
}
SCHEDULES: dict[str, tuple[str, ...]] = {
    "cosine": (),
    "linear": (),
    "power_of_two": (),
    "step": ("schedule.milestone_epochs=[100,200]",),
    "constant": (),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sync", RULES)
def test_every_rule_and_schedule(
    sync: tuple[str, ...], schedule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    h, methods = RULES[sync]
    found = of(*VIT, *sync, f"schedule={schedule}", *SCHEDULES[schedule])
    labels = [method.label for method in found.methods]
    assert len(labels) == methods
    assert {"data parallel, blocking", "data parallel, overlapped"} <= set(labels)
    constants = [label for label in labels if label.startswith("constant")]
    assert constants == ([f"constant H = {h}"] if h else ["constant H = 5"] * ("sync.h=5" in sync))
    assert sum(method.planned for method in found.methods) == 1
    assert found.planned.plan.num_rounds == found.plan.num_rounds
    print_forecast(found)
    assert f"{found.plan.num_rounds:,} rounds" in capsys.readouterr().out


def test_the_trainer_overlaps_where_every_rank_is_one_worker() -> None:
    assert of(*VIT, "sync=parallel").planned.label == "data parallel, overlapped"
    shared = of(*VIT, "sync=parallel", "cluster.ranks=8")
    assert shared.planned.label == "data parallel, blocking"
    assert any("holds several workers" in note for note in shared.notes())
    swap = of(*VIT, "sync=swap", "sync.switch_epoch=150").planned
    assert (swap.label, swap.overlapped) == ("SWAP from epoch 150, overlapped", True)


def fitted(found: Forecast) -> dict[str, float]:
    return {m.label: m.fitted_hours for m in found.methods if m.fitted_hours}


def test_what_the_profile_was_fitted_to_is_marked() -> None:
    both = {"QSR, H_base = 4, alpha = 0.0175": 20.2, "data parallel, blocking": 26.7}
    assert fitted(of(*VIT, *QSR)) == both
    assert fitted(of(*VIT, *QSR, "speed.price_per_gpu_hour=1")) == both
    for change in (
        ("speed.link_gbit_per_second=18.6",),
        ("speed.latency_seconds=1e-5",),
        ("speed.seconds_per_image={vit_b16@224/fp16:0.003}",),
        ("speed=paper_8x8",),
        ("cluster.ranks=8",),
        ("epochs=301",),
    ):
        assert fitted(of(*VIT, *QSR, *change)) == {}
    # another rule with the same averages takes the same time; one with more does not
    assert fitted(of(*VIT, "sync.h_base=2", "sync.alpha=0.0175")).keys() >= {
        "QSR, H_base = 2, alpha = 0.0175"
    }
    moments = fitted(of(*VIT, *QSR, "sync.average_momentum=true"))
    assert "QSR, H_base = 4, alpha = 0.0175" not in moments


def test_what_rests_on_an_unverified_value_is_marked() -> None:
    found = of(*VIT, *QSR, "model=resnet152")
    marks = {m.label: found.unverified(m) for m in found.methods}
    assert marks["data parallel, blocking"] == {"compute", "total"}
    # what overlaps depends on the time of the backward pass
    assert marks["data parallel, overlapped"] == {"compute", "communication", "total"}
    assert any(note.startswith("?:") for note in found.notes())
    given = "speed.seconds_per_image={resnet152@224/fp16:0.004}"
    for verified in (of(*VIT, *QSR), of(*VIT, *QSR, "model=resnet152", given)):
        assert not any(verified.unverified(method) for method in verified.methods)


def test_a_run_on_one_of_two_machines_is_an_upper_bound() -> None:
    found = of(*VIT, *QSR, "workers=8")
    assert found.planned.bytes_per_link == 0
    assert any("upper bound" in note for note in found.notes())


RECORD = {
    *("experiment", "cluster", "speed", "rule", "model", "parameters", "precision"),
    *("workers", "ranks"),
    "ranks_per_worker",
    *("machines", "global_batch", "local_batch", "micro_batch", "epochs", "steps_per_epoch"),
    *("steps", "rounds", "volume", "h_first_steps", "h_last_steps", "longest_round_steps"),
    *("longest_round_epochs", "longest_round_start_step", "speedup_over_blocking_data_parallel"),
    *("speedup_over_overlapped_data_parallel", "methods", "sources", "notes"),
}
METHOD = {
    *("method", "planned", "overlapped", "rounds", "volume", "bytes_sent_per_worker"),
    *("bytes_per_link", "compute_hours", "communication_hours", "total_hours", "gpu_hours"),
    *("price", "basis", "fitted_to_hours", "unverified"),
}


def test_the_record_of_a_forecast() -> None:
    record = forecast_record(of(*VIT, *QSR, "speed.price_per_gpu_hour=0.5"))
    assert record.keys() == RECORD
    assert (record["steps"], record["steps_per_epoch"], record["rounds"]) == (93_600, 312, 9711)
    assert (record["volume"], record["parameters"]) == (0.10375, 86_381_800)
    assert (record["h_first_steps"], record["h_last_steps"]) == (4, 8142)
    assert (record["longest_round_steps"], record["longest_round_start_step"]) == (8142, 85_458)
    assert record["longest_round_epochs"] == pytest.approx(8142 / 312)
    assert all(method.keys() == METHOD for method in record["methods"])
    own, blocking, overlapped, _ = record["methods"]
    assert (own["basis"], blocking["basis"], overlapped["basis"]) == (
        "fitted",
        "fitted",
        "predicted",
    )
    assert own["gpu_hours"] == pytest.approx(16 * 20.2)
    assert own["price"] == pytest.approx(8 * 20.2)
    assert record["sources"]["price_per_gpu_hour"] == {
        "value": 0.5,
        "source": "given on the command line",
    }


def test_without_speeds_there_are_rounds_and_bytes_and_the_mend() -> None:
    found = of(*VIT, *QSR, "speed=null")
    record = forecast_record(found)
    assert record.keys() == RECORD
    assert [m["method"] for m in record["methods"]] == [
        "QSR, H_base = 4, alpha = 0.0175",
        "data parallel",
        "constant H = 4",
    ]
    assert all(m.keys() == METHOD and m["total_hours"] is None for m in record["methods"])
    assert record["methods"][0]["bytes_sent_per_worker"] == 6_291_402_448_500
    (note,) = record["notes"]
    assert "calibrate" in note


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_forecast(of(*VIT, *QSR))
    text = capsys.readouterr().out
    assert "9,711 rounds, volume 10.4 %" in text
    assert "H 4 at the start, 8,142 at the end; longest round 8,142 steps (26.1 epochs)" in text
    rows = {
        line.partition("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()
    }
    assert rows["data parallel, overlapped"][-6:] == [
        *("60,640", "19.45", "0.77", "20.22", "323.5", "predicted"),
    ]
    assert rows["data parallel, blocking"][-3:] == ["26.70", "427.2", "fitted"]
    assert "1.32 times as fast" in text
    assert "fitted to the abstract's 26.7 h and 20.2 h of ViT-B" in text
    assert max(map(len, text.splitlines())) <= 100

    print_forecast(of(*VIT, *QSR, "model=resnet152"))
    text = capsys.readouterr().out
    assert "26.10?" in text
    assert "unverified: from 20.7 h" in text


def test_the_documented_table_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_forecast(of(*VIT, *QSR))
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    document = (CONFIG_DIR.parent / "docs" / "planning.md").read_text()
    block = document.partition("speed=paper_2x8\n")[2].partition("It takes the settings")[0]
    documented = [line.strip() for line in block.splitlines() if line.strip()]
    assert len(documented) == 9
    assert documented == [line for line in printed if line in documented]


def test_a_sweep_is_printed_in_rows(capsys: pytest.CaptureFixture[str]) -> None:
    alphas = ("0.01", "0.0175", "0.03")
    forecasts = [of(*VIT, "sync.h_base=4", f"sync.alpha={alpha}") for alpha in alphas]
    print_sweep([{"sync.alpha": alpha} for alpha in alphas], forecasts)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    row = ["0.0175", "9,711", "10.4", "8,142", "26.1", "20.20", "fitted", "1.32", "x", "1.00", "x"]
    assert row in lines
    assert ["0.03", "3,000", "3.2", "9,830", "31.5", "19.68", "predicted"] in [x[:7] for x in lines]
    assert sum(line[:1] == ["link_gbit_per_second"] for line in lines) == 1


def test_plans_are_drawn_over_epochs_and_steps() -> None:
    found = of(*VIT, *QSR)
    figure = plan_figure(found.plans(), found.steps_per_epoch)
    top, bottom = figure.axes
    assert len(top.lines) == 1
    assert len(bottom.patches) == 2
    stairs = bottom.patches[0]
    assert isinstance(stairs, StepPatch)
    lengths, edges, _ = stairs.get_data()
    rounds = list(found.plan.rounds())
    assert lengths.tolist() == [round_.length for round_ in rounds]
    assert edges.tolist() == [*(round_.start / 312 for round_ in rounds), 300]
    (steps,) = top.child_axes
    assert (steps.get_xlabel(), bottom.get_xlabel()) == ("step", "epoch")
    figure.draw_without_rendering()
    assert steps.get_xlim() == pytest.approx((0, 93_600))
    # two schedules, two curves
    other = of(*VIT, *QSR, "schedule=linear")
    assert len(plan_figure({"a": found.plan, "b": other.plan}).axes[0].lines) == 2


def test_timms_networks_are_counted_without_being_built() -> None:
    config = load_config([*VIT, *QSR, "model=timm", "model.timm_name=resnet18"])
    assert count_parameters(config.model, 1000, 224) == 11_689_512  # as torchvision's


def test_larger_networks_are_as_torchvision_says() -> None:
    cards: dict[str, Any] = {
        "ViT-L/16": torchvision.models.ViT_L_16_Weights.IMAGENET1K_V1.meta,
        "ViT-H/14": torchvision.models.ViT_H_14_Weights.IMAGENET1K_SWAG_LINEAR_V1.meta,
    }
    base = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.meta["_ops"]
    vit, *larger, _ = networks()
    assert [network.name for network in larger] == list(cards)
    for network in larger:
        card = cards[network.name]
        assert network.model.parameter_bytes == 4 * card["num_params"]
        ratio = network.model.compute_seconds / vit.model.compute_seconds
        assert ratio == pytest.approx(card["_ops"] / base)


def test_where_qsr_pays_by_hand() -> None:
    vit, *_, resnet = networks()
    assert (vit.unverified, resnet.unverified) == (False, True)
    one = case(vit, "the paper's GPU", 16, 10)
    # 0.0029218088 s x 256, and 2 x 15/16 x 345,527,200 bytes at 1.25 GB/s with 8 x 20 microseconds
    assert one.compute_seconds == pytest.approx(0.747983, abs=1e-6)
    assert one.allreduce_seconds == pytest.approx(0.518291 + 0.00016, abs=1e-6)
    # half of two thirds of the computing hides
    assert one.overlapped_seconds == pytest.approx(0.747983 + 0.518451 - 0.249328, abs=1e-6)
    assert one.blocking_seconds == pytest.approx(0.747983 + 0.518451, abs=1e-6)
    assert one.qsr_seconds == pytest.approx(0.747983 + 0.10375 * 0.518451, abs=1e-6)
    assert one.saved_of_blocking == pytest.approx(0.3670, abs=1e-4)
    assert one.saved_of_overlapped == pytest.approx(0.2117, abs=1e-4)
    fast = case(vit, "a GPU 10 times as fast", 16, 100)
    assert fast.saved_of_overlapped == pytest.approx(one.saved_of_overlapped, abs=0.003)


def test_what_if_covers_all_and_is_printed_and_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    cases = list(all_cases())
    names = [network.name for network in networks()]
    grid = itertools.product(names, GPUS, WORKERS, LINKS_GBIT_PER_SECOND)
    assert [(c.network, c.gpu, c.workers, c.link_gbit_per_second) for c in cases] == list(grid)
    record = what_if_record(cases)
    fields = {field.name for field in dataclasses.fields(cases[0])}
    assert all(
        row.keys() == fields | {"saved_of_blocking", "saved_of_overlapped"}
        for row in record["cases"]
    )
    assert record["assumptions"]
    print_what_if(cases)
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 50
    (row,) = (line.split() for line in text.splitlines() if line.split()[:2] == ["ViT-B/16", "1x"])
    assert row[5] == "37/21"  # at 10 Gbit/s, as by hand above
    assert "ResNet-152?" in text
    flat = " ".join(text.split())
    assert all(assumption in flat for assumption in record["assumptions"])


def test_where_qsr_pays_is_drawn() -> None:
    panels = what_if_figure().axes
    assert [axes.get_title() for axes in panels] == list(GPUS)
    vit = networks()[0]
    line = panels[0].lines[0]
    links, saved = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert (links[0], links[-1]) == pytest.approx((1, 400))
    middle = len(links) // 2
    expected = case(vit, next(iter(GPUS)), 16, links[middle]).saved_of_overlapped
    assert saved[middle] == pytest.approx(100 * expected)
    assert [text.get_text() for text in panels[0].texts] == [
        "ViT-B/16 and ViT-L/16", "ViT-H/14", "ResNet-152\n(speed unverified)",
    ]  # fmt: skip


def test_networks_that_share_a_line_are_alike() -> None:
    """ViT-L's would cover ViT-B's."""
    base, large, *_ = networks()
    assert (base.name, large.name) == ("ViT-B/16", "ViT-L/16")
    for gpu, link in itertools.product(GPUS, LINKS_GBIT_PER_SECOND):
        one, other = (case(each, gpu, 16, link).saved_of_overlapped for each in (base, large))
        assert one == pytest.approx(other, abs=0.03)
