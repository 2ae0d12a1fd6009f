"""What pip installs: a light package, and with the extras the command `qsr` in any folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import qsr
from tests.cli import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_EXTRAS = (
    "PIL", "hydra", "matplotlib", "numpy", "nvidia.dali", "omegaconf", "pandas", "pydantic", "rich",
    "safetensors", "scipy", "sklearn", "submitit", "timm", "torchvision", "wandb", "yaml",
)  # fmt: skip
WITHOUT_EXTRAS = f"""
import sys
finders = list(sys.meta_path)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if any(f"{{name}}.".startswith(f"{{other}}.") for other in {OF_EXTRAS}):
            return None
        found = (finder.find_spec(name, path, target) for finder in finders)
        return next(filter(None, found), None)
sys.meta_path[:] = [Finder()]
"""
"""Program text after which only torch and the standard library can be imported."""


def python(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text, *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip


def test_rules_and_local_sgd_need_torch_only() -> None:
    assert PROJECT["dependencies"] == ["torch>=2.11"]
    done = python(
        f"{WITHOUT_EXTRAS}\n"
        "import qsr, qsr.core.plan, qsr.core.rules\n"
        "assert 'torch' not in sys.modules\n"
        "from qsr import LocalSGD, QuadraticRule\n"
        "import torch\n"
        "model = torch.nn.Linear(2, 1)\n"
        "sgd = torch.optim.SGD(model.parameters(), 0.1)\n"
        "sync = LocalSGD(model, sgd, QuadraticRule(h_base=2, alpha=0.1), total_steps=4)\n"
        "print(qsr.LocalSGD is LocalSGD, sync.summary()['averages'])\n"
    )
    assert (done.returncode, done.stdout) == (0, "True 0\n"), done.stderr


def test_what_is_not_installed_is_named_in_one_line() -> None:
    command = f"{WITHOUT_EXTRAS}\nfrom qsr.cli.command import main\nmain()"
    for name in ("train", "plan", "submit", "status", "report", "doctor", "prepare", "evaluate"):
        done = python(command, name, "experiment=demo/quadratic")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"qsr {name} needs the training extras: pip install 'qsr-sync[train]'\n"
        )
    drawing = command.replace(str(OF_EXTRAS), "('matplotlib',)")
    done = python(drawing, "plan", "experiment=demo/quadratic", "--figure", "/nowhere/plan")
    assert done.returncode == 2
    assert done.stderr == "qsr plan needs the report extras: pip install 'qsr-sync[report]'\n"
    done = python(f"{WITHOUT_EXTRAS}\nfrom qsr import load_model")
    assert done.stderr.splitlines()[-1].startswith("ImportError: load_model needs the training ex")


def test_the_command_lists_its_commands_and_knows_what_was_meant() -> None:
    def ask(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "qsr", *words], capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    status, listed, _ = ask()
    assert (status, len(listed.splitlines())) == (0, 12)
    assert 'eval "$(qsr --completion bash)"' in listed
    assert "\n  status    show the status of runs, or watch them\n" in listed
    assert ask("--help") == (0, listed, "")
    assert ask("trian") == (2, "", "refused: trian is not a command of qsr; did you mean train?\n")
    assert ask("x")[2] == (
        "refused: x is not a command of qsr; choose from: train, plan, submit, status, report, "
        "doctor, prepare, evaluate\n"
    )
    helped = ask("plan", "--help")[1]
    assert "\n    qsr plan what-if  " in helped
    script = [sys.executable, str(ROOT / "scripts" / "plan.py"), "--help"]
    there = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert "\n    python scripts/plan.py what-if  " in there  # as that user gives it
    assert "Takes the settings of scripts/train.py." in there


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the project, because building leaves files in it."""
    project, made = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("wheel")
    for name in ("qsr", "configs"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(made)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(project)], check=True)
    (file,) = made.iterdir()
    return file


def test_the_wheel_holds_all_code_and_settings(wheel: Path) -> None:
    def files(folder: str) -> set[str]:
        paths = (path for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts)
        return {path.relative_to(ROOT).as_posix() for path in paths if path.is_file()}

    assert wheel.name == f"qsr_sync-{qsr.__version__}-py3-none-any.whl"
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("qsr/")}
    assert held == files("qsr") | {f"qsr/{name}" for name in files("configs")}
    assert "qsr/py.typed" in held


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment's bin/, with the wheel and the packages of this one, but not its qsr: files
    named .pth in a folder that a .pth file names do nothing, an editable install's among them."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    bin_ = folder / "bin"
    install = [sys.executable, "-m", "pip", "--python", str(bin_ / "python"), "install"]
    subprocess.run([*install, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return bin_


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_installed_command_works_in_any_folder(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    program, interpreter = str(environment / "qsr"), str(environment / "python")
    where = "import qsr.config.load as l; print(l.__file__); print(l.CONFIG_DIR)"
    code, settings = map(Path, call(interpreter, "-c", where).split())
    assert code.is_relative_to(environment.parent)
    assert settings == code.parents[1] / "configs"

    assert "93,600 steps" in call(program, "plan", "experiment=vit_b16_b4096/quadratic_h4")
    assert call(program, "prepare", "digits", "--root", "images").startswith("images: 1442 train")
    run = ["experiment=demo/quadratic", "cluster.ranks=1", "data.root=images", "tracking=none"]
    stopped = call(program, "train", *run, "stop_after_steps=5")
    assert "stopped after step 5" in stopped
    status = call(program, "status", "runs")
    assert "demo/quadratic" in status
    assert "stopped" in status
    (record,) = (tmp_path / "runs").rglob("environment.json")
    stored = json.loads(record.read_text())
    assert (stored["code"], stored["git"]) == (running_code_here(), None)

    # a job's copy of the code is that of the package, settings included
    submitted = call(program, "submit", *run, "stop_after_steps=6")
    assert "stopped after step 6" in submitted
    (copy,) = (tmp_path / "runs" / ".snapshots").iterdir()
    assert (copy / "qsr" / "configs" / "train.yaml").is_file()
    assert (
        call(program, "submit", "--dry-run", *run)
        .splitlines()[-1]
        .startswith(f"PYTHONPATH={copy} {interpreter} -P -m qsr train ")
    )
    assert json.loads(record.read_text())["code"] == stored["code"]

    local = (
        "import torch; from qsr import LocalSGD, QuadraticRule; model = torch.nn.Linear(2, 1); "
        "sgd = torch.optim.SGD(model.parameters(), 0.1)\n"
        "sync = LocalSGD(model, sgd, QuadraticRule(h_base=2, alpha=0.1), total_steps=4)\n"
        "for _ in range(4): sgd.step(); sync.step()\n"
        "print(sync.summary()['averages'])"
    )
    assert call(interpreter, "-c", local) == "2\n"


def running_code_here() -> str:
    """The hash of the checkout's code: equal code is the same code, however it was installed."""
    from qsr.run.snapshot import code_hash

    return code_hash(ROOT)
