"""Config -> cost model: the only place where a speed profile becomes seconds and bytes."""

import math
from dataclasses import replace

from qsr.config import schema
from qsr.config.planning import even_ranks
from qsr.core.cost import AllReduce, AverageOfParts, CostModel, Link, MeasuredAllReduce
from qsr.core.plan import Plan
from qsr.errors import ConfigError, UnknownSpeedError

BYTES_PER_PARAMETER = 4
"""Parameters, gradients and averages are float32 with every precision."""


def parameter_bytes(parameters: int) -> int:
    """Size of the tensors in an average of parameters or gradients."""
    return BYTES_PER_PARAMETER * parameters


def moment_bytes(sync: schema.SyncConfig, parameters: int) -> int:
    """Size of the optimizer states that are averaged with the parameters."""
    return (sync.average_momentum + sync.average_second_moment) * parameter_bytes(parameters)


def speed_key(config: schema.Config) -> str:
    """The run's key in speed.seconds_per_image."""
    compiled = "" if config.compile == "none" else f"/compile={config.compile}"
    graphs = "/cuda_graphs" if config.cuda_graphs else ""
    return (
        f"{config.model.speed_name}@{config.data.image_size}/{config.precision}{compiled}{graphs}"
    )


def ranks_and_machines(config: schema.Config, speed: schema.SpeedConfig) -> tuple[int, int]:
    """Ranks and machines of the run: those of a Slurm job; otherwise cluster.ranks, or the largest
    number that shares the workers evenly (if several ranks make one worker, all of these), on as
    few of the profile's machines as possible. Raises UnknownSpeedError if the profile is about
    other numbers than the job's, or too few."""
    most = speed.machines * speed.ranks_per_machine
    measured = f"speed={speed.name} is about {speed.machines} x {speed.ranks_per_machine} ranks"
    assume = "or set speed.machines and speed.ranks_per_machine, if the link is as fast there"
    cluster = config.cluster
    if isinstance(cluster, schema.SlurmCluster):
        of_job, of_profile = (
            (cluster.nodes, cluster.tasks_per_node),
            (speed.machines, speed.ranks_per_machine),
        )
        if of_job != of_profile:
            raise UnknownSpeedError(
                f"no hours: the job has {cluster.nodes} x {cluster.tasks_per_node} ranks, but "
                f"{measured}: measure yours with qsr plan calibrate, {assume}"
            )
        return cluster.job_ranks, cluster.nodes
    ranks = cluster.ranks
    if config.ranks_per_worker > 1:
        ranks = config.shards
    elif ranks is None:
        ranks = even_ranks(config.workers, most)
    if ranks > most:
        wanted = f"cluster.ranks={ranks}"
        if config.ranks_per_worker > 1:
            wanted = f"workers={config.workers} x ranks_per_worker={config.ranks_per_worker} = "
            wanted += f"{ranks} ranks"
        raise UnknownSpeedError(f"no hours: {wanted}, but {measured}: use fewer, {assume}")
    return ranks, math.ceil(ranks / speed.ranks_per_machine)


