"""Local SGD under Accelerate and Lightning gives, bit for bit, what it gives in a plain loop."""

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from qsr import ConstantRule, PostLocalRule, QuadraticRule, Rule
from qsr.sync.local_sgd import LocalSGD
from tests.support import batchnorm_net, digits_like, run_ranks

STEPS, ACCUMULATE, BATCH = 10, 2, 4
QSR = QuadraticRule(h_base=2, alpha=0.15)
POST_LOCAL = PostLocalRule(switch_step=3, h=4)
CLIP_NORM = 0.5


def net() -> nn.Sequential:
    torch.manual_seed(1)
    model = batchnorm_net()
    assert isinstance(model, nn.Sequential)
    del model[3]  # dropout: nothing is random
    return model


def rows(rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """The worker's images and labels, as a DistributedSampler without shuffling deals them."""
    images, labels = digits_like(STEPS * ACCUMULATE * BATCH * ranks)
    return images[rank::ranks], labels[rank::ranks]


def micro_batches(rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = rows(rank, ranks)
    return zip(images.split(BATCH), labels.split(BATCH), strict=True)


def sgd_and_decay(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, STEPS)


def values(model: nn.Module) -> list[float]:
    """All parameters and buffers."""
    return torch.cat([t.detach().double().flatten() for t in model.state_dict().values()]).tolist()


def join(rank: int, ranks: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=ranks)


def plain_loop(rank: int, ranks: int, rule: Rule, overflow: bool = False) -> Any:
    """The reference: parameters and summary after STEPS. With `overflow` there is a GradScaler, and
    worker 1's gradients of step 3 are not finite."""
    join(rank, ranks)
    model = net()
    optimizer, scheduler = sgd_and_decay(model)
    scaler = torch.amp.GradScaler("cpu", enabled=overflow, init_scale=16.0)
    sync = LocalSGD(model, optimizer, rule, total_steps=STEPS)
    for index, (images, labels) in enumerate(micro_batches(rank, ranks)):
        loss = functional.cross_entropy(model(images), labels) / ACCUMULATE
        scaler.scale(loss * accident(rank, index, overflow)).backward()
        if index % ACCUMULATE == ACCUMULATE - 1:
            sync.average_gradients()
            if not overflow:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
            sync.step()
    return values(model), counts(sync)


def accident(rank: int, index: int, overflow: bool) -> float:
    return float("inf") if overflow and rank == 1 and index == 3 * ACCUMULATE else 1.0


def counts(sync: LocalSGD) -> dict[str, Any]:
    return {name: v for name, v in sync.summary().items() if name != "averaging_seconds"}


# Accelerate


def accelerator_for_tests() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)


def accelerate_loop(rank: int, ranks: int, rule: Rule, overflow: bool = False) -> Any:
    from qsr.integrations.accelerate import AcceleratedLocalSGD

    accelerator = accelerator_for_tests()
    if overflow:  # Accelerate itself makes one on GPUs only
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    model = accelerator.prepare_model(net(), evaluation_mode=True)
    bare, scheduler = sgd_and_decay(model)
    optimizer = accelerator.prepare(bare)
    sync = AcceleratedLocalSGD(accelerator, model, optimizer, rule, total_steps=STEPS)
    for index, (images, labels) in enumerate(micro_batches(rank, ranks)):
        with accelerator.accumulate(model):
            loss = functional.cross_entropy(model(images), labels)
            accelerator.backward(loss * accident(rank, index, overflow))
            sync.average_gradients()
            if accelerator.sync_gradients and not overflow:
                accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
            sync.step()
    return values(model), counts(sync)


@pytest.mark.parametrize(
    ("rule", "overflow"), [(QSR, False), (QSR, True), (POST_LOCAL, False)], ids=repr
)
def test_accelerate_gives_what_a_plain_loop_does(rule: Rule, overflow: bool) -> None:
    expected = run_ranks(plain_loop, 2, rule, overflow)
    assert all(isinstance(result, tuple) for result in expected), expected
    assert run_ranks(accelerate_loop, 2, rule, overflow) == expected
    averages = {QSR: 3, POST_LOCAL: 5}[rule]
    assert expected[0][1]["averages"] == averages


def refusals_of_accelerate(rank: int, ranks: int) -> list[str]:
    from accelerate.utils import DistributedType

    from qsr.integrations.accelerate import AcceleratedLocalSGD

    accelerator = accelerator_for_tests()
    bare = net()
    wrapped, optimizer = accelerator.prepare(bare, sgd_and_decay(bare)[0])
    make = partial(AcceleratedLocalSGD, accelerator, rule=ConstantRule(2), total_steps=STEPS)
    refused = []
    for model in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(ValueError, match="wrapped") as caught:
            make(model, optimizer)
        refused.append(str(caught.value))
    make(accelerator.unwrap_model(wrapped), optimizer)  # but trained through its wrapper
    with pytest.raises(ValueError, match="wrapped") as caught:
        wrapped(rows(rank, ranks)[0])
    refused.append(str(caught.value))
    accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
    with pytest.raises(ValueError, match="one model over all processes") as caught:
        make(bare, optimizer)
    return [*refused, str(caught.value)]


def test_accelerate_with_gradients_averaged_behind_our_back_is_refused() -> None:
    for refused in run_ranks(refusals_of_accelerate, 2):
        *wrapped, sharded = refused
        assert len(wrapped) == 3
        for line in wrapped:
            assert line.endswith(
                "use accelerator.prepare_model(model, evaluation_mode=True) instead of "
                "accelerator.prepare(model)"
            )
        assert "launch with MULTI_GPU or MULTI_CPU" in sharded


def save_states(rank: int, ranks: int, folder: Path) -> Any:
    from qsr.errors import TrainingError
    from qsr.integrations.accelerate import AcceleratedLocalSGD

    accelerator = accelerator_for_tests()
    model = accelerator.prepare_model(net(), evaluation_mode=True)
    optimizer = accelerator.prepare(sgd_and_decay(model)[0])
    sync = AcceleratedLocalSGD(
        accelerator, model, optimizer, ConstantRule(2), total_steps=STEPS, average_momentum=True
    )
    accelerator.register_for_checkpointing(sync)
    refused = []

    def train(steps: int) -> None:
        images, labels = rows(rank, ranks)
        for _ in range(steps):
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            sync.step()

    train(1)
    with pytest.raises(TrainingError, match=r"save when sync\.workers_are_equal") as caught:
        accelerator.save_state(str(folder))
    refused.append(str(caught.value))
    train(1)
    accelerator.save_state(str(folder))
    train(4)
    end = [p.tolist() for p in model.parameters()]
    accelerator.load_state(str(folder))
    again = sync.steps_done
    train(4)
    return refused, again, end == [p.tolist() for p in model.parameters()]


def test_accelerate_saves_and_resumes_between_rounds(tmp_path: Path) -> None:
    for refused, again, same in run_ranks(save_states, 2, tmp_path / "state"):
        assert len(refused) == 1
        assert again == 2
        assert same


# Lightning


def fit(rank: int, ranks: int, rule: Rule, options: dict[str, Any]) -> Any:
    """Parameters and counts of a run under Lightning, and what was seen of the parameters: the
    worker's own before a validation, and those within."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    from qsr.integrations.lightning import LocalSGDCallback, LocalStrategy

    folder: Path | None = options.get("save_in")
    own: list[list[float]] = []
    seen: list[list[float]] = []

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            if options.get("two_optimizers"):
                self.automatic_optimization = False

        def forward(self, images: Tensor) -> Any:
            return self.net(images)

        def training_step(self, batch: Any, _: int) -> Tensor:
            images, labels = batch
            return functional.cross_entropy(self(images), labels)

        def validation_step(self, batch: Any, _: int) -> None:
            seen.append(values(self.net))

        def on_train_batch_end(self, *_: object) -> None:
            own.append(values(self.net))

        def configure_optimizers(self) -> Any:
            optimizer, scheduler = sgd_and_decay(self.net)
            if options.get("two_optimizers"):
                return [optimizer, sgd_and_decay(self.net)[0]]
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    averaging = LocalSGDCallback(rule, batchnorm_batches=options.get("batchnorm_batches", 0))
    saving = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=3, save_top_k=options.get("keep", -1)
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=options.get("strategy") or LocalStrategy(),
        max_epochs=1,
        accumulate_grad_batches=1 if options.get("two_optimizers") else ACCUMULATE,
        gradient_clip_val=None if options.get("two_optimizers") else CLIP_NORM,
        callbacks=[saving, averaging] if folder else [averaging],
        val_check_interval=options.get("validate_every"),
        limit_val_batches=1 if "validate_every" in options else 0,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(*rows(rank, ranks))
    # Lightning begins the data of an epoch anew after a resume
    done = options.get("steps_done", 0) * ACCUMULATE * BATCH
    order = [*range(done, len(data)), *range(done)]
    loader = DataLoader(data, batch_size=BATCH, sampler=order)
    module = Module()
    if rank == 1:  # the callback gives it the parameters of worker 0
        torch.nn.init.ones_(module.net[0].weight)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader, ckpt_path=options.get("resume"))
    assert averaging.sync is not None
    return (values(module.net), counts(averaging.sync)), own, seen


def fit_all(rank: int, ranks: int, runs: dict[str, tuple[Rule, dict[str, Any]]]) -> dict[str, Any]:
    """All runs in the same processes, because Lightning is slow to import; an error is its text."""
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    for name, (rule, options) in runs.items():
        try:
            results[name] = fit(rank, ranks, rule, options)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def lightning(checkpoints: Path) -> list[dict[str, Any]]:
    """What each worker says of each run."""
    pytest.importorskip("lightning", reason="lightning is not installed")
    runs: dict[str, tuple[Rule, dict[str, Any]]] = {
        "bare": (QSR, {}),
        "post-local": (POST_LOCAL, {}),
        "saved": (QSR, {"save_in": checkpoints}),
        "resumed": (QSR, {"resume": checkpoints / "step=3.ckpt", "steps_done": 3}),
        "missing": (QSR, {"resume": checkpoints / "step=4.ckpt"}),
        "newest": (QSR, {"save_in": checkpoints / "newest", "keep": 1}),
        "validated": (QSR, {"validate_every": 8, "batchnorm_batches": 2}),
        "ddp": (QSR, {"strategy": "ddp"}),
        "two optimizers": (QSR, {"two_optimizers": True}),
    }
    results = run_ranks(fit_all, 2, runs)
    assert all(isinstance(result, dict) for result in results), results
    return results


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    return run_ranks(plain_loop, 2, QSR)


def ends(lightning: list[dict[str, Any]], name: str) -> list[Any]:
    """Parameters and counts of the workers at the end of a run."""
    results = [worker[name] for worker in lightning]
    assert not any(isinstance(result, str) for result in results), results
    return [result[0] for result in results]


def test_lightning_gives_what_a_plain_loop_does(
    lightning: list[dict[str, Any]], plain: list[Any]
) -> None:
    assert ends(lightning, "bare") == plain


def test_lightning_averages_gradients_where_the_rule_says_so(
    lightning: list[dict[str, Any]],
) -> None:
    assert ends(lightning, "post-local") == run_ranks(plain_loop, 2, POST_LOCAL)


def test_lightning_resumes_in_the_middle_of_a_round(
    lightning: list[dict[str, Any]], plain: list[Any], checkpoints: Path
) -> None:
    assert ends(lightning, "saved") == plain
    paths = [checkpoints / "step=3.ckpt", checkpoints / "step=3.ckpt.worker1"]
    own = [torch.load(path)["state_dict"]["net.0.weight"] for path in paths]
    assert not own[0].equal(own[1])  # steps 0 and 1 are a round, 3 lies in the second
    assert ends(lightning, "resumed") == plain
    kept = {path.name for path in (checkpoints / "newest").iterdir()}
    assert kept == {"step=9.ckpt", "step=9.ckpt.worker1"}


def test_lightning_validates_the_mean_and_trains_on(
    lightning: list[dict[str, Any]], plain: list[Any]
) -> None:
    assert ends(lightning, "validated") == plain
    sanity, *seen = zip(*(worker["validated"][2] for worker in lightning), strict=True)
    before = [[worker["validated"][1][batch] for worker in lightning] for batch in (7, 15)]
    parameters = sum(p.numel() for p in net().parameters())
    assert len(sanity) == 2
    for (within, other), own in zip(seen, before, strict=True):
        assert within == other  # the statistics of BatchNorm too
        one, two = (torch.tensor(v, dtype=torch.float64) for v in own)
        assert not one.equal(two)
        mean = ((one.float() + two.float()) / 2).double()
        here = torch.tensor(within, dtype=torch.float64)
        names = [(n, t.numel()) for n, t in net().state_dict().items()]
        learned = torch.cat(
            [torch.full((size,), "running" not in n and "num_" not in n) for n, size in names]
        )
        assert int(learned.sum()) == parameters
        assert here[learned].equal(mean[learned])
        assert not here[~learned].equal(mean[~learned])


def test_lightning_refuses(lightning: list[dict[str, Any]], checkpoints: Path) -> None:
    for worker, suffix in zip(lightning, ("", ".worker1"), strict=True):
        assert worker["ddp"] == (
            "ValueError: DDPStrategy averages gradients in every step or shards the model: use "
            "Trainer(strategy=LocalStrategy()), from qsr.integrations.lightning"
        )
        assert worker["two optimizers"].startswith(
            "ValueError: the module has 2 optimizers: return one from configure_optimizers"
        )
        assert worker["missing"].startswith(
            f"CheckpointError: {checkpoints}/step=4.ckpt{suffix} is missing: start as many"
        )
