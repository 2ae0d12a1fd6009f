"""Processes for many runs side by side."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from qsr.cluster.processes import START_METHOD, die_with_starter


def process_pool(processes: int, module: str) -> ProcessPoolExecutor:
    """So many processes, which have imported `module` once. None outlives this one, even if it is
    killed."""
    context = get_context(START_METHOD)
    context.set_forkserver_preload(["qsr.cluster.fork_server", module])
    return ProcessPoolExecutor(processes, mp_context=context, initializer=die_with_starter)
