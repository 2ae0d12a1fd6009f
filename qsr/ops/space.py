"""Disk space of a run."""

from collections.abc import Sequence

from qsr.build import describe
from qsr.config.load import run_folder
from qsr.config.schema import Config
from qsr.core.open_plan import AnyPlan
from qsr.run.folder import RunFolder
from qsr.run.results import missing_room
from qsr.train.models import outline
from qsr.train.state import checkpoint_bytes


def run_sizes(config: Config, plan: AnyPlan, classes: Sequence[str]) -> tuple[int, int]:
    """Bytes of a checkpoint at most, and bytes of the results for which earlier sessions have
    reserved no space. `classes`: their names."""
    model = outline(config.model, len(classes), config.data.image_size)
    each = checkpoint_bytes(model, config.optimizer, plan, config.workers, config.sync, config.ema)
    about = describe(config, classes, plan.total_steps).metadata()
    folder = RunFolder(run_folder(config))
    return each, missing_room(folder, model.state_dict(), about, config.ema.names)


def unnamed(classes: int) -> tuple[str, ...]:
    """Names as long as ImageNet's, for classes that are not here."""
    return ("n00000000",) * classes
