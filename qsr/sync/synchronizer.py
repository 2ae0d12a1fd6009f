"""The communication of Algorithm 1 (Gu et al. 2024).

In a round of a local method each worker trains alone for H steps; then `end_round` replaces the
parameters of all workers by their mean. In a data parallel round the gradients are averaged before
every update instead. A worker of several ranks averages the gradients among them in every
local step. In every step the ranks also tell each other what they are about to do, so
that ranks that disagree stop before their parameters are mixed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qsr.core.open_plan import AnyPlan, OpenPlan
from qsr.core.outer import OuterOptions
from qsr.core.plan import Round
from qsr.core.sampling import Sampler
from qsr.sync.agreement import MAX_PENDING, Agreement
from qsr.sync.averaging import Averager, MomentBuffers
from qsr.sync.communicator import Communicator
from qsr.sync.delayed import PREFIX, DelayedAverage
from qsr.sync.equal_start import check_equal_start
from qsr.sync.fingerprint import Fingerprint
from qsr.sync.flat import FlatModule
from qsr.sync.gradients import GradientAverager
from qsr.sync.outer import PREFIX as OUTER_PREFIX
from qsr.sync.outer import make_outer
from qsr.sync.round_loss import RoundLoss


@dataclass(frozen=True)
class SyncOptions:
    """How averages are made; the plan says when."""

    moments: Sequence[str] = ()
    """torch's keys of the optimizer states that are averaged with the parameters."""
    bucket_mib: float | None = None
    """Averages of gradients: DDP's bucket size in MiB; None: average after the backward pass."""
    delay_steps: int = 0
    """Steps after the end of a round at which its average is applied; 0: at the end."""
    outer: OuterOptions = field(default_factory=OuterOptions)
    """What is done with the average of a round; only without a delay."""


class SyncState(NamedTuple):
    """What a checkpoint must hold of a synchronizer."""

    own: list[dict[str, Tensor]]
    """Tensors of each worker of this rank."""
    shared: dict[str, Tensor]
    """Tensors that are equal on all workers."""
    values: dict[str, Any]
    """Other values, equal on all workers."""


