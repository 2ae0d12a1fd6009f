"""What people who know Hydra try first: each works, or is refused by one line that says how it is
done here."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as some

from qsr.cli import doctor, evaluate, plan, submit, train
from qsr.config.load import load_config, load_configs, parse_config, run_folder, to_dict
from qsr.config.overrides import parse_overrides, text_of
from qsr.errors import ConfigError

DEMO = "experiment=demo/quadratic"
BARE = "runs/demo/quadratic/seed_1"
VIT = "experiment=vit_b16_b4096/quadratic_h4"


def folders(printed: str) -> list[str]:
    """The run folders in what --cfg job prints."""
    return [line[2:] for line in printed.splitlines() if line.startswith("# ")]


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        ([DEMO], [BARE]),
        # one run, one name
        ([f"{DEMO}.yaml"], [BARE]),
        ([f"+{DEMO}"], [BARE]),
        ([DEMO, "~rehearsal"], [BARE]),
        ([DEMO, "rehearsal=null"], [BARE]),
        ([DEMO, "rehearsal=digits", "~rehearsal"], [BARE]),
        ([DEMO, "sync=quadratic", "model=small_resnet", "optimizer=sgd"], [BARE]),
        ([DEMO, "sync.alpha=0.4375"], [BARE]),
        ([DEMO, "++sync.alpha=43.750e-2"], [BARE]),
        ([DEMO, "loss={label_smoothing:1e-1}"], [BARE]),
        ([DEMO, "sync.alpha=7", "sync.alpha=0.4375"], [BARE]),
        ([DEMO, 'data.name="digits"', "data.mean=[.5, 5e-1, 0.50]", "compile=none"], [BARE]),
        ([DEMO, "schedule.peak_lr=${oc.decode:'0.2'}"], [BARE]),
        ([DEMO, "speed=paper_2x8", "tracking=none", "checkpoint={keep:3}"], [BARE]),
        ([DEMO, "sync.alpha=2.50e-1"], ["runs/demo/quadratic/sync.alpha=0.25/seed_1"]),
        ([DEMO, "sync.alpha=1.0"], ["runs/demo/quadratic/sync.alpha=1/seed_1"]),
        ([DEMO, "loss={label_smoothing:0.2}"],
         ["runs/demo/quadratic/loss.label_smoothing=0.2/seed_1"]),
        # sweeps; the published row is the published row in one, too
        ([VIT, "-m", "sync.alpha=0.01,0.0175"], [
            "runs/vit_b16_b4096/quadratic_h4/sync.alpha=0.01/seed_1",
            "runs/vit_b16_b4096/quadratic_h4/seed_1"]),
        ([DEMO, "--multirun", "seed=range(1,3)"], [BARE, "runs/demo/quadratic/seed_2"]),
        (["experiment=glob(demo/*quadratic)"], [BARE, "runs/demo/vit_quadratic/seed_1"]),
        ([DEMO, "model=glob(*,exclude=[timm,custom,*1*,*50])"],
         [BARE, "runs/demo/quadratic/model=small_vit/seed_1"]),
        ([DEMO, "--run"], [BARE]),
        (["--", DEMO, "--resolve"], [BARE]),
    ],
    ids=str,
)  # fmt: skip
def test_it_works(words: list[str], runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*words, "--cfg", "job"]) == 0
    printed = capsys.readouterr()
    assert (folders(printed.out), printed.err) == (runs, "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["hydra.verbose=true"], "hydra.verbose: Hydra composes the settings and does no more "
         "here; leave it out; --help lists what there is"),
        (["hydra.nonsense=1"], "hydra.nonsense: Hydra composes the settings and does no more here"),
        (["+hydra.job.chdir=true"], "paths are relative to the folder in which you start"),
        (["hydra.run.dir=/tmp/x"], "set runs_dir: a run is stored in RUNS_DIR/EXPERIMENT/seed_"),
        (["hydra.sweep.subdir=a,b"], "set runs_dir: "),
        (["~hydra"], "hydra: Hydra composes"),
        (["hydra/launcher=submitit_slurm"], "scripts/submit.py submits to Slurm"),
        (["hydra.launcher.partition=gpu"], "scripts/submit.py submits to Slurm"),
        (["hydra/sweeper=optuna"], "list the values, as in seed=1,2,3"),
        (["hydra.searchpath=[file:///x]"], "give a folder of your own with --config-dir DIR"),
        (["experiment=glob(nothing*)"], "no file of experiment/ fits"),
        (["sync.alpha=glob(*)"], "list the values, as in seed=1,2,3"),
        (["sync.alpha=interval(0.01,0.1)"], "list the values, as in seed=1,2,3"),
        (["~schedule"], "~schedule: it cannot be left out: choose one with schedule=NAME: constant,"
         " cosine, custom, linear, power_of_two, step"),
        (["tracking=null"], "tracking=null: it cannot be left out: choose one with tracking=NAME"),
        (["sync/alpha=1"], "a setting in it has a dot, as in sync.alpha=0.5"),
        (["simulation=diagonal"], "choose a file with GROUP=NAME, where GROUP is one of cluster,"),
        (["demo/quadratic"], "demo/quadratic: write experiment=demo/quadratic"),
        (["experiments=demo/quadratic", "~experiment"], "did you mean experiment?"),
        (["--seed=2"], "--seed=2: settings are written without dashes: seed=2"),
        (["--epochs", "3"], "unknown option --epochs; choose from: --help, "),
        (["--multirum"], "unknown option --multirum; did you mean --multirun?"),
        (["--cfg", "hydra"], "--cfg hydra: only the run's settings can be shown: --cfg job"),
        (["--cfg"], "--cfg: a value must follow it"),
        (["--cfg", "job", "--package", "sink"], "--package sink: no such settings; did you"),
        (["--resolve"], "--resolve belongs to --cfg job: add that"),
        (["-p", "sync"], "--package belongs to --cfg job: add that"),
        (["--info", "config"], "--info: --cfg job prints a run's settings; --help lists"),
        (["-i"], "-i: --cfg job prints a run's settings"),
        (["-sc", "install=bash"], 'bash completes after: eval "$(qsr --completion bash)"'),
        (["--hydra-help"], "--hydra-help: --help lists experiments, groups and options"),
        (["--config-name=train"], "choose a file of settings with experiment=NAME"),
        (["-cp", "conf"], "give a folder of your own with --config-dir DIR"),
        (["--config-dir", "nowhere"], "--config-dir nowhere: no such folder"),
        (["--experimental-rerun=x"], "run the same command again: it resumes the run"),
    ],
    ids=str,
)  # fmt: skip
def test_it_is_refused_by_a_line_that_says_what_is_done_here(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([DEMO, *words]) == 2
    printed = capsys.readouterr()
    (refusal,) = printed.err.splitlines()
    assert refusal.startswith("refused: ")
    assert line in refusal
    assert printed.out == ""


def test_the_printed_settings_are_those_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([VIT, "rehearsal=digits", "seed=2,3", "-c", "job", "--resolve"]) == 0
    shown = list(yaml.safe_load_all(capsys.readouterr().out))
    runs = load_configs([VIT, "rehearsal=digits", "seed=2,3"])
    assert [parse_config(settings) for settings in shown] == runs
    assert plan.main([DEMO, "--cfg=job", "-p", "sync.h_base"]) == 0
    assert capsys.readouterr().out == f"# {BARE}\n4\n"


@pytest.mark.parametrize("command", [train, plan, submit, doctor])
def test_help_lists_experiments_groups_and_options(
    command: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([DEMO, "--help"]) == 0  # type: ignore[attr-defined]
    lines = capsys.readouterr().out.splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("  sync "))
    assert " ".join(" ".join(lines[at : at + 2]).split()).startswith(
        "sync adaptive, constant, custom, every_step, growing, parallel, post_local, power, "
        "quadratic, replay, stagewise, swap"
    )
    (vit,) = (line for line in lines if line.startswith("  vit_b16_b4096/quadratic_h4 "))
    assert vit.endswith("  ViT-B/16, B = 4096; Local AdamW with QSR.")
    options = {line.split()[0] for line in lines if line.startswith("  -")}
    assert {"--cfg", "--package", "--config-dir", "-m,", "-h,"} <= options
    assert ("--dry-run" in options) == (command is submit)
    assert ("--json" in options) == (command is plan)


MINE = """# @package _global_
# The demo with a rule of my own.
defaults:
  - /recipe: demo
  - override /sync: mine