def make_cost_model(config: schema.Config, parameters: int) -> CostModel:
    """The cost model of the run. Raises UnknownSpeedError if there is no speed profile, or if it
    does not fit the run, ConfigError if the profile contradicts itself."""
    speed, key = config.speed, speed_key(config)
    if speed is None:
        raise UnknownSpeedError(
            "no hours: no speeds are given; choose a profile with speed=NAME, or measure one: "
            "qsr plan calibrate"
        )
    allreduce = _allreduce(config, speed)
    if key not in speed.seconds_per_image:
        raise UnknownSpeedError(
            f"no hours: speed={speed.name} has no speed for {key}; measure it: qsr plan calibrate, "
            f"or set speed.seconds_per_image={{{key}:SECONDS}}"
        )
    images = config.shard_size * (config.shards // allreduce.ranks)
    model = CostModel(
        allreduce=allreduce,
        compute_seconds=speed.seconds_per_image[key] * images,
        micro_batches=images // config.micro_batch_size,
        parameter_bytes=parameter_bytes(parameters),
        moment_bytes=moment_bytes(config.sync, parameters),
        delay_steps=config.sync.delay_steps,
        bucket_bytes=config.cluster.bucket_mib * 2**20,
        parts=_parts(config, speed, allreduce) if config.ranks_per_worker > 1 else None,
        overlap_within_workers=config.cluster.overlap_gradients,
    )
    measured = speed.data_parallel.get(key)
    own = (allreduce.ranks, images, model.micro_batches)
    if measured is None or own != (measured.ranks, measured.images, measured.micro_batches):
        return model
    waiting = measured.blocking_seconds - model.compute_seconds - model.gradient_seconds
    same_buckets = config.cluster.bucket_mib == measured.bucket_mib
    return replace(
        model,
        waiting_seconds=max(0.0, waiting),
        overlapped_step_seconds=measured.overlapped_seconds if same_buckets else None,
    )


def _allreduce(config: schema.Config, speed: schema.SpeedConfig) -> AllReduce:
    ranks, machines = ranks_and_machines(config, speed)
    measured = speed.allreduce
    if measured is not None and measured.ranks == ranks:
        try:
            return MeasuredAllReduce(ranks, machines, measured.sizes_bytes, measured.seconds)
        except ValueError as error:
            raise ConfigError(f"speed.allreduce: {error}") from None
    return Link(ranks, machines, _bytes_per_second(speed, ranks), speed.latency_seconds)


def _bytes_per_second(speed: schema.SpeedConfig, ranks: int) -> float:
    gbit_per_second = speed.link_gbit_per_second
    if gbit_per_second is None and ranks > 1:
        raise UnknownSpeedError(
            f"no hours: speed={speed.name} has no speed of the link between ranks; set "
            f"speed.link_gbit_per_second"
        )
    return (gbit_per_second or math.inf) * 1e9 / 8


def _parts(
    config: schema.Config, speed: schema.SpeedConfig, allreduce: AllReduce
) -> AverageOfParts:
    """Averages of workers of several ranks over the two kinds of links: that between machines, and
    those between the ranks of a machine."""
    each, latency = config.ranks_per_worker, speed.latency_seconds
    on_machine = math.ceil(allreduce.ranks / allreduce.machines)
    link = _bytes_per_second(speed, allreduce.ranks)
    inside_gbit = speed.inside_gbit_per_second
    if inside_gbit is None and speed.machines == 1:
        inside_gbit = speed.link_gbit_per_second
    if inside_gbit is None and (each <= on_machine or allreduce.machines == 1):
        raise UnknownSpeedError(
            f"no hours: speed={speed.name} has no speed between the ranks of a machine; "
            f"set speed.inside_gbit_per_second, or measure it: qsr plan calibrate"
        )
    within = (inside_gbit or math.inf) * 1e9 / 8
    if each > on_machine:  # a worker lies on several machines
        inside = Link(each, math.ceil(each / on_machine), link, latency)
    else:
        inside = Link(each, 1, within, latency)
    if allreduce.machines == 1:  # every rank has its own link to the others
        between = Link(config.workers, 1, within, latency)
        return AverageOfParts(between, inside, share=1 / each)
    between = Link(config.workers, allreduce.machines, link, latency)
    return AverageOfParts(between, inside, share=min(1.0, on_machine / each))


def overlaps(config: schema.Config, plan: Plan, ranks: int) -> bool:
    """Whether the trainer hides the averages of a plan's data parallel rounds behind the backward
    pass: only if each rank has one shard, and no other averages of gradients."""
    mixed = config.ranks_per_worker > 1 and plan.gradient_rounds < plan.total_steps
    return config.cluster.overlap_gradients and ranks == config.shards and not mixed