class Synchronizer:
    """Synchronizes the workers of all ranks through the rounds of a plan.

    Every rank builds one with the same arguments, except for `replicas` and `optimizers`, which are
    those of its own workers. Besides the plan, the ranks must agree on `sampler` and `config_hash`.
    """

    def __init__(
        self,
        plan: AnyPlan,
        replicas: Sequence[FlatModule],
        optimizers: Sequence[torch.optim.Optimizer],
        communicator: Communicator,
        *,
        sampler: Sampler,
        config_hash: str,
        options: SyncOptions,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.plan = plan
        self.communicator = communicator
        self.config_hash = config_hash
        self._replicas = replicas
        self._sampler = sampler
        self._delay_steps = options.delay_steps
        self._agreement = Agreement(communicator, asked_to_stop)
        self._averager = Averager(communicator)
        self._moments = MomentBuffers(optimizers, options.moments)
        # of gradients: among all ranks in data parallel rounds, within workers in local ones
        self._everywhere, self._within = _gradient_averagers(
            plan, replicas, communicator, options.bucket_mib
        )
        self._gradients = self._everywhere or self._within  # if both, neither of them is a DDP
        self._now: GradientAverager | None = None  # what averages in this step
        self._delayed = DelayedAverage(self._averager, replicas) if options.delay_steps else None
        self._outer = make_outer([replica.parameters() for replica in replicas], options.outer)
        self._round_loss = RoundLoss(plan, communicator) if isinstance(plan, OpenPlan) else None

    # A step, in the order of the calls

    def begin_step(self, round_: Round, step: int) -> None:
        """Collective: tell the other ranks that this one begins the 0-based `step`."""
        self._now = self._everywhere if round_.averages == "gradients" else self._within
        if self._outer is not None and step == round_.start and round_.averages == "parameters":
            self._outer.begin_round()
        self._agreement.begin(self._mark(round_, step + 1))

    def forward_of(self, replica: FlatModule) -> nn.Module:
        """The module for the replica's forward passes."""
        return replica.module if self._gradients is None else self._gradients.forward_of(replica)

    def backward_context(self, *, last: bool) -> AbstractContextManager[object]:
        """Context for a forward and backward pass; `last`: the last one of a replica's step."""
        if self._gradients is None:
            return nullcontext()
        return self._gradients.backward_context(average=last and self._now is not None)

    def average_gradients(self) -> int:
        """Collective: complete the average, if there is one in this step, after the last backward
        pass. Returns the bytes that each worker contributed to an average over the workers."""
        if self._now is None:
            return 0
        self._now.finish()
        return self._replicas[0].flat.bytes if self._now is self._everywhere else 0

    def count_loss(self, loss: Tensor) -> None:
        """Count the loss of a micro-batch of this step, if the plan needs it."""
        if self._round_loss is not None:
            self._round_loss.count(loss)

    def end_step(self, step: int) -> None:
        """Collective: call after the update of the 0-based `step`; applies a delayed average."""
        if self._delayed is not None and self._delayed.due == step + 1:
            self._delayed.apply_()

    def end_round(self, round_: Round) -> int:
        """Collective: after the last step of a local round, replace the parameters of all workers
        by their mean, or by what the outer optimizer makes of it. Returns the bytes that each
        worker contributed.

        Raises DisagreementError if the ranks do not do the same, and TrainingError if the plan
        needs the round's loss and it is not finite.
        """
        self._agreement.settle()  # otherwise ranks that disagree would mix parameters, or deadlock
        flat = [replica.flat for replica in self._replicas]
        mark = self._mark(round_, round_.end)
        if self._delayed is not None and round_.end < self.plan.total_steps:
            following = self.plan.round_at(round_.end).length
            self._delayed.begin(mark, due=round_.end + min(self._delay_steps, following))
        else:  # as in the paper; also for the last round, which no steps follow
            self._averager.average_(flat, mark)
        if self._outer is not None:
            self._outer.step(math.fsum(map(self.plan.schedule, range(round_.start, round_.end))))
        moments = self._moments.buffers()
        if moments:
            self._averager.average_(moments, None)
        if self._round_loss is not None:
            self._round_loss.end_round(round_)
        return flat[0].bytes + (moments[0].bytes if moments else 0)

    # Agreement

    def stop_agreed(self, *, wait: bool) -> bool:
        """Collective: whether any rank was asked to stop. `wait`: wait for the answers of all steps
        so far; otherwise some may still be pending. Raises DisagreementError."""
        return self._agreement.settle(0 if wait else MAX_PENDING)

    def check(self) -> None:
        """Raise DisagreementError if any average so far mixed ranks that disagree. Waits for the
        device."""
        self._averager.check()

    def checks_between(self, round_: Round, step: int) -> Callable[[], None]:
        """Collective: a function for long work after `step` steps, such as an evaluation. It is
        collective; all ranks call it equally often. Raises StopRequestedError once a stop is
        agreed."""
        mark = self._mark(round_, step)
        self._agreement.begin(mark)
        return lambda: self._agreement.check(mark)

    def check_equal_start(self) -> None:
        """Collective: raise TrainingError unless all workers begin with the same weights."""
        check_equal_start(
            self.communicator,
            [replica.flat.buffers.values() for replica in self._replicas],
            "they have the same seed, so use the same code, torch and kind of device on all ranks",
        )

    # What is true now

    def parameters_are_equal(self, round_: Round, step: int) -> bool:
        """Whether all workers have the same parameters after `step` steps, within this round or at
        its end."""
        if round_.averages == "gradients":
            return True
        under_way = self._delayed is not None and self._delayed.due is not None
        return step == round_.end and not under_way

    @property
    def measures_communication(self) -> bool:
        """Whether all averages over the workers are timed; False if DDP overlaps them with the
        backward pass."""
        return self._everywhere is None or not self._everywhere.overlaps

    @property
    def needs_images(self) -> bool:
        """Whether `settle` uses its images."""
        return self._gradients is not None and self._gradients.overlaps

    # Begin and end of a session

    def settle(self, images: Tensor) -> None:
        """Collective: call before the first step of a session, with some of its images."""
        if self._gradients is not None:
            self._gradients.settle(images)

    def state(self) -> SyncState:
        """Collective: what a checkpoint must hold of a delayed average, an outer optimizer, and
        rounds that follow the loss."""
        shared = {} if self._outer is None else self._outer.state()
        values: dict[str, Any] = {"correction_due": None}
        if self._round_loss is not None:
            values["round_loss"] = self._round_loss.state()
        if self._delayed is None:
            return SyncState([{} for _ in self._replicas], shared, values)
        values["correction_due"] = self._delayed.due
        return SyncState(self._delayed.corrections(), shared, values)

    def load_state(
        self, tensors: Sequence[Mapping[str, Tensor]], values: Mapping[str, Any]
    ) -> None:
        """Restore what `state` returned; `tensors`: those of each worker, with the shared ones."""
        if self._delayed is not None and values["correction_due"] is not None:
            self._delayed.load(tensors, values["correction_due"])
        if self._outer is not None:
            self._outer.load(tensors[0])
        if self._round_loss is not None:
            self._round_loss.load(values["round_loss"])

    @staticmethod
    def is_state(name: str) -> bool:
        """Whether a checkpoint's tensor of this name comes from `state`."""
        return name.startswith((PREFIX, OUTER_PREFIX))

    def _mark(self, round_: Round, step: int) -> Fingerprint:
        """What all ranks must agree on in the 1-based `step`, which is in this round."""
        lr = self.plan.schedule(step - 1)
        return Fingerprint(step, round_.index, round_.length, lr, self._sampler, self.config_hash)


def _gradient_averagers(
    plan: AnyPlan,
    replicas: Sequence[FlatModule],
    communicator: Communicator,
    bucket_mib: float | None,
) -> tuple[GradientAverager | None, GradientAverager | None]:
    """For data parallel rounds, and for the local steps of workers of several ranks; None: there
    are no such steps. A plan with both kinds does not overlap: DDP holds the gradients of a module,
    so that a module can have only one."""
    local = communicator.topology.ranks_per_worker > 1 and plan.averages_parameters
    bucket_mib = None if local and plan.averages_gradients else bucket_mib
    return (
        GradientAverager(replicas, communicator.among_shards(), bucket_mib)
        if plan.averages_gradients
        else None,
        GradientAverager(replicas, communicator.within_worker(), bucket_mib) if local else None,
    )
