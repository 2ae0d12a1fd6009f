"""What a calibration found -> a speed profile, and its file."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qsr.config.load import CONFIG_DIR, load_config, run_folder
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
    speed = updated_profile("x", None, FOUND)
    assert speed.name == "x"
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
    speed = updated_profile("x", None, found)
    assert (speed.link_gbit_per_second, speed.inside_gbit_per_second) == (8.0, 32.0)
    assert speed.sources["inside_gbit_per_second"] == "fitted like the link, to within 0 %"


def test_another_network_is_added_and_the_link_renewed() -> None:
    first = updated_profile("x", None, FOUND)
    first = replace(first, price_per_gpu_hour=0.5)
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
    speed = updated_profile("x", first, other)
    assert speed.seconds_per_image == {"small_resnet@32/fp32": 0.00123457, "small_vit@32/fp32": 0.5}
    assert speed.data_parallel == {"small_resnet@32/fp32": STEPS, "small_vit@32/fp32": slower}
    assert speed.link_gbit_per_second == pytest.approx(16.0)
    assert speed.price_per_gpu_hour == 0.5
    assert speed.sources["small_resnet@32/fp32"] == "measured by a test"
    assert speed.sources["allreduce"] == speed.sources["small_vit@32/fp32"] == "measured later"
    again = updated_profile("x", first, replace(FOUND, seconds_per_image=0.25))
    assert again.seconds_per_image == {"small_resnet@32/fp32": 0.25}


def test_one_rank_has_no_link() -> None:
    alone = replace(FOUND, ranks_per_machine=1, sizes_bytes=(), allreduce_seconds=())
    alone = replace(alone, data_parallel=None)
    speed = updated_profile("x", None, alone)
    assert (speed.link_gbit_per_second, speed.allreduce, speed.data_parallel) == (None, None, {})
    assert speed.sources.keys() == {"small_resnet@32/fp32"}


def test_speeds_of_other_ranks_are_not_mixed() -> None:
    first = updated_profile("x", None, FOUND)
    with pytest.raises(ConfigError, match="speed=x was measured on 1 x 2 ranks, not 1 x 4: choose"):
        updated_profile("x", first, replace(FOUND, ranks_per_machine=4))


def test_allreduces_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not take longer for more bytes: measure again"):
        updated_profile("x", None, replace(FOUND, allreduce_seconds=(3.0, 2.0, 1.0)))


def test_a_profile_survives_its_file_and_composes(tmp_path: Path) -> None:
    path = profile_path("x", tmp_path)
    assert path == tmp_path / "speed" / "x.yaml"
    path.parent.mkdir()
    profile = updated_profile("x", None, FOUND)
    path.write_text(profile_text(profile))
    assert read_profile(path) == profile
    assert profile_path("x", tmp_path) == path  # its own file may be renewed
    on_slurm = ["cluster=slurm", "cluster.gpus_per_node=2", "cluster.partition=gpu"]
    for cluster in ([], on_slurm):
        config = load_config(["experiment=demo/quadratic", *cluster, "speed=x"], more=[tmp_path])
        assert config.speed == profile
        assert run_folder(config) == Path("runs/demo/quadratic/seed_1")


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    taken = re.escape(str(CONFIG_DIR / "speed" / "paper_2x8.yaml"))
    with pytest.raises(ConfigError, match=f"^name=paper_2x8 is {taken}: choose another name$"):
        profile_path("paper_2x8", tmp_path)
    for name in ("", "a/b", "../x", "a.b"):
        with pytest.raises(ConfigError, match="letters, digits and underscores"):
            profile_path(name, tmp_path)
    path = tmp_path / "speed" / "x.yaml"
    path.parent.mkdir()
    path.write_text(MARK + "\nname: [")
    with pytest.raises(ConfigError, match=r"x\.yaml is not a profile of this version: delete it"):
        read_profile(profile_path("x", tmp_path))
    path.write_text("name: x\n")
    with pytest.raises(ConfigError, match=r"x\.yaml was not written by a calibration"):
        profile_path("x", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file is not a folder: choose a folder with --config-d"):
        profile_path("x", tmp_path / "file")
