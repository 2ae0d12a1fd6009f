"""F28: paths and names have unusual characters. A path is used as written, or the refusal shows
what to write. The status command finds runs behind links, and no name leads out of the runs folder.
"""

import os
from pathlib import Path

import pytest

from qsr import build
from qsr.config.evaluate import load_evaluate
from qsr.config.load import load_config, load_configs, run_folder
from qsr.config.overrides import expand_sweeps, parse_overrides
from qsr.errors import ConfigError
from qsr.ops.status import read_status
from qsr.ops.status_table import status_table
from qsr.report.collect import find_runs
from tests.image_trees import write_tree

DEMO = "experiment=demo/constant"
NAMES = [
    *(
        "year=2024",
        "a,b",
        "set#1",
        "(old)",
        "[1]",
        "{x}",
        "a b",
        " a ",
        "it's",
        '"',
        '"a" b',
        "$HOME",
    ),
    *(
        "50%",
        "a:b",
        "b\\",
        "\\'",
        "näh",
        "日本",
        "-x",
        "123",
        "true",
        "choice(a,b)",
        "a\nb",
        "@",
        "~",
    ),
]


@pytest.mark.parametrize("setting", ["data.root", "runs_dir", "weights", "++data.root"])
def test_a_path_is_one_value_as_it_is_written(setting: str) -> None:
    paths = [*(f"/data/{name}" for name in NAMES), *(f"{name}/data" for name in NAMES[:-1])]
    for path in paths:
        assert expand_sweeps([f"{setting}={path}"]) == [[f"{setting}={path}"]]
        (override,) = parse_overrides([f"{setting}={path}"])
        assert override.value() == path


def test_the_settings_have_the_path() -> None:
    path = "/data/" + "".join(NAMES)
    config = load_config([DEMO, f"data.root={path}", f"runs_dir={path}"])
    assert (config.data.root, config.runs_dir) == (path, path)
    found = load_evaluate([f"weights={path}", "model=resnet152", f"data.root={path}"])
    assert (found.weights, found.data.root) == (path, path)


def test_quotes_of_hydra_and_variables_are_understood_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = load_config([DEMO, "data.root='/a=b,c'", "++runs_dir=${oc.env:SCRATCH}/runs"])
    assert (config.data.root, config.runs_dir) == ("/a=b,c", "/scratch/me/runs")


def test_a_tilde_is_refused_with_what_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for setting in ("data.root", "runs_dir"):
        with pytest.raises(ConfigError) as refused:
            load_configs([DEMO, f"{setting}=~/data"])
        assert f"write {setting}=/home/me/data, or, if the path" in str(refused.value)
        quoted = str(refused.value).rpartition("'")[0].rpartition("'")[2]
        assert quoted == f'{setting}="~/data"'
        config = load_config([DEMO, quoted])
        assert "~/data" in (config.data.root, config.runs_dir)


def test_bytes_that_are_no_text_are_refused_with_the_way_round() -> None:
    path = os.fsdecode(b"/data/caf\xe9")
    with pytest.raises(ConfigError) as refused:
        load_configs([DEMO, f"data.root={path}"])
    assert str(refused.value) == (
        r"data.root=b'/data/caf\xe9' is not UTF-8: use a symbolic link with a UTF-8 name"
    )


def test_the_refusal_of_another_text_shows_how_it_is_quoted() -> None:
    with pytest.raises(ConfigError) as refused:
        load_configs([DEMO, "data.name=a=b"])
    assert str(refused.value).endswith("""special characters: 'data.name="a=b"'""")
    assert load_config([DEMO, 'data.name="a=b"']).data.name == "a=b"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("experiment=../experiment/demo/quadratic", "did you mean demo/quadratic?"),
        ("experiment=demo/../demo/constant", "did you mean demo/constant?"),
        ("+experiment=/etc/passwd", "experiment=/etc/passwd: no such file in configs; "),
        ("experiment=[demo/constant,demo/parallel]", "no such file in configs; "),
        ("experiment@data=demo/constant", "write experiment=NAME"),
        ("experiment=null", "epochs has no value: set it, or choose an experiment"),
        ("data=null", "data=null: it cannot be left out: choose one with data=NAME: digits, few"),
        ("sync=../sync/constant", "did you mean constant?"),
        ("data=[1]", "data=[1]: no such file in configs; "),
        ("data={root: x}", "no such file in configs; "),
        ("seed=glob(*)", "'seed=glob(*)': list the values, as in seed=1,2,3"),
        ("seed=interval(1,2)", "list the values, as in seed=1,2,3"),
        ("seed=range(0,1e12)", "these lists give more than 10,000 runs"),
        ("~cluster", "~cluster: it cannot be left out: choose one with cluster=NAME: "),
    ],
)
def test_names_lead_nowhere_else_and_nothing_is_a_traceback(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_configs([DEMO, setting])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", ["../../x", "a\nb", "/etc", "é" * 200])
def test_a_value_in_a_folder_name_stays_one_name(value: str, tmp_path: Path) -> None:
    folder = run_folder(load_config([DEMO, f'data.name="{value}"', f"runs_dir={tmp_path}"]))
    assert folder.parent.parent == tmp_path / "demo" / "constant"
    assert folder.parent.name.isprintable()
    folder.mkdir(parents=True)


def test_a_run_with_odd_paths_and_status_behind_links(tmp_path: Path) -> None:
    """The runs were moved to another disk, and are linked back; a link leads in a circle."""
    data, runs = tmp_path / "it's, (my) data=1\n#2", tmp_path / "-runs = {1,2} ü"
    write_tree(data, classes=2, train=4, val=2)
    settings = (
        *("data=folder", "data.image_size=32", "data.loader=torchvision", "model=small_resnet"),
        *(
            "epochs=1",
            "global_batch=4",
            "workers=2",
            "cluster.ranks=1",
            "sync=constant",
            "sync.h=2",
        ),
        *("schedule.peak_lr=0.1", "schedule.warmup_epochs=0", "tracking=none"),
        "data.name=mine",
        *("evaluation.batchnorm_micro_batches=2", f"data.root={data}", f"runs_dir={runs}"),
    )
    build.run(load_config(settings))
    moved = (runs / "custom").rename(tmp_path / "moved")
    (runs / "custom").symlink_to(moved)
    (moved / "circle").symlink_to(runs)
    (folder,) = find_runs([runs])
    assert runs in folder.parents
    assert read_status(folder, {}).state == "done"


def test_a_name_that_is_no_text_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9\n")
    folder.mkdir()
    (folder / "config.yaml").touch()
    (found,) = find_runs([tmp_path])
    (_, line) = status_table([read_status(found, {})]).splitlines()
    assert "caf\ufffd?" in line
