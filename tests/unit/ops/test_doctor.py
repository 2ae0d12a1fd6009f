"""How the doctor says what a check found."""

import re

import pytest

from qsr.cluster.place import find_place
from qsr.config.load import CONFIG_DIR
from qsr.errors import CheckError
from qsr.ops.doctor import _UNEXPECTED, _Report


def test_an_error_of_a_librarys_comes_after_words_of_our_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = _Report(find_place())

    def fail() -> str:
        raise RuntimeError("Critical error in pipeline:\n  Assert on line 7")

    def refuse() -> str:
        raise CheckError("no images: set data.root")

    report.check("decoding", fail)
    report.check("data", refuse)
    report.check("plan", lambda: "9 rounds")
    assert capsys.readouterr().out.splitlines() == [
        "FAIL  decoding     the loader fails: try data.decode=cpu, then data.loader=torchvision "
        "(RuntimeError: Critical error in pipeline: Assert on line 7)",
        "FAIL  data         no images: set data.root",
        "ok    plan         9 rounds",
    ]
    assert report.failed == {"decoding", "data"}


def test_every_check_has_such_words() -> None:
    code = (CONFIG_DIR.parent / "qsr" / "ops" / "doctor.py").read_text()
    names = re.findall(r'report\.check\("([^"]+)"', code)
    assert len(names) >= 13
    assert set(names) == _UNEXPECTED.keys()
