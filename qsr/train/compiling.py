"""torch.compile of a run's network: in place, once for all workers of a rank, kept for later jobs.

Only training is compiled. An evaluation sees other batch sizes and other modes of the network, each
of which would be compiled anew, and its results stay those that `qsr evaluate` computes.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from qsr.config.schema import Compile
from qsr.errors import TrainingError

if TYPE_CHECKING:
    from torch._dynamo.callback import CallbackArgs

_OPTIONS: dict[Compile, dict[str, bool]] = {
    # without measurements that would choose other kernels, with other bits, in a resumed run
    "default": {"deterministic": True},
    "max_autotune": {"max_autotune": True, "coordinate_descent_tuning": True},
}

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compile_network(network: nn.Module, how: Compile) -> None:
    """Compile the passes of `network` at its first one; "none": do nothing.

    In place: parameters, their names and their memory stay, so that optimizers, flat buffers, DDP
    and checkpoints do not notice. Networks of the same structure share one compilation, as long as
    they see images of one shape. If it fails, the first pass raises what `compile_errors` catches.
    """
    if how == "none":
        return
    _keep_cache()
    network.compile(dynamic=False, options=_OPTIONS[how])


def _keep_cache() -> None:
    """Let torch keep compiled code in the user's cache folder instead of the machine's temporary
    one, so that a requeued job finds it. TORCHINDUCTOR_CACHE_DIR comes first."""
    given = Path(os.environ.get(_CACHE, ""))
    # torch sets the variable to its own choice, a folder of this name, when it imports its compiler
    by_torch = given.parent == Path(tempfile.gettempdir()) and given.name.startswith(
        "torchinductor"
    )
    if given.name and not by_torch:
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(base) / "qsr" / "inductor"
    with contextlib.suppress(OSError):  # no home folder, or a full one: torch's choice will do
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ[_CACHE] = str(folder)


@contextlib.contextmanager
def compile_errors(how: Compile) -> Iterator[None]:
    """A network that cannot be compiled raises TrainingError, in one line."""
    if how == "none":
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise TrainingError(
            f"the network could not be compiled with compile={how} ({reason}): use compile=none"
        ) from None


class CompileClock:
    """Measures the time that this process spends on compiling, until `stop`."""

    def __init__(self) -> None:
        from torch._dynamo.callback import callback_handler  # slow to import

        self._seconds = self._started = 0.0
        self._handler = callback_handler
        self._handler.register_start_callback(self._start)
        self._handler.register_end_callback(self._end)

    def stop(self) -> float:
        """The seconds so far. Call it once."""
        self._handler.remove_start_callback(self._start)
        self._handler.remove_end_callback(self._end)
        return self._seconds

    def _start(self, _: "CallbackArgs") -> None:
        self._started = time.perf_counter()

    def _end(self, _: "CallbackArgs") -> None:
        self._seconds += time.perf_counter() - self._started
