"""Speed profiles: the constants, redone from what they say they come from, and what they
predict; what a profile does not know."""

import pytest
import torch
import yaml

from qsr.config import schema
from qsr.config.compose import mark_given_speed
from qsr.config.load import (
    CONFIG_DIR,
    GIVEN,
    config_hash,
    differences,
    load_config,
    run_folder,
)
from qsr.config.overrides import parse_overrides
from qsr.config.planning import make_plan, parameter_count
from qsr.core.cost import Link, MeasuredAllReduce
from qsr.errors import ConfigError, UnknownSpeedError
from qsr.planner.cost_model import (
    make_cost_model,
    moment_bytes,
    ranks_and_machines,
    speed_key,
)
from qsr.train.models import build_model

QSR = ("sync.h_base=4", "sync.alpha=0.0175")
VIT = (
    *("model=vit_b16", "data=imagenet", "optimizer=adamw", "epochs=300", "micro_batch=128"),
    "precision=fp16",
)
VIT_16 = (
    *VIT,
    *("global_batch=4096", "workers=16", "schedule.peak_lr=0.008", "schedule.warmup_steps=10000"),
)
VIT_64 = (
    *VIT,
    *("global_batch=16384", "workers=64", "schedule.peak_lr=0.016", "schedule.warmup_steps=2500"),
)
RESNET_16 = (
    *("model=resnet152", "data=imagenet", "epochs=200", "global_batch=4096", "workers=16"),
    *("micro_batch=32", "precision=fp16", "schedule.peak_lr=0.8", "schedule.warmup_epochs=5"),
)
IMAGES = 1_281_167


def speed(name: str) -> schema.SpeedConfig:
    found = load_config([*VIT_16, *QSR, f"speed={name}"]).speed
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["resnet152", "vit_b16", "small_resnet", "small_vit"])
@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_parameters_are_those_of_the_real_network(name: str, classes: int) -> None:
    settings = schema.ModelConfig(name=name, timm_name=None, channels_last=False)  # type: ignore[arg-type]
    with torch.device("meta"):
        network = build_model(settings, classes, 224 if name in ("resnet152", "vit_b16") else 32)
    assert parameter_count(settings, classes) == sum(p.numel() for p in network.parameters())


def test_the_smaller_cluster_is_fitted_as_it_says() -> None:
    rounds, steps, local_batch, ranks = 9711, 93_600, 256, 16
    communication = (26.7 - 20.2) / (1 - rounds / steps)
    compute = 26.7 - communication
    assert round(communication, 2) == 7.25
    found = speed("paper_2x8")
    assert (found.machines, found.ranks_per_machine, found.latency_seconds) == (2, 8, 0.0)
    per_image = compute * 3600 / steps / local_batch
    assert found.seconds_per_image["vit_b16@224/fp16"] == pytest.approx(per_image, rel=1e-8)
    sent = 2 * (ranks - 1) / ranks * 4 * 86_381_800
    gbit = sent * steps / (communication * 3600) * 8 / 1e9
    assert found.link_gbit_per_second == pytest.approx(gbit, rel=1e-8)
    assert round(gbit, 1) == 18.6


def test_resnets_speed_is_unverified_and_marked() -> None:
    per_image = (20.7 - 3.3) * 3600 / 62_400 / 256
    for name in ("paper_2x8", "paper_8x8"):
        found = speed(name)
        assert found.seconds_per_image["resnet152@224/fp16"] == pytest.approx(per_image, rel=1e-8)
        assert found.sources["resnet152@224/fp16"].startswith("unverified")


def test_the_larger_cluster_computes_as_the_smaller_one_and_has_a_link_fitted_as_it_says() -> None:
    found, smaller = speed("paper_8x8"), speed("paper_2x8")
    assert found.seconds_per_image == smaller.seconds_per_image
    compute = 256 * 23_400 * found.seconds_per_image["vit_b16@224/fp16"] / 3600
    assert round(compute, 2) == 4.86
    communication = 8.6 - compute
    assert round(communication, 2) == 3.74
    sent = 2 * 63 / 64 * 4 * 86_381_800
    gbit = sent * 23_400 / (communication * 3600) * 8 / 1e9
    assert found.link_gbit_per_second == pytest.approx(gbit, rel=1e-7)


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "speed").glob("paper_*.yaml")), ids=str)
def test_every_constant_has_a_source(path: object) -> None:
    values = yaml.safe_load(path.read_text())  # type: ignore[attr-defined]
    needed = {"link_gbit_per_second", "latency_seconds", *values["seconds_per_image"]}
    assert values["sources"].keys() == needed


