"""Local SGD in any training loop: the method of Gu et al. 2024 (Algorithm 1) for other people's
code. Needs torch and the standard library only.

    sync = LocalSGD(model, optimizer, QuadraticRule(h_base=4, alpha=0.0175), total_steps=93_600,
                    warmup_steps=10_000, peak_lr=0.008)
    for x, y in loader:
        loss(model(x), y).backward()
        optimizer.step(); scheduler.step(); optimizer.zero_grad()
        sync.step()
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr.core.cost import ring_bytes
from qsr.core.plan import Plan, Round
from qsr.core.rules import Rule
from qsr.errors import DisagreementError, TrainingError
from qsr.sync.agreement import Agreement
from qsr.sync.averaging import mean_tensors_
from qsr.sync.batchnorm import reestimate
from qsr.sync.delayed import DelayedAverage
from qsr.sync.fingerprint import Fingerprint
from qsr.sync.follower import RoundFollower
from qsr.sync.replica import BucketReplica, FlatReplica, can_be_flat, digest, local, trainable
from qsr.sync.users_group import check_wrapper, join_group


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
        flatten: bool = True,
        on_average: Callable[[Mapping[str, Any]], object] | None = None,
    ) -> None:
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise ValueError(
                f"{type(optimizer).__name__} wraps an optimizer: give LocalSGD the one inside, "
                f"such as accelerate's optimizer.optimizer"
            )
        if delay_steps < 0:
            raise ValueError(f"delay_steps cannot be negative, got {delay_steps}")
        self._rounds = RoundFollower(
            optimizer, rule, plan, total_steps, warmup_steps, peak_lr, param_group
        )
        self.averages = 0
        """Averages so far: of parameters, and of gradients."""
        self._model, self._optimizer = model, optimizer
        self._average_buffers, self._delay_steps = average_buffers, delay_steps
        self._on_average = on_average or (lambda _: None)
        parameters = trainable(model)
        if not parameters:
            raise ValueError("the model has no trainable parameters")
        check_wrapper(model, group)
        self._communicator = join_group(parameters, group)
        flat = flatten and can_be_flat(parameters)
        self._replica: FlatReplica | BucketReplica = (FlatReplica if flat else BucketReplica)(
            parameters, self._communicator
        )
        self._delayed = None
        if delay_steps:
            if not isinstance(self._replica, FlatReplica):
                raise ValueError("delay_steps needs parameters that can be moved (flatten=True)")
            self._delayed = DelayedAverage(self._replica.averager, [self._replica])
        self._state_keys = [
            *(_momentum_of(optimizer) if average_momentum else ()),
            *(("exp_avg_sq",) if average_second_moment else ()),
        ]
        self._agreement = Agreement(self._communicator, lambda: False)
        self._bytes = 0
        self._gradients_averaged = False
        self._resumed = False
        self._description = f"{self._rounds.description}, delay_steps={delay_steps}"
        self._check_same_arguments()
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
        have = torch.tensor([float(p.grad is not None) for p in parameters])
        anywhere = self._communicator.total(have.to(self._communicator.device)).tolist()
        used = [p for p, number in zip(parameters, anywhere, strict=True) if number]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [local(p.grad) for p in used if p.grad is not None]
        mean_tensors_(self._communicator, gradients)
        self.averages += 1
        self._bytes += sum(gradient.nbytes for gradient in gradients)
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
            tensors = self._replica.tensors()
            kept += [(tensor, tensor.clone()) for tensor in tensors]
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
        last = self._rounds.last
        values: dict[str, Any] = {
            "step": self.steps_done,
            "total_steps": self._rounds.total_steps,
            "round": None if last is None else last.index,
            "h": None if last is None else last.length,
            "lr": None if last is None else last.lr,
            "averages": self.averages,
            "volume": self.averages / self.steps_done if self.steps_done else 0.0,
            "bytes_sent_per_worker": round(ring_bytes(self.workers, self._bytes)),
            "averaging_seconds": self._communicator.seconds(),
        }
        if self.plan is not None:
            values["planned_averages"] = self.plan.num_rounds
            values["planned_volume"] = self.plan.volume
        return values

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
            self._check_equal_start()
        round_ = self._rounds.begin()
        if self._delayed is not None and self._delayed.due is not None:
            self._delayed.due = round_.start + min(self._delay_steps, round_.length)
        self._agreement.begin(self._mark())
        return round_

    def _end_round(self) -> None:
        self._agree()
        if self._delayed is not None and not self._rounds.ended:
            # when it is due is known when the next round begins
            self._delayed.begin(self._mark(), due=self._rounds.total_steps)
        else:
            self._replica.average_(self._mark())
        more = list(self._more_tensors())
        mean_tensors_(self._communicator, more)
        self.averages += 1
        self._bytes += self._replica.bytes + sum(tensor.nbytes for tensor in more)
        self._on_average(self.summary())

    def _more_tensors(self) -> Iterator[Tensor]:
        """Optimizer states and buffers that are averaged with the parameters; where a worker has no
        state for a parameter yet, zeros that nobody reads."""
        for parameter in trainable(self._model).values() if self._state_keys else ():
            state = self._optimizer.state[parameter]
            for key in self._state_keys:
                value = state.get(key)
                yield torch.zeros_like(local(parameter)) if value is None else local(value)
        if self._average_buffers:
            yield from (buffer for buffer in self._model.buffers() if buffer.is_floating_point())

    def _agree(self) -> None:
        """Collective: raise DisagreementError unless all workers are at the same point."""
        self._agreement.begin(self._mark())
        self._agreement.settle()

    def _mark(self) -> Fingerprint:
        """Where this worker is."""
        last = self._rounds.last
        index, h, lr = (-1, 0, 0.0) if last is None else (last.index, last.length, last.lr)
        return Fingerprint(self.steps_done, index, h, lr, None, self._description)

    # Checks

    def _check_gradients(self, round_: Round) -> None:
        if round_.averages == "gradients" and not self._gradients_averaged and self.workers > 1:
            raise TrainingError(
                f"step {self.steps_done} is data parallel: call sync.average_gradients() between "
                f"the backward pass and optimizer.step()"
            )

    def _check_equal_start(self) -> None:
        """Collective: raise TrainingError unless all workers begin with the same weights; after an
        average a difference would no longer show."""
        hashes = self._communicator.gather_texts(digest(self._replica.tensors()))
        if len(set(hashes)) > 1:
            raise TrainingError(
                "the workers' initial weights differ: seed all workers alike before the model is "
                "built, load the same weights, or call sync.broadcast() before the first step"
            )

    def _check_same_arguments(self) -> None:
        """Collective: raise DisagreementError unless all workers have the same model and rule."""
        shapes = {name: list(p.shape) for name, p in trainable(self._model).items()}
        record = {"run": self._description, "parameters": shapes}
        differs = self._communicator.first_difference(record)
        if differs is not None:
            raise DisagreementError(
                f"worker {differs.rank} builds another LocalSGD than worker 0 ({differs.what}): "
                f"use the same model and arguments on all"
            )


def _momentum_of(optimizer: torch.optim.Optimizer) -> list[str]:
    """torch's name of the first moment."""
    return ["momentum_buffer" if isinstance(optimizer, torch.optim.SGD) else "exp_avg"]
