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
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qsr.core.cost import ring_bytes
from qsr.core.plan import Plan, Round, cut_round
from qsr.core.rules import Rule
from qsr.errors import DisagreementError, TrainingError
from qsr.sync.agreement import Agreement
from qsr.sync.averaging import mean_tensors_
from qsr.sync.batchnorm import reestimate
from qsr.sync.communicator import Communicator, Topology
from qsr.sync.delayed import DelayedAverage
from qsr.sync.fingerprint import Fingerprint
from qsr.sync.replica import BucketReplica, FlatReplica, can_be_flat, local, trainable

_PATIENCE = 32
"""Steps after which calls of `step` are compared with those of the optimizer."""


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
            the group number `param_group`.
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
        _check_arguments(rule, plan, total_steps, warmup_steps, peak_lr, delay_steps)
        first_rule = plan.rule if plan is not None else rule
        assert first_rule is not None
        self.plan = plan
        """The plan that was given, if any."""
        self.total_steps = plan.total_steps if plan is not None else (total_steps or 0)
        self.steps_done = 0
        """Calls of `step` so far."""
        self.averages = 0
        """Averages so far: of parameters, and of gradients."""
        self._model, self._optimizer, self._param_group = model, optimizer, param_group
        self._rule, self._after_warmup, self._warmup_steps = first_rule, peak_lr, warmup_steps
        self._average_buffers, self._delay_steps = average_buffers, delay_steps
        self._on_average = on_average or (lambda _: None)
        parameters = trainable(model)
        if not parameters:
            raise ValueError("the model has no trainable parameters")
        _check_wrapper(model, group)
        self._identities = [id(parameter) for parameter in parameters.values()]
        self._communicator = _make_communicator(parameters, group)
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
        self._round: Round | None = None  # None between two rounds
        self._last: Round | None = None
        self._next_index = 0
        self._bytes = 0
        self._optimizer_steps = 0  # calls of optimizer.step so far
        self._since_last = 0  # and since the last call of `step`
        self._gradients_averaged = False
        self._rate_before: float | None = None  # when the last round ended
        self._scheduler_first = False  # whether the scheduler was seen to step before `step`
        self._fresh, self._start_digest = True, ""
        self._description = self._describe()
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
        self._agree(round_, self.steps_done)
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
        self._check_calls()
        round_ = self._begin()
        if self._rate_before is not None:
            self._scheduler_first |= self._rate() != round_.lr
        self._rate_before = None
        self.steps_done += 1
        self._since_last, self._gradients_averaged = 0, False
        if self._delayed is not None and self._delayed.due == self.steps_done:
            self._delayed.apply_()
        if self.steps_done < round_.end:
            return False
        if round_.averages == "parameters":
            self._end_round(round_)
        self._round, self._next_index = None, round_.index + 1
        self._rate_before = self._rate()
        return True

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
            self._agree(self._round, self.steps_done)
            self._replica.average_(self._mark(self._round, self.steps_done))
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
        return self._round is None and (self._delayed is None or self._delayed.due is None)

    def summary(self) -> dict[str, Any]:
        """Progress so far, for a tracker: steps, rounds, H, averages, volume (averages / steps),
        bytes sent per worker in a ring, seconds spent in averages; with a plan also what it
        foresees for the run."""
        last = self._round or self._last
        values: dict[str, Any] = {
            "step": self.steps_done,
            "total_steps": self.total_steps,
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
            "steps_done": self.steps_done,
            "averages": self.averages,
            "bytes": self._bytes,
            "round": None if self._round is None else tuple(self._round),
            "next_index": self._next_index,
            "rule": _fields(self._rule),
            "scheduler_first": self._scheduler_first,
            "rate_before": self._rate_before,
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
        self.steps_done, self.averages = state["steps_done"], state["averages"]
        self._bytes, self._next_index = state["bytes"], state["next_index"]
        self._round = None if state["round"] is None else Round(*state["round"])
        if state["rule"]:
            self._rule = replace(self._rule, **state["rule"])  # type: ignore[type-var]
        self._scheduler_first, self._rate_before = state["scheduler_first"], state["rate_before"]
        self._optimizer_steps, self._fresh = self.steps_done, False
        if self._delayed is not None and state["correction_due"] is not None:
            self._delayed.load([state["correction"]], state["correction_due"])

    # Rounds

    def _before_update(self, *_: object) -> None:
        """Called by torch at the beginning of every optimizer.step()."""
        self._since_last += 1
        self._optimizer_steps += 1
        if self.steps_done >= self.total_steps:
            return  # `step` reports it
        round_ = self._begin(of_update=True)
        if round_.averages == "gradients" and not self._gradients_averaged and self.workers > 1:
            raise TrainingError(
                f"step {self.steps_done} is data parallel: call sync.average_gradients() between "
                f"the backward pass and optimizer.step()"
            )

    def _begin(self, *, of_update: bool = False) -> Round:
        """The round of this step; a new one if the last has ended."""
        if self._round is not None:
            return self._round
        step = self.steps_done
        if step >= self.total_steps:
            raise TrainingError(
                f"the run has total_steps={self.total_steps}, and all are done: no more steps"
            )
        self._check_parameters()
        before = self._rate_before
        late = not of_update and self._since_last == 0 and self._scheduler_first
        lr = before if late and before is not None else self._rate()
        if self.plan is not None:
            self._round = self._planned(self.plan, lr)
        else:
            decides = lr if step >= self._warmup_steps else self._after_warmup
            assert decides is not None
            self._round = cut_round(
                self._rule, self._next_index, step, lr, decides, self.total_steps
            )
            self._rule = self._rule.after(decides)
        self._last = self._round
        if self._fresh and step == 0:
            self._start_digest = self._digest()
        if self._delayed is not None and self._delayed.due is not None:
            self._delayed.due = step + min(self._delay_steps, self._round.length)
        # the answers arrive while the workers train
        self._agreement.begin(self._mark(self._round, step))
        return self._round

    def _planned(self, plan: Plan, lr: float) -> Round:
        round_ = plan.round_at(self.steps_done)
        if not math.isclose(lr, round_.lr, rel_tol=1e-3, abs_tol=1e-12):
            raise TrainingError(
                f"the optimizer's learning rate is {lr:g} in step {self.steps_done}, but the "
                f"plan's is {round_.lr:g}: give the plan the schedule that the optimizer follows, "
                f"or LocalSGD the rule instead of the plan"
            )
        return round_

    def _end_round(self, round_: Round) -> None:
        step, mark = self.steps_done, self._mark(round_, self.steps_done)
        self._agree(round_, step)
        if self._delayed is not None and step < self.total_steps:
            self._delayed.begin(mark, due=self.total_steps)  # known when the next round begins
        else:
            self._replica.average_(mark)
        more = list(self._more_tensors())
        mean_tensors_(self._communicator, more)
        self.averages += 1
        self._bytes += self._replica.bytes + sum(tensor.nbytes for tensor in more)
        self._fresh = False
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

    def _agree(self, round_: Round | None, step: int) -> None:
        """Collective: raise DisagreementError unless all workers are at the same point."""
        self._agreement.begin(self._mark(round_, step))
        self._agreement.settle()

    def _mark(self, round_: Round | None, step: int) -> Fingerprint:
        index, length, lr = (-1, 0, 0.0) if round_ is None else round_[0:1] + round_[2:4]
        start = self._start_digest if self._fresh else ""
        return Fingerprint(step, index, length, lr, None, f"{self._description}{start}")

    def _rate(self) -> float:
        groups = self._optimizer.param_groups
        if self._param_group is not None:
            return float(groups[self._param_group]["lr"])
        return max(float(group["lr"]) for group in groups)

    # Checks

    def _check_calls(self) -> None:
        if self._since_last > 1:
            raise TrainingError(
                f"optimizer.step() ran {self._since_last} times since the last sync.step(): call "
                f"sync.step() once after each"
            )
        if self.steps_done >= _PATIENCE and 2 * self._optimizer_steps < self.steps_done:
            raise TrainingError(
                f"{self.steps_done} calls of sync.step() and only {self._optimizer_steps} of "
                f"optimizer.step(): call sync.step() once per optimizer step, not per micro-batch"
            )

    def _check_parameters(self) -> None:
        self._replica.check_place()
        now = trainable(self._model)
        if [id(p) for p in now.values()] == self._identities:
            return
        new = next((n for n, p in now.items() if id(p) not in self._identities), None)
        raise TrainingError(
            "a parameter that was trainable when LocalSGD was built is frozen or gone"
            if new is None
            else f"the parameter {new} is new or was frozen when LocalSGD was built: build "
            f"LocalSGD after the model is complete"
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

    def _describe(self) -> str:
        rule = (
            repr(self._rule) if self.plan is None else f"{self.plan.rule!r}, {self.plan.schedule!r}"
        )
        warmup = f", warmup_steps={self._warmup_steps}, peak_lr={self._after_warmup}"
        return (
            f"{rule}, total_steps={self.total_steps}{warmup if self._warmup_steps else ''}, "
            f"delay_steps={self._delay_steps}"
        )

    def _digest(self) -> str:
        """A hash of the parameters, to see that the workers start equal."""
        digest = hashlib.blake2b(digest_size=6)
        for tensor in self._replica.tensors():
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _check_arguments(
    rule: Rule | None,
    plan: Plan | None,
    total_steps: int | None,
    warmup_steps: int,
    peak_lr: float | None,
    delay_steps: int,
) -> None:
    if (rule is None) == (plan is None):
        raise ValueError("give LocalSGD either a rule or a plan")
    if plan is not None and (total_steps is not None or warmup_steps or peak_lr is not None):
        raise ValueError("a plan has its own total_steps, warmup_steps and rates: leave them out")
    if plan is None and (total_steps is None or total_steps < 1):
        raise ValueError(
            "give total_steps, the number of optimizer steps in the run: the last round ends there"
        )
    if warmup_steps and peak_lr is None:
        raise ValueError(
            "give peak_lr, the learning rate of the first step after the warm-up: it decides H "
            "within the warm-up"
        )
    if warmup_steps < 0 or delay_steps < 0:
        raise ValueError("warmup_steps and delay_steps cannot be negative")


def _make_communicator(
    parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None
) -> Communicator:
    device = next(iter(parameters.values())).device
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "several processes were started, but there is no process group: call "
                "torch.distributed.init_process_group() before LocalSGD"
            )
        return Communicator(Topology(0, 1, 0, 1), device, 0.0)
    rank, workers = dist.get_rank(group), dist.get_world_size(group)
    backends = str(dist.get_backend_config(group))
    return Communicator(
        Topology(rank, workers, rank, workers),
        device,
        math.inf,
        group=group,
        control=torch.device("cpu") if "cpu:" in backends or "gloo" in backends else device,
        patience="raise the timeout of init_process_group",
    )


def _check_wrapper(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """DistributedDataParallel over the same processes would average all gradients already."""
    if not isinstance(model, DistributedDataParallel):
        return
    inside = set(dist.get_process_group_ranks(model.process_group))
    if len(inside & set(dist.get_process_group_ranks(group))) > 1:
        raise ValueError(
            "the model is wrapped in DistributedDataParallel over the workers' own processes, "
            "which averages gradients in every step: give LocalSGD the bare model, or a group of "
            "processes of different workers"
        )


def _momentum_of(optimizer: torch.optim.Optimizer) -> list[str]:
    """torch's name of the first moment."""
    return ["momentum_buffer" if isinstance(optimizer, torch.optim.SGD) else "exp_avg"]


def _fields(rule: Rule) -> dict[str, Any]:
    """The fields of a rule, of which some may have changed in earlier rounds."""
    return asdict(rule) if is_dataclass(rule) else {}