def hours(*overrides: str, overlapped: bool = False) -> tuple[float, float, float]:
    """Compute, communication and all of it."""
    config = load_config(overrides)
    model = make_cost_model(config, parameter_count(config.model, 1000))
    cost = model.run(make_plan(config, IMAGES), overlapped=overlapped)
    parts = (cost.compute_seconds, cost.communication_seconds, cost.total_seconds)
    return tuple(round(seconds / 3600, 2) for seconds in parts)  # type: ignore[return-value]


def test_what_the_profiles_were_fitted_to_comes_back() -> None:
    assert hours(*VIT_16, *QSR, "speed=paper_2x8") == (19.45, 0.75, 20.2)
    assert hours(*VIT_16, "sync=parallel", "speed=paper_2x8") == (19.45, 7.25, 26.7)
    assert hours(*VIT_64, "sync=parallel", "speed=paper_8x8") == (4.86, 3.74, 8.6)


def test_predictions_of_the_profiles() -> None:
    # published: 5.5 h
    assert hours(*VIT_64, *QSR, "speed=paper_8x8") == (4.86, 0.6, 5.46)
    constant = (*VIT_16, "sync=constant", "sync.h=4", "speed=paper_2x8")
    assert hours(*constant) == (19.45, 1.81, 21.26)
    # 60,192,808 instead of 86,381,800 parameters and 62,400 instead of 93,600 steps:
    # 7.2524 h x 0.69655 x 0.66667
    _, communication, _ = hours(*RESNET_16, "sync=parallel", "speed=paper_2x8")
    assert communication == 3.37


def test_overlap_is_predicted_to_hide_most_of_the_communication_on_the_smaller_cluster() -> None:
    # 0.7480 s of computing a step: two thirds of its half are 0.2493 s, of 0.2789 s of all-reduce
    parallel = (*VIT_16, "sync=parallel", "speed=paper_2x8")
    assert hours(*parallel, overlapped=True) == (19.45, 0.77, 20.22)
    # without accumulation all but the last of 26.2 of 345.7 MB
    one = ("micro_batch=256", "speed=paper_2x8")
    assert hours(*VIT_16, "sync=parallel", *one, overlapped=True) == (19.45, 0.55, 20.0)
    larger = ("sync=parallel", "micro_batch=256", "speed=paper_8x8")
    assert hours(*VIT_64, *larger, overlapped=True) == (4.86, 0.5, 5.36)  # README, planning.md


def test_the_key_of_a_speed() -> None:
    config = load_config([*VIT_16, *QSR])
    assert speed_key(config) == "vit_b16@224/fp16"
    timm = ("model=timm", "model.timm_name=resnet18", "data.image_size=160", "precision=bf16")
    assert speed_key(load_config([*VIT_16, *QSR, *timm])) == "timm/resnet18@160/bf16"
    compiled = [*VIT_16, *QSR, "compile=default"]
    assert speed_key(load_config(compiled)) == "vit_b16@224/fp16/compile=default"
    graphed = load_config([*VIT_16, *QSR, "cuda_graphs=true"])
    assert speed_key(graphed) == "vit_b16@224/fp16/cuda_graphs"


@pytest.mark.parametrize(
    ("workers", "ranks", "expected"),
    [
        (16, None, (16, 2)),
        (4, None, (4, 1)),
        (32, None, (16, 2)),
        (24, None, (12, 2)),  # the most that share 24 workers evenly
        (32, 8, (8, 1)),
        (64, 1, (1, 1)),
    ],
)
def test_what_a_run_takes_of_two_machines_of_eight(
    workers: int, ranks: int | None, expected: tuple[int, int]
) -> None:
    given = [f"workers={workers}", "global_batch=24576", f"cluster.ranks={ranks or 'null'}"]
    config = load_config([*VIT_16, *QSR, *given])
    assert ranks_and_machines(config, speed("paper_2x8")) == expected


def test_a_rank_computes_for_all_its_workers() -> None:
    cluster = "speed=paper_2x8"
    one = make_cost_model(load_config([*VIT_16, *QSR, cluster]), 1)
    four = make_cost_model(load_config([*VIT_16, *QSR, cluster, "cluster.ranks=4"]), 1)
    assert four.compute_seconds == pytest.approx(4 * one.compute_seconds)
    assert (one.micro_batches, four.micro_batches) == (2, 8)


