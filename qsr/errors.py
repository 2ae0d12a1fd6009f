"""Every error whose message is for a user: one line that names the thing and says how to fix it.

Whatever else is raised is a fault of this program, and is shown with its traceback.
"""

from collections.abc import Callable
from functools import wraps

from qsr.output import printable, warn

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
"""Exit statuses: of what began and failed, of what was not begun, and of Ctrl-C."""


class QsrError(Exception):
    """One line for the user. A program that does not catch it ends with `exit_status`."""

    exit_status = FAILED

    def line(self) -> str:
        """What the user sees."""
        return f"{'refused' if self.exit_status == REFUSED else 'failed'}: {self}"


class ConfigError(QsrError):
    """The setting, what is wrong with it, and what would be right."""

    exit_status = REFUSED


class UnknownSpeedError(ConfigError):
    """The cluster's profile does not say how fast it would be."""


class FolderInUseError(ConfigError):
    """Another session is at work in the run folder."""


class DataError(QsrError):
    """The data set, or one of its files, cannot be used."""

    exit_status = REFUSED

    def __str__(self) -> str:
        return printable(super().__str__())  # names of files may hold anything


class ClusterError(QsrError):
    """The machines, or what a launcher says of them, do not fit the run."""

    exit_status = REFUSED


class SlurmError(QsrError):
    """Slurm does not answer, or refuses."""


class CheckError(QsrError):
    """What a check of the doctor found wrong."""


class LostRankError(QsrError):
    """Ranks do not answer; the message says which, and what the others waited for."""


class DisagreementError(QsrError):
    """Ranks do not do the same: another step, round, H, learning rate, sampler or configuration."""


class TrainingError(QsrError):
    """Training cannot go on; every rank raises it in the same step."""


class CheckpointError(QsrError):
    """A checkpoint, or the results, could not be written or read."""


class FolderMovedError(QsrError):
    """The run folder is no longer where it was; the message says what became of the run."""


class RunFailedError(QsrError):
    """A rank failed; the message is that of the first failure, with its rank."""


class ReportError(QsrError):
    """A run folder or a record cannot be reported."""

    exit_status = REFUSED


class ModelFileError(QsrError):
    """A model file cannot be read, or is of another network."""


def showing_errors(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Around a script's `main`: an error for the user, or Ctrl-C, becomes a line and the exit
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
