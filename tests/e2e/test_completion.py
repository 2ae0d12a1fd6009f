"""What a real bash completes, after the user presses TAB."""

import dataclasses
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from qsr.cli import complete
from qsr.config import schema
from qsr.config.parsing import KINDS
from tests.cli import ENVIRONMENT, ROOT

DEMO = "experiment=demo/quadratic"


def bash(script: str, *words: str, folder: Path = ROOT) -> str:
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", *words],
        capture_output=True, text=True, env=environment, cwd=folder, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout


def pressing_tab(lines: list[str], folder: Path = ROOT) -> list[list[str]]:
    """The completions of each line, as readline gets them: of the word after the last = or :, which
    break words in bash."""
    ask = f"""
eval "$({sys.executable} -m qsr --completion bash)"
for COMP_LINE in "$@"; do
    COMP_POINT=${{#COMP_LINE}} COMPREPLY=()
    function=$(complete -p "${{COMP_LINE%% *}}" | sed 's/.*-F \\([a-z_]*\\).*/\\1/')
    "$function"
    printf '%s\\n' "${{COMPREPLY[@]}}" ---
done
"""
    found = bash(ask, *lines, folder=folder).split("---\n")[:-1]
    return [[word for word in one.split("\n") if word] for one in found]


LINES: dict[str, list[str]] = {
    "qsr tr": ["train "],
    "qsr nothing": [],
    "qsr train experiment=vit_b16_b4096/quad": [
        "vit_b16_b4096/quadratic_h4 ", "vit_b16_b4096/quadratic_h4_capped ",
        "vit_b16_b4096/quadratic_h8 "],
    "qsr train experiment=demo/quadratic,demo/par": ["demo/quadratic,demo/parallel "],
    "qsr train exp": ["experiment="],
    "qsr train sync=po": ["post_local ", "power "],
    f"qsr train {DEMO} sync.al": ["sync.alpha="],
    f"qsr train {DEMO} sync=constant sync.": [
        "sync.average_momentum=", "sync.average_second_moment=", "sync.delay_steps=", "sync.h=",
        "sync.h_max=", "sync.outer_lr=", "sync.outer_momentum=", "sync.outer_nesterov=",
        "sync.outer_rate_correction=", "sync.rule="],
    "qsr train experiment=vit_b16_b4096/parallel sync.average=": ["gradients ", "parameters "],
    "qsr train experiment=vit_b16_b4096/parallel optimizer.b": [
        "optimizer.beta1=", "optimizer.beta2="],
    "qsr train data.augmentation.randaugment=t": ["timm ", "torchvision "],
    "qsr train cuda_graphs=": ["false ", "true "],
    "qsr train precision=fp": ["fp16 ", "fp32 "],
    "qsr train work": ["workers="],
    "qsr train da": ["data.", "data="],
    "qsr train cluster=slurm cluster.sig": ["cluster.signal=", "cluster.signal_lead_seconds="],
    "qsr plan --js": ["--json "],
    "qsr submit --d": ["--dry-run "],
    "qsr train -": ["--cfg ", "--config-dir ", "--help ", "--multirun ", "--package ", "-h ",
                    "-m "],
    "python scripts/plan.py experiment=demo/quad": ["demo/quadratic "],
    "python other/plan.py experiment=demo/quad": [],
    # bash completes paths
    "qsr train data.root=": [],
    "qsr report ru": [],
}  # fmt: skip


def test_words_by_value() -> None:
    assert dict(zip(LINES, pressing_tab(list(LINES)), strict=True)) == LINES


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\n")
    lines = [f"qsr train {given} experiment=ow" for given in ("--config-dir mine", "-cd=mine")]
    assert pressing_tab(lines, tmp_path) == [["own "], ["own "]]


def test_in_an_interactive_shell() -> None:
    """readline puts what is missing into the line: in bash -i, on a terminal."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(PS1="ready> ", TERM="dumb", PYTHONPATH=str(ROOT), INPUTRC="/dev/null")
        os.chdir(ROOT)
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])

    def answer(line: str, until: str) -> str:
        os.write(terminal, line.encode())
        seen = ""
        while until not in seen:
            seen += os.read(terminal, 4096).decode()
        return seen

    try:
        answer("", "ready> ")
        answer(f'eval "$({sys.executable} -m qsr --completion bash)"\n', "ready> ")
        answer('qsr() { echo "<$*>"; }\n', "ready> ")
        seen = answer("qsr tra\tdata=dig\tsync.al\t3 optimizer.nest\tt\t\n", ">\r\n")
    finally:
        os.close(terminal)
        os.waitpid(process, 0)
    assert "<train data=digits sync.alpha=3 optimizer.nesterov=true>" in seen


def test_an_unknown_shell_is_refused() -> None:
    ask = f"{sys.executable} -m qsr --completion fish 2>&1 || true"
    assert bash(ask).startswith("refused: --completion takes one word, bash: eval ")


def test_it_imports_nothing_that_is_slow() -> None:
    ask = (
        "import sys; from qsr.cli.complete import completions; completions('qsr train sync.al'); "
        "print(*{'torch', 'hydra', 'omegaconf', 'pydantic', 'yaml', 'numpy'} & set(sys.modules))"
    )
    assert bash(f'{sys.executable} -c "{ask}"') == "\n"


def test_its_settings_are_those_of_the_schema() -> None:
    """It reads the schema's text; these are its classes."""

    def words(hint: Any) -> list[str]:
        if hint is bool:
            return ["true", "false"]
        if get_origin(hint) is tuple or get_origin(hint) is dict:
            return []
        if type(hint).__name__ == "_LiteralGenericAlias":
            return [str(word) for word in get_args(hint)]
        return [word for part in getattr(hint, "__args__", ()) for word in words(part)]

    def classes(hint: Any) -> list[Any]:
        if dataclasses.is_dataclass(hint):
            return [hint]
        if get_origin(hint) in (tuple, dict):
            return []
        return [found for part in getattr(hint, "__args__", ()) for found in classes(part)]

    def settings(cls: Any, prefix: str) -> Iterator[tuple[str, list[str]]]:
        for field in dataclasses.fields(cls):
            inner = classes(field.type)
            for one in inner:
                yield from settings(one, f"{prefix}{field.name}.")
            if not inner:
                yield f"{prefix}{field.name}", words(field.type)

    found = list(complete._Schema().settings("Config", "", {}))
    assert sorted(found) == sorted(settings(schema.Config, ""))
    assert len(found) > 150
    assert {name for _, name in KINDS.items()} - {"kind"} == {"name", "rule", "launcher"}