def test_moments_are_counted_where_they_are_averaged() -> None:
    sync = [
        load_config([*VIT_16, *QSR, *flags]).sync
        for flags in (
            (),
            ("sync.average_momentum=true",),
            ("sync.average_momentum=true", "sync.average_second_moment=true"),
        )
    ]
    assert [moment_bytes(s, 10) for s in sync] == [0, 40, 80]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "no hours: no speeds are given; choose a profile with speed=NAME, or measure one: qsr "
         "plan calibrate"),
        (["cluster=slurm", "cluster.nodes=1", "speed=paper_2x8"], "no hours: the job has 1 x 8 "
         "ranks, but speed=paper_2x8 is about 2 x 8 ranks: measure yours with qsr plan calibrate, "
         "or set speed.machines and speed.ranks_per_machine, if the link is as fast there"),
        (["cluster=slurm", "cluster.nodes=4", "cluster.gpus_per_node=4", "speed=paper_2x8"],
         "no hours: the job has 4 x 4 ranks"),
        (["cluster.ranks=16", "speed=paper_2x8", "speed.machines=1"], "no hours: cluster.ranks=16, "
         "but speed=paper_2x8 is about 1 x 8 ranks: use fewer, or set speed.machines"),
        (["speed=paper_2x8", "precision=bf16"], "speed=paper_2x8 has no speed for "
         "vit_b16@224/bf16; measure it: qsr plan calibrate, or set "
         "speed.seconds_per_image={vit_b16@224/bf16:SECONDS}"),
        (["speed=paper_2x8", "speed.link_gbit_per_second=null"], "has no speed of the "
         "link between ranks; set speed.link_gbit_per_second"),
    ],
)  # fmt: skip
def test_what_a_profile_does_not_know(overrides: list[str], message: str) -> None:
    with pytest.raises(UnknownSpeedError) as caught:
        make_cost_model(load_config([*VIT_16, *QSR, *overrides]), 1)
    assert message in str(caught.value)


def test_one_rank_needs_no_link() -> None:
    one = ("speed=paper_2x8", "speed.link_gbit_per_second=null", "cluster.ranks=1")
    model = make_cost_model(load_config([*VIT_16, *QSR, *one]), 1000)
    assert model.gradient_seconds == model.exposed_gradient_seconds == 0.0


def test_any_site_goes_with_a_profile_of_as_many_ranks() -> None:
    """The same hours as on the cluster of the profile."""
    job = ("cluster=slurm", "cluster.nodes=2", "cluster.partition=gpu", "speed=paper_2x8")
    assert hours(*VIT_16, *QSR, *job) == hours(*VIT_16, *QSR, "speed=paper_2x8")
    larger = ("cluster=slurm", "cluster.nodes=1", "speed=paper_2x8", "speed.machines=1")
    compute, _, _ = hours(*VIT_16, *QSR, *larger)
    assert compute == 38.9  # twice as many images on each rank


MEASURED = "speed.allreduce={ranks:16,sizes_bytes:[1000,2000],seconds:[1.0,1.5]}"


def test_measured_times_hold_for_as_many_ranks_and_until_a_link_is_given() -> None:
    base = [*VIT_16, *QSR, "speed=paper_2x8", MEASURED]
    assert make_cost_model(load_config(base), 1).allreduce == MeasuredAllReduce(
        16, 2, (1000, 2000), (1.0, 1.5)
    )
    fewer = make_cost_model(load_config([*base, "cluster.ranks=8"]), 1)
    assert isinstance(fewer.allreduce, Link)
    link = make_cost_model(load_config([*base, "speed.link_gbit_per_second=80"]), 1)
    assert link.allreduce == Link(16, 2, 1e10, 0.0)
    wrong = MEASURED.replace("1.0,", "")
    with pytest.raises(ConfigError, match=r"speed\.allreduce: measured all-reduces need"):
        make_cost_model(load_config([*base, wrong]), 1)


STEPS = (
    "speed.data_parallel={vit_b16@224/fp16:{ranks:16,images:256,micro_batches:2,"
    "blocking_seconds:2.0,overlapped_seconds:1.9,bucket_mib:25}}"
)
IMAGE = "speed.seconds_per_image={vit_b16@224/fp16:0.005}"


