"""Averaging ViT-B/16's parameters over two ranks: what is the overhead over a bare all-reduce?

    python scripts/bench.py average

The alternatives: torch.distributed.all_reduce of one flat tensor of the same size with AVG (the
floor) and with SUM (without the division), qsr's average in its trainer and as LocalSGD in any loop
(parameters moved into one buffer, or in place), torch's PeriodicModelAverager, accelerate's
LocalSGD, torchft's LocalSGD if it is installed (pip install torchft==0.2.0), and packing all
parameters into a new tensor and unpacking it, as often written by hand. Time is the slower rank's;
memory is the temporary memory of one average on rank 0.
"""

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD as AccelerateLocalSGD
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.measure import alternate, peak_memory_bytes, ratio, record, summary
from qsr import ConstantRule
from qsr.cluster.group import join_process_group
from qsr.cluster.place import find_place
from qsr.cluster.processes import start_ranks
from qsr.config.schema import ModelConfig
from qsr.core.sampling import Sampler
from qsr.sync.averaging import Averager
from qsr.sync.communicator import Communicator
from qsr.sync.fingerprint import FINGERPRINT_SIZE, Fingerprint
from qsr.sync.flat import FlatModule
from qsr.sync.local_sgd import LocalSGD
from qsr.sync.topology import Topology
from qsr.train.models import build_model

RANKS = 2
FLOOR = "all_reduce of one flat tensor, AVG"
SUM = "all_reduce of one flat tensor, SUM"


def make_contenders(communicator: Communicator) -> dict[str, Callable[[], object]]:
    """Each averages its own model (SUM only adds)."""

    def network() -> nn.Module:
        return build_model(ModelConfig("vit_b16", None, channels_last=False), 1000, 224)

    flat = FlatModule(network(), FINGERPRINT_SIZE)
    averager = Averager(communicator)
    mark = Fingerprint(4, 0, 4, 0.1, Sampler(100, 10, RANKS, seed=1), "0123456789abcdef")
    size = sum(p.numel() for p in flat.module.parameters())
    tensor = torch.zeros(size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "When period is 1")  # average on every call
        periodic = PeriodicModelAverager(period=1)
    by_torch = network()
    for parameter in by_torch.parameters():
        parameter.grad = torch.zeros_like(parameter)  # it skips parameters without gradients
    by_accelerate, packed = network(), network()
    local_sgd = AccelerateLocalSGD(Accelerator(cpu=True), by_accelerate, local_sgd_steps=1)

    def pack() -> None:
        vector = parameters_to_vector(packed.parameters()).detach()
        dist.all_reduce(vector)
        vector_to_parameters(vector / RANKS, packed.parameters())

    in_buffer = _each_step(network(), flatten=True)
    in_place = _each_step(network(), flatten=False)
    by_torchft = {} if find_spec("torchft") is None else {"torchft LocalSGD": _torchft(network())}

    return {
        FLOOR: lambda: dist.all_reduce(tensor, dist.ReduceOp.AVG),
        SUM: lambda: dist.all_reduce(tensor),
        "qsr": lambda: averager.average_([flat.flat], mark),
        "qsr LocalSGD": in_buffer,
        "qsr LocalSGD, parameters in place": in_place,
        "torch PeriodicModelAverager": lambda: periodic.average_parameters(by_torch.parameters()),
        "accelerate LocalSGD": local_sgd._sync_and_avg_model_params,
        **by_torchft,
        "packed and unpacked": pack,
    }


def _each_step(model: nn.Module, *, flatten: bool) -> Callable[[], object]:
    """A step of a loop that averages in every step, and computes nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # without gradients it does nothing
    sync = LocalSGD(model, optimizer, ConstantRule(1), total_steps=10**9, flatten=flatten)

    def step() -> None:
        optimizer.step()
        sync.step()

    return step


def _torchft(model: nn.Module) -> Callable[[], object]:
    """Collective: an average with agreement through torchft's lighthouse, its server, which rank 0
    starts."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer
    from torchft.local_sgd import LocalSGD as TorchftLocalSGD

    minute, rank = timedelta(minutes=1), dist.get_rank()
    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=RANKS) if rank == 0 else None
    address = [lighthouse.address() if lighthouse else None]
    dist.broadcast_object_list(address)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=minute),
        load_state_dict=lambda _: None,
        state_dict=dict,
        min_replica_size=RANKS,
        use_async_quorum=False,
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=address[0],
        replica_id=f"worker_{rank}",
        timeout=minute,
        init_sync=False,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    local_sgd = TorchftLocalSGD(manager, model, optimizer, sync_every=1)

    def average() -> None:
        assert lighthouse or rank > 0  # kept alive
        assert store is not None
        local_sgd.sync()

    return average


def seconds_between_averages(steps: int = 20_000) -> float:
    """Median seconds that LocalSGD takes for a step within a round: in `step`, and in its hook of
    the optimizer."""

    def make_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(2, 2)
        model(torch.ones(2)).sum().backward()
        return model, torch.optim.SGD(model.parameters(), lr=0.0)

    model, optimizer = make_optimizer()
    _, without = make_optimizer()
    sync = LocalSGD(model, optimizer, ConstantRule(10**8), total_steps=10**8)
    calls: dict[str, Callable[[], object]] = {
        "without": without.step,
        "hooked": optimizer.step,
        "step": sync.step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(steps):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return median["step"] + median["hooked"] - median["without"]


def measure_rank(repetitions: int) -> dict[str, Any]:
    """Collective: measure all contenders on this rank."""
    place = find_place()
    torch.set_num_threads(1)
    here = Topology(place.rank, RANKS, place.local_rank, RANKS)
    communicator = join_process_group(here, torch.device("cpu"), timeout_seconds=600.0)
    contenders = make_contenders(communicator)

    def timed(action: Callable[[], object]) -> Callable[[], float]:
        def measure() -> float:
            communicator.barrier()
            started = time.perf_counter()
            action()
            own = time.perf_counter() - started
            return max(row[0] for row in communicator.gather_floats([own]))

        return measure

    with torch.no_grad():
        seconds = alternate({n: timed(action) for n, action in contenders.items()}, repetitions)
        memory = {name: peak_memory_bytes(action) for name, action in contenders.items()}
    return {
        name: {
            "seconds": summary(values),
            "ratio_to_floor": ratio(values, seconds[FLOOR]),
            "extra_bytes": memory[name],
        }
        for name, values in seconds.items()
    }


def _between() -> float:
    """Collective: the same on each rank."""
    place = find_place()
    torch.set_num_threads(1)
    here = Topology(place.rank, RANKS, place.local_rank, RANKS)
    join_process_group(here, torch.device("cpu"), timeout_seconds=600.0)
    return seconds_between_averages()


def main() -> int:
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate warns without it
    found = start_ranks(measure_rank, RANKS, 12)
    for name, about in found.items():
        print(
            f"{name:40} {about['seconds']['median']:7.3f} s  "
            f"{about['ratio_to_floor']['median']:6.3f} x  {about['extra_bytes'] / 1e6:7.0f} MB"
        )
    between = start_ranks(_between, RANKS)
    print(f"LocalSGD.step() between averages: {between * 1e6:.1f} microseconds")
    record_of = {"contenders": found, "local_sgd_step_seconds": between}
    print(record("average", record_of, RANKS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
