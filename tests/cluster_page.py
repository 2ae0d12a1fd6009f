"""The site file and the commands of docs/cluster.md."""

import re
import shlex
import textwrap

from tests.cli import ROOT

PAGE = (ROOT / "docs" / "cluster.md").read_text()
SITE = textwrap.dedent(PAGE.partition("with `cluster=mine`:\n\n")[2].partition("\n\n")[0])


def commands(script: str) -> list[list[str]]:
    """The words after scripts/SCRIPT.py in the page's commands."""
    whole = PAGE.replace("\\\n", " ")
    lines = re.findall(rf"^    .*scripts/{script}\.py (.+)$", whole, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]
