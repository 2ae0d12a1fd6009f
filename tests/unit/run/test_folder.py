"""metrics.jsonl: one notion of a row, for the run that writes them and for all readers."""

import json
from pathlib import Path

import pytest

from qsr.errors import ConfigError
from qsr.run.folder import RunFolder, read_rows, split_rows
from qsr.run.tracking import JsonlTracker

FIRST, SECOND = b'{"kind": "train", "step": 1}', b'{"kind": "eval", "step": 2, "top1": 50.0}'


@pytest.mark.parametrize(
    ("content", "rows", "damaged"),
    [
        (b"", [], []),
        (FIRST + b"\n" + SECOND + b"\n", [FIRST, SECOND], []),
        # the last line: complete without its end, being written
        (FIRST + b"\n" + SECOND, [FIRST, SECOND], []),
        (FIRST + b"\n" + SECOND[:20], [FIRST], []),
        (SECOND[:20], [], []),
        # a lost newline costs nothing; with the bytes before it, one row
        (FIRST + SECOND + b"\n", [FIRST, SECOND], []),
        (FIRST[:9] + SECOND + b"\n", [SECOND], [(1, FIRST[:9])]),
        (b"\n" + FIRST + b"\n", [FIRST], [(1, b"")]),
        (b"\xff\n" + FIRST + b"\n", [FIRST], [(1, b"\xff")]),
        (b"[]\n" + FIRST + b"\nx\n", [FIRST], [(1, b"[]"), (3, b"x")]),
        # objects that are no rows
        *(
            (text.encode() + b"\n", [], [(1, text.encode())])
            for text in (
                '{"kind": "test", "step": 1}',
                '{"kind": "train"}',
                '{"kind": "train", "step": 0}',
                '{"kind": "train", "step": 1.5}',
                '{"kind": "train", "step": 1, "loss": NaN}',
                '{"kind": "train", "step": 1, "loss": "0.1"}',
            )
        ),
    ],
)
def test_rows_and_damage(
    content: bytes, rows: list[bytes], damaged: list[tuple[int, bytes]]
) -> None:
    found, wrong = split_rows(content)
    assert [line for line, _ in found] == rows
    assert [row for _, row in found] == [json.loads(line) for line in rows]
    assert wrong == damaged


@pytest.mark.parametrize("line", ['{"kind": "train", "step": 1, "loss": NaN}', '{"step": 1}', "["])
def test_what_a_reader_refuses_a_session_puts_aside(line: str, tmp_path: Path) -> None:
    path = RunFolder(tmp_path).metrics
    path.write_bytes(FIRST + b"\n" + line.encode() + b"\n" + SECOND + b"\n")
    assert read_rows(path)[1] == [2]
    JsonlTracker(path).close()
    assert read_rows(path) == ([json.loads(FIRST), json.loads(SECOND)], [])
    (aside,) = tmp_path.glob("metrics.jsonl.damaged-*")
    assert aside.read_text() == line + "\n"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be read \(No such file"):
        read_rows(RunFolder(tmp_path).metrics)
