"""The errors that are shown to users as one line, which names the problem and says how to fix it.

Any other exception is a bug in qsr, and is shown with its traceback.
"""

from collections.abc import Callable
from functools import wraps

from qsr.output import printable, warn

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
"""Exit statuses: failed after it started, refused before it started, interrupted by Ctrl-C."""


class QsrError(Exception):
    """Base class; the message is one line. A program that does not catch it exits with
    `exit_status`."""

    exit_status = FAILED

    def line(self) -> str:
        """The line that is shown to the user."""
        return f"{'refused' if self.exit_status == REFUSED else 'failed'}: {self}"


class ConfigError(QsrError):
    """A setting is wrong; the message names it and says what would be right."""

    exit_status = REFUSED


class UnknownSpeedError(ConfigError):
    """There is no speed profile that fits this run."""


class UnknownPlanError(ConfigError):
    """The rounds of a run are not known before it."""


class FolderInUseError(ConfigError):
    """Another session is using the run folder."""


class DataError(QsrError):
    """The data set, or one of its files, cannot be used."""

    exit_status = REFUSED

    def __str__(self) -> str:
        return printable(super().__str__())  # file names may contain any bytes


class ClusterError(QsrError):
    """The machines, or the launcher's settings, do not fit the run."""

    exit_status = REFUSED


class SlurmError(QsrError):
    """Slurm does not answer, or rejects a request."""


class CheckError(QsrError):
    """A check of the doctor failed."""


class LostRankError(QsrError):
    """Ranks do not answer; the message says which, and what the others were waiting for."""


class DisagreementError(QsrError):
    """Ranks differ in their step, round, H, learning rate, sampler or configuration."""


class TrainingError(QsrError):
    """Training cannot continue; every rank raises it in the same step."""


class CheckpointError(QsrError):
    """A checkpoint, or the results, could not be written or read."""


class FolderMovedError(QsrError):
    """The run folder was moved or deleted; the message says what was saved."""


class RunFailedError(QsrError):
    """A rank failed; the message describes the first failure and names its rank."""


class ReportError(QsrError):
    """A run folder or a record cannot be included in a report."""

    exit_status = REFUSED


class ModelFileError(QsrError):
    """A model file cannot be read, or belongs to another network."""

    exit_status = REFUSED


def showing_errors(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Wrap a script's `main`: a QsrError, or Ctrl-C, becomes one line on stderr and the exit
    status."""

    @wraps(main)
    def shown(arguments: list[str]) -> int:
        try:
            return main(arguments)
        except QsrError as error:
            warn(error.line())
            return error.exit_status
        except KeyboardInterrupt:
            warn("interrupted; run the same command to resume")
            return INTERRUPTED

    return shown