def test_measured_steps_hold_for_the_same_steps_on_as_many_ranks() -> None:
    # 16 workers of 256 images, 1.28 s; an all-reduce of 1 s was not waited for otherwise
    allreduce = "speed.allreduce={ranks:16,sizes_bytes:[4],seconds:[0.5]}"
    base = [*VIT_16, *QSR, "speed=paper_2x8", allreduce, STEPS, IMAGE]
    model = make_cost_model(load_config(base), 1)
    assert model.compute_seconds == pytest.approx(1.28)
    assert model.waiting_seconds == pytest.approx(2.0 - 1.28 - 0.5)
    assert model.overlapped_step_seconds == 1.9
    other_buckets = make_cost_model(load_config([*base, "cluster.bucket_mib=50"]), 1)
    assert other_buckets.waiting_seconds == model.waiting_seconds
    assert other_buckets.overlapped_step_seconds is None
    others = (
        "micro_batch=64",
        "global_batch=8192",
        "cluster.ranks=8",
    )
    for setting in others:
        other = make_cost_model(load_config([*base, setting]), 1)
        assert (other.waiting_seconds, other.overlapped_step_seconds) == (0.0, None), setting
    # measured with what a profile says, they do not hold for constants of the command line
    known: dict[str, object] = {"sources": {}, "data_parallel": {"a": 1}}
    price = "speed.price_per_gpu_hour=1"
    mark_given_speed({"speed": known}, parse_overrides([price]))
    assert known["data_parallel"] == {"a": 1}
    mark_given_speed({"speed": known}, parse_overrides([IMAGE]))
    assert known["data_parallel"] == {}
    # steps that took less time than their parts did, measured one by one: no waiting
    faster = STEPS.replace("2.0", "1.5")
    assert make_cost_model(load_config([*base, faster]), 1).waiting_seconds == 0.0


def test_a_constant_of_the_command_line_loses_the_profiles_source() -> None:
    image = "speed.seconds_per_image={vit_b16@224/fp16:0.001}"
    given = ["speed=paper_2x8", "speed.link_gbit_per_second=100", image]
    found = load_config([*VIT_16, *QSR, *given])
    assert found.speed is not None
    sources = found.speed.sources
    assert sources["link_gbit_per_second"] == sources["vit_b16@224/fp16"] == GIVEN
    assert sources["resnet152@224/fp16"] == speed("paper_2x8").sources["resnet152@224/fp16"]
    assert sources["latency_seconds"] == speed("paper_2x8").sources["latency_seconds"]


def test_a_speed_profile_is_no_part_of_a_runs_identity() -> None:
    given = ("speed=paper_2x8", "speed.link_gbit_per_second=7")
    without, paper = (load_config([*VIT_16, *QSR, *words]) for words in ((), given))
    assert (without.speed, paper.speed is not None) == (None, True)
    assert config_hash(without) == config_hash(paper)
    assert run_folder(without) == run_folder(paper)
    assert differences(without, paper) == []


INSIDE = "speed.inside_gbit_per_second=160"


@pytest.mark.parametrize(
    ("workers", "each", "inside", "between", "share"),
    [
        # a machine is a worker, half a worker, or two of them; all 16 ranks on 2 machines
        (2, 8, (8, 1, 20e9), (2, 2), 1.0),
        (1, 16, (16, 2, 2.322590650e9), (1, 2), 0.5),
        (4, 4, (4, 1, 20e9), (4, 2), 1.0),
        # on one machine every rank has a link of its own
        (2, 4, (4, 1, 20e9), (2, 1), 0.25),
    ],
)
def test_links_of_workers_of_several_ranks(
    workers: int,
    each: int,
    inside: tuple[int, int, float],
    between: tuple[int, int],
    share: float,
) -> None:
    settings = (f"workers={workers}", f"ranks_per_worker={each}", "speed=paper_2x8", INSIDE)
    config = load_config([*VIT_16, *QSR, *settings])
    model = make_cost_model(config, 86_381_800)
    assert (model.allreduce.ranks, model.allreduce.machines) == (
        workers * each,
        2 if workers * each == 16 else 1,
    )
    assert model.compute_seconds == pytest.approx(0.00292180879 * 4096 / (workers * each))
    assert model.overlap_within_workers
    parts = model.parts
    assert parts is not None
    assert isinstance(parts.inside, Link)
    found = (parts.inside.ranks, parts.inside.machines, parts.inside.bytes_per_second)
    assert found == pytest.approx(inside)
    assert (parts.between.ranks, parts.between.machines, parts.share) == (*between, share)


def test_the_speed_within_a_machine_must_be_known() -> None:
    settings = ("workers=2", "ranks_per_worker=8", "speed=paper_2x8")
    with pytest.raises(UnknownSpeedError, match=r"set speed\.inside_gbit_per_second"):
        make_cost_model(load_config([*VIT_16, *QSR, *settings]), 86_381_800)


def test_a_cluster_that_is_too_small_for_the_ranks_of_the_workers() -> None:
    settings = ("workers=4", "ranks_per_worker=8", "speed=paper_2x8", INSIDE)
    with pytest.raises(
        UnknownSpeedError, match="workers=4 x ranks_per_worker=8 = 32 ranks, but speed=paper_2x8 is"
    ):
        make_cost_model(load_config([*VIT_16, *QSR, *settings]), 86_381_800)
