"""The example of docs/own-parts.md: it trains, resumes, is evaluated and planned; what is wrong
with a part is said in one line before anything starts."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qsr import CosineSchedule, Plan, load_model
from qsr.cli import evaluate, plan, status
from qsr.config.load import config_hash, load_config, own_files, run_folder
from qsr.config.own import load_own, source_hashes
from qsr.config.schema import OwnModelConfig, OwnSync
from qsr.errors import ConfigError, ModelFileError
from qsr.run.snapshot import take_snapshot
from qsr.train.models import check_network
from tests.cli import ENVIRONMENT, ROOT

PAGE = (ROOT / "docs" / "own-parts.md").read_text()
SOURCE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
(COMMAND,) = re.findall(r"^    qsr train (.+(?:(?<=\\)\n.+)*)", PAGE, re.MULTILINE)
WORDS = shlex.split(COMMAND.replace("\\\n", " "))
OWN_CODE = ["model=custom", "model.target=my_parts.py:build"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the example's file."""
    (tmp_path / "my_parts.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(folder: Path, *words: str, code: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | {"PYTHONPATH": str(code)}
    return subprocess.run(
        [sys.executable, "-P", "-m", "qsr", *words],
        capture_output=True, text=True, env=environment, cwd=folder, check=False, timeout=240,
    )  # fmt: skip


def test_the_example_trains_and_resumes_unless_its_source_has_changed(
    here: Path, digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["train", *WORDS, f"data.root={digits}", "data.loader=torchvision", "tracking=none"]
    first = call(here, *run, "stop_after_steps=30", "cluster.ranks=1")
    assert first.returncode == 0, first.stderr
    (here / "my_parts.py").write_text(f"{SOURCE}# a remark\n")
    changed = call(here, *run)
    assert changed.returncode == 2
    (line,) = changed.stderr.splitlines()
    folder = run_folder(load_config(run[1:]))
    assert re.match(
        rf"refused: {re.escape(str(folder))} holds a run with other settings \("
        r"model\.source\.my_parts\.py: [0-9a-f]{16} -> [0-9a-f]{16}; schedule\.source\.my_parts",
        line,
    )
    (here / "my_parts.py").write_text(SOURCE)
    second = call(here, *run)
    assert second.returncode == 0, second.stderr
    monkeypatch.syspath_prepend(here)
    import my_parts  # type: ignore[import-not-found]

    # 66 steps, 44 of them in the warm-up; H by hand from the file's classes
    schedule = my_parts.Warm(0.2, 1e-6, 44, 66)
    expected = Plan(schedule, my_parts.Capped(4, 0.4375, 10))
    assert schedule(65) == 0.002 > CosineSchedule(0.2, 1e-6, 44, 66)(65)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["averages"], summary["steps"]) == (expected.num_rounds, 66)
    assert expected.longest_round.length == 10
    # the trained network
    with pytest.raises(ModelFileError, match=r"network of your own.*my_parts\.py:build"):
        load_model(folder)
    model = load_model(folder, build=my_parts.build)
    assert model.module[0].out_channels == 32  # type: ignore[index]
    assert model.module(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert evaluate.main([str(folder)]) == 2
    assert "add model=custom model.target=my_parts.py:build" in capsys.readouterr().err
    assert evaluate.main([str(folder), "model=small_vit"]) == 2
    assert "model=small_vit is not it" in capsys.readouterr().err
    assert evaluate.main([str(folder), *OWN_CODE]) == 0
    assert f"top-1 {summary['top1']:.3f} %" in capsys.readouterr().out.partition("\n")[0]
    # its status needs no code
    (here / "my_parts.py").unlink()
    assert status.main([str(folder)]) == 0
    assert "\ndone " in capsys.readouterr().out


def test_the_planner_counts_its_parameters_and_rounds(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main([*WORDS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "my_parts.py:build(width=32)"
    assert found["parameters"] == 32 * 27 + 32 + 10 * 16 * 32 + 10
    assert found["longest_round_steps"] == 10


def test_a_rehearsal_keeps_the_network(here: Path) -> None:
    config = load_config(["experiment=vit_b16_b4096/quadratic_h4", "rehearsal=digits", *OWN_CODE])
    assert isinstance(config.model, OwnModelConfig)
    check_network(config)
    rule = ["sync=custom", "sync.target=my_parts.py:Capped"]
    options = "sync.options={h_base:4,alpha:0.0175,largest:9}"
    config = load_config(
        ["experiment=vit_b16_b4096/quadratic_h4", "rehearsal=digits", *rule, options]
    )
    assert isinstance(config.sync, OwnSync)
    assert config.sync.label == "my_parts.py:Capped(h_base=4, alpha=0.0175, largest=9)"


def test_a_job_runs_a_copy(here: Path) -> None:
    config = load_config(WORDS)
    code = take_snapshot(here / "runs", own_files([config]))
    assert code == take_snapshot(here / "runs", own_files([config]))
    assert code != take_snapshot(here / "runs")
    (here / "my_parts.py").write_text("raise SystemExit")
    ask = (
        "import sys; from qsr.config.load import *; c = load_config(sys.argv[1:]); "
        "print(config_hash(c), c.sync.make_rule(22).rule.largest)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", ask, *WORDS],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(code)}, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [config_hash(config), "10"]
    edited = next((code / "qsr_own").rglob("my_parts.py"))
    edited.chmod(0o644)
    edited.write_text("")
    (here / "my_parts.py").write_text(SOURCE)
    assert take_snapshot(here / "runs", own_files([config])).name == f"{code.name}-2"


RULES = """
from qsr import CosineSchedule, Rule

class Zero(Rule):
    def length(self, start, lr): return 0 if start > 100 else 3

class Half(Rule):
    def length(self, start, lr): return 2.5

class Fails(Rule):
    def length(self, start, lr): return 1 // 0

class Gradients(Rule):
    def length(self, start, lr): return 2
    def averages(self, start): return "gradients"

class Else(Rule):
    def length(self, start, lr): return 2
    def averages(self, start): return "moments"

def number(): return 4

def short(peak_lr, final_lr, warmup_steps, total_steps):
    return CosineSchedule(peak_lr, final_lr, warmup_steps, total_steps - 1)

class Negative(CosineSchedule):
    def __call__(self, step): return -super().__call__(step)

three = 3
def build(num_classes, image_size): return 3
"""
NOT_LOGITS = "from torch import nn\ndef build(**_): return nn.Conv2d(3, 4, 1)\n"


@pytest.mark.parametrize(
    ("group", "target", "line"),
    [
        ("model", "rules.py", "write MODULE:NAME or FILE.py:NAME"),
        ("model", "nowhere.py:f", "there is no file "),
        ("model", "no_such:f", "no module no_such here or among the installed packages"),
        ("model", "package.modls:build", "no module package.modls here"),
        ("model", "sys:exit", "sys has no file of its own"),
        ("model", "rules.py:biuld", "rules.py has no biuld; did you mean build?"),
        ("model", "rules.py:three", "rules.py needs a function or class, not the value three"),
        ("model", "rules.py:build", "it returns a int, not a torch.nn.Module): correct it"),
        ("model", "package.models:build", "it returns shape [2, 4, 32, 32] instead of logits"),
        ("model", "broken.py:f", "ModuleNotFoundError: No module named 'nothing_here'; broken.py, "
         "line 2"),
        ("model", "syntax.py:f", "SyntaxError: invalid syntax; syntax.py, line 1"),
        ("model", "leaves.py:f", "SystemExit: 3; leaves.py, line 1"),
        ("sync", "rules.py:Zero", "H of the round at step 102 (learning rate 0.180382) is 0: it "
         "must be a whole number of at least 1"),
        ("sync", "rules.py:Half", "is 2.5: it must be a whole number"),
        ("sync", "rules.py:Fails", "ZeroDivisionError: integer division or modulo by zero; ru"),
        ("sync", "rules.py:Gradients", "is 2, but a round that averages gradients has one step"),
        ("sync", "rules.py:Else", "averages 'moments': it must be 'gradients' or 'parameters'"),
        ("sync", "rules.py:number", "it returns a int, not a qsr.Rule"),
        ("schedule", "rules.py:short", "its total_steps is 329, not the 330 that it was given"),
        ("schedule", "rules.py:Negative", "the learning rate of step 0 is -1e-06: it must be a"),
        ("schedule", "rules.py:number", "got an unexpected keyword argument 'peak_lr'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(group: str, target: str, line: str, here: Path) -> None:
    (here / "package").mkdir()
    for name, text in {
        "rules.py": RULES,
        "broken.py": "\nimport nothing_here",
        "syntax.py": "def f(:",
        "leaves.py": "raise SystemExit(3)",
        "package/models.py": NOT_LOGITS,
    }.items():
        (here / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        check_network(
            load_config(
                ["experiment=demo/quadratic", f"{group}=custom", f"{group}.target={target}"]
            )
        )
    assert str(caught.value).startswith(f"{group}.target={target}")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model=custom"], "model.target has no value: set it"),
        (["model.target=x.py:f"], "model.target is not a setting of model.name=small_resnet; "
         "model=custom has it"),
        (["model=custom", "model.target=3"], "model.target=3: input should be a valid string"),
        ([*OWN_CODE, "model.options.depth=3"], "got an unexpected keyword argument 'depth'"),
        ([*OWN_CODE, "model.source={my_parts.py:0}"], "model.source is filled in by qsr: leave"),
        ([*WORDS, "sync.delay_steps=1"], "sync.delay_steps=1: not with sync=custom"),
        ([*WORDS, "sync.options.h_base=0"], "ValueError: h_base must be at least 1 step, got 0"),
    ],
)  # fmt: skip
def test_wrong_settings_of_a_part(words: list[str], line: str, here: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_network(load_config(["experiment=demo/quadratic", *words]))
    assert line in str(caught.value)


def test_all_files_of_ones_own_package_are_its_source(here: Path) -> None:
    for name in ("pack_of_mine/models.py", "pack_of_mine/deep/layers.py", "alone_of_mine.py"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("def build(): return 7\n")
    before = source_hashes("model", "pack_of_mine.models:build")
    assert list(before) == ["pack_of_mine/models.py", "pack_of_mine/deep/layers.py"]
    assert load_own("model", "pack_of_mine.models:build", before)() == 7
    (here / "pack_of_mine/deep/layers.py").write_text("")
    with pytest.raises(ConfigError, match=r"deep/layers\.py is not as it was when the run was"):
        load_own("model", "pack_of_mine.models:build", before)
    assert list(source_hashes("model", "alone_of_mine:build")) == ["alone_of_mine.py"]
    assert list(source_hashes("model", "torchvision.models.vgg:vgg11")) == [
        "torchvision/models/vgg.py"
    ]


def test_switching_a_group_leaves_what_the_experiment_set_for_another_member() -> None:
    vit = "experiment=vit_b16_b4096/quadratic_h4"
    constant = load_config([vit, "sync=constant", "sync.h=4"])
    assert (constant.sync.label, constant.experiment) == (
        "constant H = 4", "vit_b16_b4096/quadratic_h4/sync.h=4,sync=constant",
    )  # fmt: skip
    assert load_config([vit, "sync=parallel"]).sync.label == "data parallel"
    cut = load_config(
        ["experiment=resnet152_b4096/modified_cosine_quadratic_h2", "schedule=linear"]
    )
    assert cut.schedule.name == "linear"
    assert load_config([vit, "optimizer=sgd"]).optimizer.name == "sgd"
    for words, line in (
        (["sync=power"], "sync.coefficient and sync.exponent have no value: set them"),
        (["sync=constant"], "sync.h has no value: set it"),
        (["sync=constant", "sync.h=4", "sync.alpha=1"], "sync.alpha is not a setting of sync.rule="
         "constant; sync=quadratic has it"),
        (["optimizer=sgd", "optimizer.beta1=0.9"], "of optimizer.name=sgd; optimizer=adamw has it"),
        (["schedule=linear", "schedule.stop_epoch=3"], "schedule=cosine has it"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            load_config([vit, *words])
        assert str(caught.value).endswith(line)
