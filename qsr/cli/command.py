"""The command `qsr`: finds the command that it is given. Standard library only, so that it can say
what is not installed."""

import difflib
import sys
from importlib import import_module
from importlib.util import find_spec

from qsr.cli.complete import script
from qsr.cli.usage import COMMANDS
from qsr.errors import REFUSED
from qsr.output import printer, warn

TRAINING = (
    *("PIL", "hydra", "numpy", "omegaconf", "pydantic", "rich", "safetensors", "timm"),
    *("torchvision", "yaml"),
)
"""What every command needs: the extra `train`."""
REPORT = ("matplotlib", "pandas")
"""What drawing needs: the extra `report`."""


def main() -> None:
    """Run `qsr COMMAND ...` and exit; without a command, list all."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        printer(_list)
    if name == "--completion":
        printer(_completion)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"choose from: {', '.join(COMMANDS)}"
        warn(f"refused: {name} is not a command of qsr; {hint}")
        sys.exit(REFUSED)
    if not all(map(find_spec, TRAINING)):
        warn(f"qsr {name} needs the training extras: pip install 'qsr-sync[train]'")
        sys.exit(REFUSED)
    sys.argv[:2] = [f"qsr {name}"]
    try:
        import_module(f"qsr.cli.{name}").run()
    except ModuleNotFoundError as error:
        if error.name not in REPORT:
            raise
        warn(f"qsr {name} needs the report extras: pip install 'qsr-sync[report]'")
        sys.exit(REFUSED)


def _completion(arguments: list[str]) -> int:
    if arguments[1:] != ["bash"]:
        warn('refused: --completion takes one word, bash: eval "$(qsr --completion bash)"')
        return REFUSED
    print(script(), end="")
    return 0


def _list(_: list[str]) -> int:
    print("usage: qsr COMMAND ...; qsr COMMAND --help says more\n")
    for name, does in COMMANDS.items():
        print(f"  {name:<10}{does}")
    print(
        '\nbash completes commands, experiments and settings after: eval "$(qsr --completion bash)"'
    )
    return 0
