"""What all tests share."""

import os
from pathlib import Path

# one thread per test process: the suite runs in parallel processes on few cores
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from qsr.data.digits import prepare_digits

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-golden", action="store_true", help="write the golden files anew from this run"
    )


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits data set."""
    root = tmp_path_factory.mktemp("digits") / "digits"
    prepare_digits(root)
    return root
