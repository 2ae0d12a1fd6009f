"""Costs beside the paper."""

from functools import cache

import pytest

from qsr.config.load import CONFIG_DIR, load_config
from qsr.planner.forecast import Forecast, forecast
from qsr.report.cost_tables import cost_table_markdown, published_hours, sources_markdown
from qsr.report.paper import Reference, read_reference

PUBLISHED = read_reference(CONFIG_DIR.parent / "results" / "paper" / "tables.csv")


@cache
def of(*settings: str) -> Forecast:
    return forecast(load_config(settings))


VIT = ("experiment=vit_b16_b16384/quadratic_h4", "speed=paper_8x8")
RESNET = ("experiment=resnet152_b4096/quadratic_h4", "speed=paper_2x8")


def test_published_hours_are_of_the_same_run() -> None:
    found = [published_hours(of(*VIT), method, PUBLISHED) for method in of(*VIT).by_volume()]
    assert found == [Reference(8.6, "A"), None, None, Reference(5.5, "A")]
    found = [published_hours(of(*RESNET), method, PUBLISHED) for method in of(*RESNET).by_volume()]
    assert found == [Reference(20.7, "R"), None, None, None]


def cells(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in markdown.splitlines()]


def test_hours_and_money_of_each_way_to_train() -> None:
    runs = {
        "ViT": of(*VIT, "speed.price_per_gpu_hour=2"),
        "ResNet": of(*RESNET),
    }
    head, _, *rows = cells(cost_table_markdown(runs, PUBLISHED))
    assert head[2:] == [
        *("volume %", "computing h", "communication h", "total h", "basis", "paper h"),
        *("GPU hours", "price"),
    ]
    # 64 GPUs for 8.6 hours, at 2 an hour
    assert rows[0] == [
        *("ViT", "data parallel, blocking", "100.0", "4.86", "3.74", "8.60", "fitted"),
        *("8.6 [A]", "550", "1,101"),
    ]
    assert rows[3] == [
        *("ViT", "QSR, H_base = 4, alpha = 0.0175", "16.1", "4.86", "0.60", "5.46", "predicted"),
        *("5.5 [A]", "350", "699"),
    ]
    assert rows[5] == [
        *("ResNet", "data parallel, overlapped", "100.0", "17.40?", "1.92?", "19.32?"),
        *("predicted", "-", "309?", "-"),
    ]
    assert rows[4][7] == "20.7 (unverified)"


def test_each_constant_is_listed_once_with_its_source() -> None:
    priced = of(*RESNET, "speed.price_per_gpu_hour=2")
    head, _, *rows = cells(sources_markdown([priced, of(*RESNET), of(*VIT)]))
    assert head == ["profile", "constant", "value", "where it comes from"]
    assert [(row[0], row[1]) for row in rows] == [
        ("paper_2x8", "`link_gbit_per_second`"),
        ("paper_2x8", "`latency_seconds`"),
        ("paper_2x8", "`resnet152@224/fp16`"),
        ("paper_8x8", "`link_gbit_per_second`"),
        ("paper_8x8", "`latency_seconds`"),
        ("paper_8x8", "`vit_b16@224/fp16`"),
    ]
    assert rows[0][2:] == ["18.5807", "fitted to the abstract's 26.7 h and 20.2 h of ViT-B"]
    assert rows[2][3].startswith("unverified: from 20.7 h")


@pytest.mark.parametrize("settings", [VIT, RESNET])
def test_methods_stand_in_the_order_of_their_volume(settings: tuple[str, ...]) -> None:
    methods = of(*settings).by_volume()
    assert [method.overlapped for method in methods] == [False, True, None, None]
    assert [method.planned for method in methods] == [False, False, False, True]
