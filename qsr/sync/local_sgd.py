"""Local SGD in any training loop: the method of Gu et al. 2024 (Algorithm 1) for other people's
code (docs/own-loop.md). Needs torch and the standard library only."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qsr.core.cost import ring_bytes
from qsr.core.outer import OuterOptions
from qsr.core.plan import Plan, Round
from qsr.core.rules import Rule
from qsr.errors import TrainingError
from qsr.sync.agreement import Agreement
from qsr.sync.averaging import mean_tensors_
from qsr.sync.batchnorm import reestimate
from qsr.sync.equal_start import check_equal_start
from qsr.sync.fingerprint import Fingerprint
from qsr.sync.follower import RoundFollower
from qsr.sync.outer import make_outer
from qsr.sync.replica import (
    MoreToAverage,
    delayed_average,
    make_replica,
    mean_gradients_,
    trainable,
)
from qsr.sync.users_group import check_arguments, check_same_arguments, join_group


class LocalSGD:
    """Averages the parameters of a model over the workers at the end of every round.

    Every process of `group` is one worker; each builds one LocalSGD, with the same arguments, after
    the process group exists and before the first step. Give either a `rule`, with `total_steps` and
    the warm-up, or a `plan`. With a rule, the learning rate of a round's first step is read from
    the optimizer, so any scheduler works.

    Args:
        model: the worker's model. Its trainable parameters are moved into one buffer per dtype, so
            build LocalSGD after model.to(device) and before a CUDA graph is captured.
        optimizer: its optimizer; with several parameter groups the largest rate decides, or that of
            the group number `param_group`. Build LocalSGD after the scheduler.
        rule, total_steps: the synchronization rule, and the number of calls of `step` in the run.
            The last round is cut to end there.
        warmup_steps, peak_lr: H within the warm-up follows `peak_lr`, the rate of the first step
            after it (section 2 of the paper).
        plan: all rounds, from a schedule and a rule.
        group: the process group of the workers; None: all processes. For workers of several
            processes each (DDP or FSDP2 inside): the group that holds the same shard of every
            worker.
        average_momentum, average_second_moment: also average these optimizer states (the paper does
            not).
        average_buffers: also average floating-point buffers. BatchNorm's statistics are better
            estimated anew, see `reestimate_batchnorm`.
        delay_steps: steps that the workers take while an average travels, before it is applied (the
            paper: 0).
        outer: an outer optimizer that moves the average on, as in DiLoCo (the paper: none).
        flatten: False leaves the parameters where they are and averages them in buckets; always so
            for DTensor parameters.
        on_average: called after every average with `summary()`, for your tracker.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rule: Rule | None = None,
        *,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        peak_lr: float | None = None,
        plan: Plan | None = None,
        group: dist.ProcessGroup | None = None,
        param_group: int | None = None,
        average_momentum: bool = False,
        average_second_moment: bool = False,
        average_buffers: bool = False,
        delay_steps: int = 0,
        outer: OuterOptions | None = None,
        flatten: bool = True,
        on_average: Callable[[Mapping[str, Any]], object] | None = None,
    ) -> None:
        outer = outer or OuterOptions()
        check_arguments(model, optimizer, group, delay_steps, outer)
        self._rounds = RoundFollower(
            optimizer, rule, plan, total_steps, warmup_steps, peak_lr, param_group
        )
        self.averages = 0
        """Averages so far: of parameters, and of gradients."""
        self._model, self._delay_steps = model, delay_steps
        self._on_average = on_average or (lambda _: None)
        parameters = trainable(model)
        self._communicator = join_group(parameters, group)
        self._replica = make_replica(parameters, self._communicator, flatten)
        self._delayed = delayed_average(self._replica) if delay_steps else None
        self._outer = make_outer([parameters], outer)
        self._more = MoreToAverage(
            model, optimizer, average_momentum, average_second_moment, average_buffers
        )
        self._agreement = Agreement(self._communicator, lambda: False)
        self._bytes = 0
        self._gradients_averaged = self._resumed = False
        self._description = f"{self._rounds.description}, delay_steps={delay_steps}"
        if self._outer is not None:
            self._description += f", {outer}"
        check_same_arguments(self._communicator, self._description, parameters)
        optimizer.register_step_pre_hook(self._before_update)

    # In the training loop

    def average_gradients(self) -> bool:
        """Collective, in every step of a rule that begins with data parallel training (post-local,
        SWAP, every step): average the gradients of the workers if this step's round does. Call it
        after the last backward pass of the step, before clipping and GradScaler.unscale_. Returns
        whether it averaged; in rounds of local steps it does nothing."""
        round_ = self._begin()
        self._gradients_averaged = True
        if round_.averages != "gradients":
            return False
        self._agree()
        parameters = list(trainable(self._model).values())
        self._bytes += mean_gradients_(self._communicator, parameters)
        self.averages += 1
        return True

    def step(self) -> bool:
        """Collective at the end of a round: count one step, and average the parameters if it was
        the last one of its round. Call it once after every optimizer.step(), also if GradScaler
        skipped the update, and not once per micro-batch.

        Returns whether a round has ended: the model is then the workers' mean (with `delay_steps`,
        only after the last round). Raises DisagreementError if the workers are not in the same step
        of the same round, before anything is averaged; TrainingError if calls are missing or too
        many; LostRankError if a worker does not answer.
        """
        round_ = self._begin()
        self._check_gradients(round_)
        ended = self._rounds.advance()
        self._gradients_averaged = False
        if self._delayed is not None and self._delayed.due == self.steps_done:
            self._delayed.apply_()
        if ended:
            if round_.averages == "parameters":
                self._end_round()
            self._rounds.end_round()
        return ended

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Collective, on entry only: for the time of the block the model is the workers' mean, for
        an evaluation or a checkpoint of the model; afterwards each worker continues from its own
        parameters and buffers. BatchNorm's statistics stay those of the worker: see
        `reestimate_batchnorm`. An exception in the block is safe."""
        kept = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        if not self.workers_are_equal:
            kept += [(tensor, tensor.clone()) for tensor in self._replica.tensors()]
            self._agree()
            self._replica.average_(self._mark())
        training = self._model.training
        try:
            yield
        finally:
            self._model.train(training)
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)

    def reestimate_batchnorm(self, batches: Iterable[Any], count: int) -> None:
        """Collective: estimate the statistics of the BatchNorm layers anew from `count` training
        batches of each worker, within `averaged`. `batches`: inputs, or tuples that begin with
        them. Leaves the model in evaluation mode."""
        device = self._communicator.device
        inputs = (b[0] if isinstance(b, tuple | list) else b for b in islice(batches, count))
        reestimate(self._model, (batch.to(device) for batch in inputs), self._communicator)

    def broadcast(self) -> None:
        """Collective: give all workers the parameters and buffers of the first one, before the
        first step."""
        for tensor in [*self._replica.tensors(), *self._model.buffers()]:
            self._communicator.broadcast_(tensor.detach())

    # What is true now

    @property
    def workers_are_equal(self) -> bool:
        """Whether all workers have the same parameters, because no local step was made since the
        last average."""
        return self._rounds.round is None and (self._delayed is None or self._delayed.due is None)

    def summary(self) -> dict[str, Any]:
        """Progress so far, for a tracker: steps, rounds, H, averages, volume (averages / steps),
        bytes sent per worker in a ring, seconds spent in averages; with a plan also what it
        foresees for the run."""
        return self._rounds.summary() | {
            "averages": self.averages,
            "volume": self.averages / self.steps_done if self.steps_done else 0.0,
            "bytes_sent_per_worker": round(ring_bytes(self.workers, self._bytes)),
            "averaging_seconds": self._communicator.seconds(),
        }

    @property
    def plan(self) -> Plan | None:
        """The plan that was given, if any."""
        return self._rounds.plan

    @property
    def steps_done(self) -> int:
        """Calls of `step` so far."""
        return self._rounds.steps_done

    @property
    def workers(self) -> int:
        """Number of workers, K."""
        return self._communicator.topology.num_workers

    def state_dict(self) -> dict[str, Any]:
        """Collective if `delay_steps` > 0: all that this worker needs to resume here, also in the
        middle of a round. Save it with the worker's own model and optimizer: every worker has its
        own parameters within a round."""
        corrections = [{}] if self._delayed is None else self._delayed.corrections()
        return {
            "made_for": self._description,
            "workers": self.workers,
            "rounds": self._rounds.state_dict(),
            "averages": self.averages,
            "bytes": self._bytes,
            "correction": {k: t.clone() for k, t in corrections[0].items()},
            "correction_due": None if self._delayed is None else self._delayed.due,
            "outer": {}
            if self._outer is None
            else {name: tensor.clone() for name, tensor in self._outer.state().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned on this worker. Raises TrainingError if it was
        made by a run with other workers, another rule or another number of steps."""
        if state["workers"] != self.workers:
            raise TrainingError(
                f"the state is of a run with {state['workers']} workers, but here are "
                f"{self.workers}: start as many processes as before"
            )
        if state["made_for"] != self._description:
            raise TrainingError(
                f"the state is of another run ({state['made_for']}), not of this one "
                f"({self._description}): build LocalSGD with the same arguments"
            )
        self._rounds.load_state_dict(state["rounds"])
        self.averages, self._bytes, self._resumed = state["averages"], state["bytes"], True
        if self._delayed is not None and state["correction_due"] is not None:
            self._delayed.load([state["correction"]], state["correction_due"])
        if self._outer is not None:
            self._outer.load(state["outer"])

    # Rounds

    def _before_update(self, _: object, arguments: tuple[Any, ...], options: Any) -> None:
        """Called by torch at the beginning of every optimizer.step()."""
        self._rounds.count_update()
        if self._rounds.ended:
            return  # `step` reports it
        round_ = self._begin()
        if not arguments and not options:  # a closure makes its backward pass later
            self._check_gradients(round_)

    def _begin(self) -> Round:
        """The round of this step; at the first step of a round the workers tell each other what
        they will do, and the answers arrive while they train."""
        if self._rounds.round is not None:
            return self._rounds.round
        self._replica.check(self._model)
        if self._rounds.last is None and not self._resumed:
            check_equal_start(
                self._communicator,
                [self._replica.tensors()],
                "seed all workers alike before the model is built, load the same weights, or call "
                "sync.broadcast() before the first step",
            )
        round_ = self._rounds.begin()
        if self._delayed is not None and self._delayed.due is not None:
            self._delayed.due = round_.start + min(self._delay_steps, round_.length)
        if self._outer is not None and round_.averages == "parameters":
            self._outer.begin_round()
        self._agreement.begin(self._mark())
        return round_

    def _end_round(self) -> None:
        self._agree()
        if self._delayed is not None and not self._rounds.ended:
            # when it is due is known when the next round begins
            self._delayed.begin(self._mark(), due=self._rounds.total_steps)
        else:
            self._replica.average_(self._mark())
        if self._outer is not None:
            self._outer.step(self._rounds.summed_lr)
        more = list(self._more.tensors())
        mean_tensors_(self._communicator, more)
        self.averages += 1
        self._bytes += self._replica.bytes + sum(tensor.nbytes for tensor in more)
        self._on_average(self.summary())

    def _agree(self) -> None:
        """Collective: raise DisagreementError unless all workers are at the same point."""
        self._agreement.begin(self._mark())
        self._agreement.settle()

    def _mark(self) -> Fingerprint:
        """Where this worker is."""
        last = self._rounds.last
        index, h, lr = (-1, 0, 0.0) if last is None else (last.index, last.length, last.lr)
        return Fingerprint(self.steps_done, index, h, lr, None, self._description)

    def _check_gradients(self, round_: Round) -> None:
        if round_.averages == "gradients" and not self._gradients_averaged and self.workers > 1:
            raise TrainingError(
                f"step {self.steps_done} is data parallel: call sync.average_gradients() between "
                f"the backward pass and optimizer.step()"
            )