"""


def own_folder(parent: Path) -> Path:
    folder = parent / "my own, 100 %"
    for name, text in {
        "experiment/mine.yaml": MINE,
        "experiment/forgot.yaml": MINE.partition("\n")[2],
        "experiment/demo/quadratic.yaml": MINE,
        "sync/mine.yaml": "defaults: [quadratic]\nh_base: 3\nalpha: 0.3\n",
        "sync/bare.yaml": "h_base: 3\n",
        "cluster/site.yaml": "partition: gpu\nranks_per_node: 2\ngpus_per_node: 0\n"
        "environment: {NCCL_IB_HCA: mlx5_0}\n",
        "cluster/lab/two.yaml": "name: two\nlauncher: local\nranks: 2\n",
        "cluster/mosix.yaml": "launcher: mosix\n",
        "cluster/list.yaml": "- gpu\n",
        "cluster/broken.yaml": "partition: [\n",
        "cluster/typo.yaml": "partion: gpu\n",
        "cluster/old.yaml": "launcher: local\nspeed: null\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_experiments_and_groups_from_a_folder_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--config-dir", str(own_folder(tmp_path))]
    assert train.main([*own, "experiment=mine", "sync.alpha=0.30,0.4", "--cfg", "job"]) == 0
    printed = capsys.readouterr().out
    assert folders(printed) == ["runs/mine/seed_1", "runs/mine/sync.alpha=0.4/seed_1"]
    assert [run["sync"]["h_base"] for run in yaml.safe_load_all(printed)] == [3, 3]
    assert plan.main([*own, "experiment=glob(mi*)", "--json"]) == 0
    assert '"experiment": "mine"' in capsys.readouterr().out
    assert train.main([*own, "--help"]) == 0
    assert "The demo with a rule of my own." in capsys.readouterr().out


def test_a_site_is_a_file_of_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--config-dir", str(own_folder(tmp_path)), "experiment=mine"]
    given = ["cluster=site", "cluster.partition=fast", "--cfg", "job"]
    assert train.main([*own, *given]) == 0
    printed = capsys.readouterr().out
    assert folders(printed) == ["runs/mine/seed_1"]
    cluster = yaml.safe_load(printed)["cluster"]
    assert (cluster["name"], cluster["launcher"]) == ("site", "slurm")
    assert (cluster["partition"], cluster["ranks_per_node"]) == ("fast", 2)
    assert cluster["environment"].keys() >= {"NCCL_IB_HCA", "NCCL_DEBUG"}
    assert train.main([*own, "cluster=lab/two", "--cfg", "job"]) == 0
    cluster = yaml.safe_load(capsys.readouterr().out)["cluster"]
    assert (cluster["name"], cluster["launcher"], cluster["ranks"]) == ("two", "local", 2)
    assert "partition" not in cluster


def test_the_users_own_folder_is_searched_after_the_given_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_folder(tmp_path).rename(tmp_path / "qsr")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert plan.main(["experiment=mine", "cluster=site", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["cluster"]["partition"] == "gpu"
    given = tmp_path / "given"
    (given / "cluster").mkdir(parents=True)
    (given / "cluster" / "site.yaml").write_text("partition: mine\nranks_per_node: 1\n")
    words = ["--config-dir", str(given), "experiment=mine", "cluster=site", "--cfg", "job"]
    assert submit.main(words) == 0
    assert yaml.safe_load(capsys.readouterr().out)["cluster"]["partition"] == "mine"
    assert train.main([DEMO]) == 2  # a file of the project's is never replaced
    assert capsys.readouterr().err.rstrip().endswith("quadratic.yaml: rename yours")
    assert doctor.main(["--config-dir", str(given), "--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cluster=site", str(given / "cluster" / "site.yaml")] in lines
    assert ["experiment=mine", str(tmp_path / "qsr" / "experiment" / "mine.yaml")] in lines
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".config").mkdir(parents=True)
    (tmp_path / "qsr").rename(tmp_path / "home" / ".config" / "qsr")
    assert train.main(["experiment=mine", "--cfg", "job", "-p", "sync.h_base"]) == 0
    assert capsys.readouterr().out == "# runs/mine/seed_1\n3\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([DEMO], "rename yours"),
        (["experiment=forgot"], "forgot.yaml: it must begin with the line '# @package _global_'"),
        (["experiment=min"], "did you mean mine?"),
        (["experiment=demo/constant", "cluster=mosix"], "mosix.yaml: launcher='mosix': choose "
         "from: local, slurm"),
        (["experiment=demo/constant", "cluster=list"], "list.yaml holds no settings, as in"),
        (["experiment=demo/constant", "cluster=broken"], "broken.yaml is not YAML (while parsing"),
        (["experiment=demo/constant", "cluster=typo"], "cluster.partion is not a setting of "
         "cluster.launcher=slurm; did you mean cluster.partition?"),
        (["experiment=demo/constant", "cluster=old"], "cluster.speed is not a setting of "
         "cluster.launcher=local; did you mean speed?"),
        (["experiment=demo/constant", "sync=bare"], "sync.rule is missing: choose sync=NAME; a file"
         " of your own begins with defaults: [NAME, _self_]"),
        (["experiment=demo/constant", "cluster=paper_2x8"], "cluster=paper_2x8: write "
         "speed=paper_2x8"),
        (["experiment=demo/constant", "speed=site"], "speed=site: write cluster=site"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_with_ones_own_files_is_said(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["-cd", str(own_folder(tmp_path)), *words]) == 2
    (refusal,) = capsys.readouterr().err.splitlines()
    assert line in refusal


numbers = some.floats(1e-6, 1e6) | some.integers(-(10**12), 10**12)
values = some.recursive(
    numbers | some.booleans() | some.none() | some.text("ab ,:=[]()'\"1.e-null", max_size=6),
    lambda inner: some.lists(inner, max_size=3),
    max_leaves=4,
)


@given(values)
def test_a_value_has_one_text_which_means_that_value(value: object) -> None:
    (parsed,) = parse_overrides([f"x={text_of(value)}"])
    assert parsed.value() == value
    assert text_of(parsed.value()) == text_of(value)


@given(some.floats(1e-6, 1e6))
def test_all_spellings_of_a_number_have_one_text(number: float) -> None:
    exact = f"{number:.17e}"
    mantissa, exponent = exact.split("e")
    spellings = [repr(number), exact, f"{mantissa}000E{exponent}", f"+{exact}"]
    parsed = parse_overrides([f"x={spelling}" for spelling in spellings])
    assert {text_of(override.value()) for override in parsed} == {text_of(number)}


@pytest.mark.parametrize(
    ("words", "setting", "value", "name"),
    [
        (["epochs=12"], "epochs", 12, "rehearsal.epochs=12,rehearsal=digits"),
        (["rehearsal.epochs=12"], "epochs", 12, "rehearsal.epochs=12,rehearsal=digits"),
        (["epochs=15"], "epochs", 15, "rehearsal=digits"),
        (["workers=4"], "workers", 4, "rehearsal.workers=4,rehearsal=digits"),
        (["precision=bf16"], "precision", "bf16", "rehearsal.precision=bf16,rehearsal=digits"),
        (["data=few_digits"], "data.name", "few_digits", "rehearsal.data=few_digits,rehearsal=dig"),
        (["data.image_size=32"], "data.image_size", 32, "rehearsal.image_size=32,rehearsal=digits"),
        (["evaluation.batch=7"], "evaluation.batch", 7, "rehearsal=digits"),
        (["evaluation.every_epochs=1"], "evaluation.every_epochs", 1, "rehearsal=digits"),
        # what is scaled
        (["sync.alpha=0.02"], "sync.alpha", 0.005, "rehearsal=digits,sync.alpha=0.02"),
    ],
)  # fmt: skip
def test_a_rehearsal_takes_overrides_of_the_small_run(
    words: list[str], setting: str, value: object, name: str
) -> None:
    config = load_config([VIT, "rehearsal=digits", *words])
    found: object = to_dict(config)
    for part in setting.split("."):
        assert isinstance(found, dict)
        found = found[part]
    assert found == value
    assert run_folder(config).parts[3].startswith(name)


def test_a_rehearsal_without_an_experiment_is_that_of_the_command_line() -> None:
    settings = ["epochs=12", "global_batch=64", "schedule.peak_lr=0.1", "sync=constant", "sync.h=3"]
    assert load_config([*settings, "rehearsal=digits"]).epochs == 12
    with pytest.raises(ConfigError, match=r"rehearsal.epochs=0"):
        load_config([VIT, "rehearsal=digits", "epochs=0"])


def test_evaluate_takes_these_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("defaults: [folder, _self_]\nname: mine\n")
    words = ["-cd", str(tmp_path), "weights=w.pth", "model=small_vit", "data=mine", "data.root=x"]
    assert evaluate.main([*words, "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["data"]["name"], shown["model"]["name"]) == ("mine", "small_vit")
    assert evaluate.main(["--help", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  data   digits, few_digits, few_digits_tuning, folder, glyphs, imagenet, mine" in lines
    assert evaluate.main([*words, "--seed=2"]) == 2
    assert "settings are written without dashes: seed=2" in capsys.readouterr().err
