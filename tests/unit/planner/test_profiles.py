"""What a calibration found -> a cluster's profile, and its file."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qsr.config.load import load_config
from qsr.config.schema import DataParallelSteps
from qsr.core.cost import Link
from qsr.errors import ConfigError
from qsr.planner.profiles import (
    MARK,
    Measurement,
    profile_path,
    profile_text,
    read_profile,
    updated_profile,
)

CLUSTER = replace(load_config(["experiment=demo/quadratic", "cluster.ranks=2"]).cluster, name="x")
LINK = Link(2, 1, 1e9, 50e-6)
STEPS = DataParallelSteps(2, 32, 2, 0.05, 0.045, bucket_mib=25.0)
SIZES = (4096, 65_536, 1_048_576)
FOUND = Measurement(
    key="small_resnet@32/fp32",
    machines=1,
    ranks_per_machine=2,
    seconds_per_image=0.00123456789,
    sizes_bytes=SIZES,
    allreduce_seconds=tuple(LINK.seconds(size) for size in SIZES),
    inside_seconds=(),
    data_parallel=STEPS,
    how="measured by a test",
)


def test_a_first_profile() -> None:
    profile = updated_profile(CLUSTER, None, FOUND)
    assert (profile.name, profile.ranks, profile.device) == ("x", 2, "auto")
    speed = profile.speed
    assert speed is not None
    assert (speed.machines, speed.ranks_per_machine) == (1, 2)
    assert speed.seconds_per_image == {"small_resnet@32/fp32": 0.00123457}
    # 1e9 bytes are 8 Gbit
    assert (speed.link_gbit_per_second, speed.latency_seconds) == (8.0, 50e-6)
    assert speed.allreduce is not None
    assert speed.allreduce.sizes_bytes == SIZES
    assert speed.data_parallel == {"small_resnet@32/fp32": STEPS}
    assert speed.sources["small_resnet@32/fp32"] == "measured by a test"
    assert speed.sources["link_gbit_per_second"] == (
        "fitted to all-reduces of 3 sizes, to within 0 % (root mean square); measured by a test"
    )


def test_the_link_between_the_ranks_of_a_machine() -> None:
    inside = Link(2, 1, 4e9, 50e-6)
    seconds = tuple(inside.seconds(size) for size in SIZES)
    both = Link(4, 2, 1e9, 50e-6)
    found = replace(
        FOUND,
        machines=2,
        allreduce_seconds=tuple(both.seconds(size) for size in SIZES),
        inside_seconds=seconds,
    )
    speed = updated_profile(CLUSTER, None, found).speed
    assert speed is not None
    assert (speed.link_gbit_per_second, speed.inside_gbit_per_second) == (8.0, 32.0)
    assert speed.sources["inside_gbit_per_second"] == "fitted like the link, to within 0 %"


def test_another_network_is_added_and_the_link_renewed() -> None:
    first = updated_profile(CLUSTER, None, FOUND)
    assert first.speed is not None
    first = replace(first, speed=replace(first.speed, price_per_gpu_hour=0.5))
    faster = Link(2, 1, 2e9, 0.0)
    slower = replace(STEPS, blocking_seconds=0.5)
    other = replace(
        FOUND,
        key="small_vit@32/fp32",
        data_parallel=slower,
        seconds_per_image=0.5,
        allreduce_seconds=tuple(faster.seconds(size) for size in SIZES),
        how="measured later",
    )
    speed = updated_profile(CLUSTER, first, other).speed
    assert speed is not None
    assert speed.seconds_per_image == {"small_resnet@32/fp32": 0.00123457, "small_vit@32/fp32": 0.5}
    assert speed.data_parallel == {"small_resnet@32/fp32": STEPS, "small_vit@32/fp32": slower}
    assert speed.link_gbit_per_second == pytest.approx(16.0)
    assert speed.price_per_gpu_hour == 0.5
    assert speed.sources["small_resnet@32/fp32"] == "measured by a test"
    assert speed.sources["allreduce"] == speed.sources["small_vit@32/fp32"] == "measured later"
    again = updated_profile(CLUSTER, first, replace(FOUND, seconds_per_image=0.25)).speed
    assert again is not None
    assert again.seconds_per_image == {"small_resnet@32/fp32": 0.25}


def test_one_rank_has_no_link() -> None:
    alone = replace(FOUND, ranks_per_machine=1, sizes_bytes=(), allreduce_seconds=())
    alone = replace(alone, data_parallel=None)
    speed = updated_profile(CLUSTER, None, alone).speed
    assert speed is not None
    assert (speed.link_gbit_per_second, speed.allreduce, speed.data_parallel) == (None, None, {})
    assert speed.sources.keys() == {"small_resnet@32/fp32"}


def test_speeds_of_other_ranks_are_not_mixed() -> None:
    first = updated_profile(CLUSTER, None, FOUND)
    with pytest.raises(ConfigError, match="x was measured on 1 x 2 ranks, not 1 x 4: choose"):
        updated_profile(CLUSTER, first, replace(FOUND, ranks_per_machine=4))


def test_allreduces_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not take longer for more bytes: measure again"):
        updated_profile(CLUSTER, None, replace(FOUND, allreduce_seconds=(3.0, 2.0, 1.0)))


def test_a_profile_survives_its_file_and_composes(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    path = profile_path("x", tmp_path)
    profile = updated_profile(CLUSTER, None, FOUND)
    path.write_text(profile_text(profile))
    assert read_profile(path) == profile
    assert profile_path("x", tmp_path) == path  # its own file may be renewed
    assert yaml.safe_load(path.read_text())["speed"]["fitted_to"] == []


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"local\.yaml was not written by a calibration"):
        profile_path("local")
    for name in ("", "a/b", "../x", "a.b"):
        with pytest.raises(ConfigError, match="letters, digits and underscores"):
            profile_path(name)
    with pytest.raises(ConfigError, match=r"cluster cannot be written: calibrate in a checkout"):
        profile_path("x", tmp_path)
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "x.yaml").write_text(MARK + "\nname: [")
    with pytest.raises(ConfigError, match=r"x\.yaml is not a profile of this version: delete it"):
        read_profile(profile_path("x", tmp_path))
