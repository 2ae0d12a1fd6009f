"""results/runs: what is copied there from a run folder, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qsr.config.load import CONFIG_DIR, settings_hash
from qsr.errors import ReportError
from qsr.report.collect import read_run
from qsr.report.records import add_record, read_summaries
from tests.unit.report.conftest import WriteRun

RECORD_FILES = ("config.yaml", "data.json", "environment.json", "metrics.jsonl", "summary.json")

RECORDS = CONFIG_DIR.parent / "results" / "runs"


def test_a_record_is_the_run_without_weights_and_host(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("experiment=demo/quadratic", "seed=3")
    record = add_record(folder, tmp_path / "records")
    assert record == tmp_path / "records" / "demo" / "quadratic" / "seed_3"
    assert sorted(path.name for path in record.iterdir()) == sorted(RECORD_FILES)
    for name in set(RECORD_FILES) - {"environment.json", "config.yaml"}:
        assert (record / name).read_bytes() == (folder / name).read_bytes()
    settings, written = (
        yaml.safe_load((path / "config.yaml").read_text()) for path in (record, folder)
    )
    assert settings == written
    environment = json.loads((record / "environment.json").read_text())
    assert environment == {"python": "3.12.1", "cores": 2}
    assert read_run(record).config == read_run(folder).config


def test_summaries_by_experiment_in_order_of_the_seeds(
    three_seeds: list[Path], write_run: WriteRun, tmp_path: Path
) -> None:
    changed = write_run("experiment=demo/quadratic", "sync.alpha=0.02", top1=70.0)
    for folder in (*three_seeds, changed):
        add_record(folder, tmp_path / "records")
    summaries = read_summaries(tmp_path / "records")
    found = {name: [(run["seed"], run["top1"]) for run in runs] for name, runs in summaries.items()}
    assert found == {
        "demo/quadratic": [(1, 81.0), (2, 81.4), (10, 81.2)],
        "demo/quadratic/sync.alpha=0.02": [(1, 70.0)],
    }
    assert read_summaries(tmp_path / "nowhere") == {}


def test_the_same_run_replaces_its_record(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("experiment=demo/parallel")
    add_record(folder, tmp_path / "records")
    for name in ("summary.json", "metrics.jsonl"):
        (folder / name).write_text((folder / name).read_text().replace("72.0", "80.0"))
    add_record(folder, tmp_path / "records")
    ((run,),) = read_summaries(tmp_path / "records").values()
    assert run["train_seconds"] == 80.0


@pytest.mark.parametrize("missing", RECORD_FILES)
def test_an_unfinished_or_incomplete_run_is_refused(
    write_run: WriteRun, tmp_path: Path, missing: str
) -> None:
    folder = write_run("experiment=demo/parallel")
    (folder / missing).unlink()
    why = "holds no finished run" if missing == "summary.json" else f"has no {missing}"
    with pytest.raises(ReportError, match=f"demo/parallel/seed_1 {why}"):
        add_record(folder, tmp_path / "records")
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("seed", [1, 2])
def test_another_run_of_the_same_name_is_refused(
    write_run: WriteRun, tmp_path: Path, seed: int
) -> None:
    records = tmp_path / "records"
    first = add_record(write_run("experiment=demo/quadratic"), records)
    other = write_run("experiment=demo/quadratic", f"seed={seed}", "runs_dir=later")
    config = yaml.safe_load((other / "config.yaml").read_text())
    summary = (other / "summary.json").read_text()
    hash_before = settings_hash(config)
    config["optimizer"]["weight_decay"] = 0.5  # the experiment's file was changed in between
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    (other / "summary.json").write_text(summary.replace(hash_before, settings_hash(config)))
    before = {path: path.read_bytes() for path in records.rglob("*") if path.is_file()}
    with pytest.raises(ReportError) as raised:
        add_record(other, records)
    assert str(raised.value) == (
        f"{other} and {first} have the same name but differ "
        f"(optimizer.weight_decay: 0.0001 -> 0.5): remove {first.parent}, or give this run "
        f"another name"
    )
    assert {p: p.read_bytes() for p in records.rglob("*") if p.is_file()} == before


def test_a_seed_on_other_data_is_refused(write_run: WriteRun, tmp_path: Path) -> None:
    records = tmp_path / "records"
    add_record(write_run("experiment=demo/quadratic"), records)
    other = write_run("experiment=demo/quadratic", "seed=2")
    data = (other / "data.json").read_text()
    (other / "data.json").write_text(data.replace("dali", "torchvision"))
    with pytest.raises(ReportError, match="loader: dali -> torchvision"):
        add_record(other, records)


def test_a_record_outlives_changes_of_execution_settings(
    write_run: WriteRun, tmp_path: Path
) -> None:
    records = tmp_path / "records"
    record = add_record(write_run("experiment=demo/quadratic"), records)
    config = yaml.safe_load((record / "config.yaml").read_text())
    config["cluster"]["setting_of_another_version"] = 1
    del config["tracking"], config["data"]["prefetch_batches"]
    (record / "config.yaml").write_text(yaml.safe_dump(config))
    second = add_record(write_run("experiment=demo/quadratic", "seed=2"), records)
    assert read_run(record).config == replace(read_run(second).config, seed=1)


FIRST_VERSION = {
    "randaugment_depth": 0,
    "randaugment_strength": 0.0,
    "randaugment_uniform": False,
}
"""The settings of RandAugment in the first version, which had no `fp16_overflow` either."""


def as_first_version(record: Path, model: str, depth: int) -> None:
    config = yaml.safe_load((record / "config.yaml").read_text())
    del config["fp16_overflow"]
    config["model"]["name"] = model
    augmentation = config["data"]["augmentation"]
    for name in ("randaugment", "randaugment_depth", "randaugment_severity"):
        del augmentation[name]
    augmentation |= FIRST_VERSION | {"randaugment_depth": depth}
    (record / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_record_of_the_first_version_is_read_where_it_trained_the_same(
    write_run: WriteRun, tmp_path: Path
) -> None:
    record = write_run("experiment=demo/quadratic")
    before = read_run(record).config
    as_first_version(record, "small_resnet", depth=0)
    assert read_run(record).config == replace(before, fp16_overflow="skip")


@pytest.mark.parametrize(
    ("model", "depth", "message"),
    [
        ("vit_b16", 0, "vit_b16 and small_vit were not the paper's networks"),
        ("small_vit", 2, "vit_b16 and small_vit were not the paper's networks"),
        ("resnet152", 2, "RandAugment was weaker than the paper's"),
    ],
)
def test_a_record_of_the_first_version_is_refused_where_it_trained_something_else(
    write_run: WriteRun, model: str, depth: int, message: str
) -> None:
    record = write_run("experiment=demo/quadratic")
    as_first_version(record, model, depth)
    with pytest.raises(ReportError) as raised:
        read_run(record)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_record_that_this_version_cannot_read_is_named(
    write_run: WriteRun, tmp_path: Path
) -> None:
    records = tmp_path / "records"
    first = add_record(write_run("experiment=demo/quadratic"), records)
    with (first / "config.yaml").open("a") as file:
        file.write("setting_of_another_version: 1\n")
    with pytest.raises(ReportError, match="quadratic/seed_1 cannot be read by this version"):
        add_record(write_run("experiment=demo/quadratic", "seed=2"), records)


@pytest.mark.parametrize(
    "summary",
    sorted(RECORDS.rglob("summary.json")),
    ids=lambda path: str(path.parent.relative_to(RECORDS)),
)
def test_the_records_of_this_repository_are_read_and_followed_their_plan(summary: Path) -> None:
    run = read_run(summary.parent)
    assert (run.summary["steps"], run.summary["averages"]) == (
        run.plan.total_steps,
        run.plan.num_rounds,
    )
    last = run.evaluations()[-1]
    assert (last["step"], last["top1"]) == (run.summary["steps"], run.summary["top1"])
    assert "host" not in json.loads((summary.parent / "environment.json").read_text())


def test_the_demo_was_recorded_with_three_seeds_per_rule() -> None:
    demo = {
        name: [run["seed"] for run in runs]
        for name, runs in read_summaries(RECORDS).items()
        if name.startswith("demo/")
    }
    assert demo == {f"demo/{rule}": [1, 2, 3] for rule in ("constant", "parallel", "quadratic")}


def test_a_record_in_the_wrong_place_is_refused(write_run: WriteRun, tmp_path: Path) -> None:
    records = tmp_path / "records"
    record = add_record(write_run("experiment=demo/quadratic"), records)
    record.rename(record.parent / "seed_2")
    with pytest.raises(ReportError, match=r"seed_2/summary.json is the summary of .*/seed_1"):
        read_summaries(records)
