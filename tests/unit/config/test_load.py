"""Command lines and what becomes of them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsr.config import schema
from qsr.config.load import (
    CONFIG_DIR,
    config_hash,
    differences,
    identity,
    load_config,
    load_configs,
    parse_config,
    parse_identity,
    run_folder,
    to_dict,
)
from qsr.config.planning import make_plan
from qsr.errors import ConfigError

DEMO = "experiment=demo/quadratic"
AUGMENT = "data.augmentation.randaugment"
VIT = "experiment=vit_b16_b4096/quadratic_h4"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # unknown names, with the nearest that exists
        ([DEMO, "sync.alpah=0.02"], "sync.alpah is not a setting of sync.rule=quadratic; did you "
         "mean sync.alpha?"),
        ([DEMO, "+typo=1"], "typo is not a setting; choose from: experiment, seed, workers,"),
        ([DEMO, "++wokers=1"], "wokers is not a setting; did you mean workers?"),
        ([DEMO, "+data.augmentation.min_aera=0.5"], "did you mean data.augmentation.min_area?"),
        ([DEMO, "alpha=0.02"], "alpha is not a setting; did you mean sync.alpha?"),
        ([DEMO, "lr=0.1"], "lr is not a setting"),
        ([DEMO, "modle=vit_b16"], "modle is not a setting; did you mean model?"),
        ([DEMO, "model=vit_b17"], "model=vit_b17: no such file in configs; did you mean vit_b16?"),
        (["experiment=demo/quadratc"], "did you mean demo/quadratic?"),
        (["experiment=demo/constant", "sync.alpha=1"], "not a setting of sync.rule=constant"),
        ([DEMO, "optimizer=adamw", "optimizer.momentum=0.9"], "of optimizer.name=adamw"),
        # wrong values
        ([DEMO, "schedule.peak_lr=fast"], "peak_lr='fast': input should be a valid number"),
        ([DEMO, "sync.h_base=4.5"], "sync.h_base=4.5: input should be a valid integer"),
        ([DEMO, "sync.h_base=0"], "sync.h_base=0: input should be greater than or equal to 1"),
        ([DEMO, "sync.alpha=0"], "sync.alpha=0: input should be greater than 0"),
        # what torch, DALI or the system would answer with a traceback, or not at all
        ([DEMO, "schedule.peak_lr=1e308"], "peak_lr=1e+308: input should be less than or equal to"),
        ([DEMO, "evaluation.batch=1000000000000"], "should be less than or equal to 65536"),
        ([DEMO, "data.loader_threads=1000000000000"], "should be less than or equal to 4096"),
        ([DEMO, "data.prefetch_batches=1000000000000"], "should be less than or equal to 1024"),
        ([DEMO, "cluster.threads_per_rank=100000"], "should be less than or equal to 4096"),
        ([DEMO, "sync.alpha=nan"], "sync.alpha"),
        ([DEMO, "seed=-1"], "seed=-1"),
        ([DEMO, "workers=0"], "workers=0"),
        ([DEMO, "precision=fp8"], "precision='fp8': input should be 'fp32', 'bf16' or 'fp16'"),
        ([DEMO, "optimizer.name=adam"], "optimizer.name"),
        ([DEMO, "~loss"], "loss is missing"),
        ([DEMO, "sync.alpha"], "'sync.alpha' is not of the form setting=value"),
        ([DEMO, "seed=1,2"], "these settings ask for 2 runs: ask for one"),
        ([DEMO, "sync.alpha=interval(1,2)"], "list the values, as in seed=1,2,3"),
        ([], "epochs has no value: set it, or choose an experiment, for example experiment=demo"),
        # rehearsals
        ([DEMO, "rehearsal=digit"], "rehearsal=digit: no such file in configs; did you mean dig"),
        ([DEMO, "rehearsal=digits", "rehearsal.epoch=2"], "rehearsal.epoch is not a setting; did "
         "you mean epochs?"),
        ([DEMO, "rehearsal=digits", "rehearsal.workers_divisor=0"], "rehearsal.workers_divisor=0:"),
        ([DEMO, "rehearsal=digits", "rehearsal.data=ciphar"], "data=ciphar: no such file in conf"),
        ([DEMO, "rehearsal=digits", "model=timm", "model.timm_name=resnet18"], "no rehearsal of "
         "model=timm: rehearsal.models has only resnet152, resnet50, vit_b16, vit_s16, small_re"),
        ([DEMO, "rehearsal=digits", "micro_batch=1", "rehearsal.local_batch=24"], "rehearsal.local_"
         "batch=24 is not divisible by the experiment's 16 micro-batches"),
        ([DEMO, "rehearsal=digits", "data.train_images=null"], "a rehearsal needs data."),
        # settings that do not fit each other
        ([DEMO, "workers=3"], "global_batch=64 is not divisible by workers=3"),
        ([DEMO, "micro_batch=5"], "micro_batch=5 does not divide the local batch 16"),
        ([DEMO, "cluster.ranks=3"], "cluster.ranks=3 does not divide workers=4: every rank holds "
         "the same number of workers; try cluster.ranks=1 or 2 or 4"),
        ([DEMO, "cluster.ranks=8"], "cluster.ranks=8 does not divide workers=4"),
        ([DEMO, "global_batch=2048"], "global_batch=2048 exceeds the 1,442 training images"),
        ([DEMO, "schedule.warmup_epochs=15"], "warmup_epochs=15: the warm-up must be shorter "),
        ([DEMO, "schedule.warmup_steps=5"], "not both"),
        ([DEMO, "schedule.final_lr=1"], "schedule.final_lr=1 exceeds schedule.peak_lr=0.2"),
        ([DEMO, "schedule.stop_epoch=1"], "stop_step must lie between"),
        ([DEMO, "stop_after_steps=1000"], "stop_after_steps=1000 exceeds the run's 330 steps"),
        ([DEMO, "sync=swap", "sync.switch_epoch=99"], "switch_epoch=99 lies after the"),
        ([DEMO, "sync.average_second_moment=true"], "sgd has no second moment"),
        ([DEMO, "sync.average_momentum=true", "optimizer.momentum=0"], "there is no momentum"),
        ([DEMO, "sync.delay_steps=4"], "sync.delay_steps=4: must be less than the smallest H, 4, "
         "because an average must be applied before the next round ends"),
        (["experiment=demo/parallel", "sync.delay_steps=1"], "less than the smallest H, 1"),
        (["experiment=vit_b16_b4096/swap", "sync.delay_steps=1"], "sync=swap averages once"),
        ([DEMO, "sync.h_max=3"], "sync.h_max=3 is below the rule's smallest H, 4"),
        ([DEMO, "sync.outer_nesterov=true"], "sync.outer_*: outer nesterov needs an outer "
         "momentum above 0"),
        (["experiment=demo/parallel", "sync.outer_momentum=0.9"], "averages no parameters"),
        ([DEMO, "sync.outer_lr=0.7", "sync.delay_steps=2"], "needs the average at the round's end"),
        ([DEMO, "ema.decay=1"], "ema.decay=1: input should be less than 1"),
        ([DEMO, "ema.decay=0"], "ema.decay=0: input should be greater than 0"),
        ([DEMO, "ema.uniform_fraction=1.5"], "ema.uniform_fraction=1.5: input should be less than"),
        ([DEMO, "ema.uniform_from=0.5"], "ema.uniform_from is not a setting; did you mean ema.uni"),
        ([DEMO, "ema.decay=0.99", "sync.delay_steps=2"], "sync.delay_steps=2: ema.* needs the "
         "workers' mean at the round's end: set it to 0"),
        ([DEMO, "sync.delay_steps=2", "sync.average_momentum=true"], "only parameters, not "
         "moments, can be averaged with a delay"),
        ([DEMO, "model=timm"], "model.timm_name has no value"),
        ([DEMO, "model.timm_name=resnet18"], "model.timm_name must be set if model.name=timm"),
        ([DEMO, "data.augmentation.min_area=0.9", "data.augmentation.max_area=0.5"], "exceeds"),
        ([DEMO, "data.decode=gpu", "cluster.device=cpu"], "data.decode=gpu needs a GPU"),
        ([DEMO, "data.decode=gpu", "data.loader=torchvision"], "needs DALI"),
        ([DEMO, "data.mean=[.nan,0,0]"], "data.mean"),
        ([DEMO, f"{AUGMENT}=compser"], "data.augmentation.randaugment='compser': input should be "
         "'none', 'composer', 'torchvision' or 'timm'"),
        ([DEMO, f"{AUGMENT}=composer"], "data.augmentation.randaugment=composer needs "
         "data.augmentation.randaugment_depth (usually 2) and randaugment_severity (0 to 10)"),
        ([VIT, f"{AUGMENT}=none"], "randaugment=none: set randaugment_depth and "
         "randaugment_severity to null, or choose composer"),
        ([VIT, f"{AUGMENT}_severity=11"], "severity=11: composer's must be between 0 and 10"),
        ([VIT, f"{AUGMENT}_severity=-1"], "randaugment_severity=-1: input should"),
        ([VIT, f"{AUGMENT}_depth=0"], "randaugment_depth=0: input should be"),
        ([VIT, f"{AUGMENT}=timm", f"{AUGMENT}_severity=15"], "severity=15: timm's must be between "
         "0 and 10"),
        ([VIT, f"{AUGMENT}=torchvision", f"{AUGMENT}_severity=31"], "torchvision's must be between "
         "0 and 30"),
        ([VIT, f"{AUGMENT}=torchvision", f"{AUGMENT}_severity=9.5"], "9.5: torchvision's must "
         "be between 0 and 30 and a whole number"),
        ([VIT, f"{AUGMENT}_strength=1"], "randaugment_strength is not a setting"),
        ([VIT, "fp16_overflow=retry"], "fp16_overflow='retry': input should be 'repeat' or 'skip'"),
        ([DEMO, "profile.steps=[15,10]"], "profile.steps=[15,10]: the first step comes first, as "
         "in [10,15]"),
        ([DEMO, "profile.steps=[0,3]"], "profile.steps.0=0: input should be greater than or equ"),
        ([DEMO, "profile.steps=[1,101]"], "record at most 100 steps, as in [1,100]"),
        ([DEMO, "profile.steps=[5]"], "profile.steps"),
        ([DEMO, "profile.steps=[329,331]"], "exceeds the run's 330 steps: choose earlier ones"),
        ([DEMO, "cuda_graphs=true", "cluster.device=cpu"], "cuda_graphs=true needs a GPU, but "
         "cluster.device=cpu: set one of them"),
        ([DEMO, "compile=true"], "compile=True: input should be 'none', 'default' or 'max_auto"),
        ([DEMO, "optimizer.nesterov=true", "optimizer.momentum=0"], "nesterov=true needs"),
        ([DEMO, "optimizer=adamw", "optimizer.beta1=1.0"], "optimizer.beta1=1.0"),
        ([DEMO, "cluster.timeout_seconds=1e300"], "cluster.timeout_seconds"),
        ([DEMO, "data.std=[0,1,1]"], "data.std must be positive"),
    ],
)  # fmt: skip
def test_wrong_command_lines_get_one_clear_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_of_values_give_every_combination() -> None:
    configs = load_configs([DEMO, "seed=1,2,3", "sync.alpha=choice(0.1,0.2)", "workers=2"])
    assert [(c.seed, c.sync.alpha, c.workers) for c in configs] == [  # type: ignore[union-attr]
        (1, 0.1, 2), (1, 0.2, 2), (2, 0.1, 2), (2, 0.2, 2), (3, 0.1, 2), (3, 0.2, 2),
    ]  # fmt: skip
    assert configs[4] == load_config([DEMO, "seed=3", "sync.alpha=0.1", "workers=2"])
    assert [c.seed for c in load_configs([DEMO, "seed=range(4,6)"])] == [4, 5]


def test_right_command_line() -> None:
    config = load_config([DEMO, "seed=2", "sync.alpha=0.02", "cluster.ranks=2", "+workers=8"])
    assert isinstance(config.sync, schema.QuadraticSync)
    assert (config.sync.alpha, config.sync.h_base) == (0.02, 4)
    assert (config.seed, config.workers, config.cluster.ranks) == (2, 8, 2)
    assert (config.local_batch, config.micro_batch_size) == (8, 8)
    assert config.schedule.peak_lr == 0.2
    assert config.tracking.wandb == "offline"


def test_seed_zero_is_a_seed() -> None:
    assert load_config([DEMO, "seed=0"]).seed == 0


def folder(*overrides: str) -> str:
    return str(run_folder(load_config([DEMO, *overrides])))


def test_the_folder_is_a_function_of_experiment_and_seed() -> None:
    assert folder("seed=3") == "runs/demo/quadratic/seed_3"
    assert folder("+seed=3") == "runs/demo/quadratic/seed_3"
    changed = "runs/demo/quadratic/sync.alpha=0.02,workers=8/seed_1"
    assert folder("sync.alpha=0.02", "workers=8") == changed
    assert folder("workers=8", "sync.alpha=0.02") == changed  # in any order
    # how a run is carried out is no part of its name
    execution = ("cluster.ranks=2", "tracking=none", "data.root=/mnt/digits", "stop_after_steps=9")
    assert folder(*execution) == "runs/demo/quadratic/seed_1"
    long = folder(*(f"data.augmentation.{k}=0.9" for k in ("min_area", "max_area", "min_aspect")))
    longer = folder(
        *(
            f"data.augmentation.{k}=0.9"
            for k in ("min_area", "max_area", "min_aspect", "max_aspect", "flip_probability")
        )
    )
    assert long != longer
    assert max(len(part) for part in longer.split("/")) <= 120
    assert folder("runs_dir=/scratch") == "/scratch/demo/quadratic/seed_1"


def test_the_hash_follows_what_is_computed_and_nothing_else() -> None:
    base = load_config([DEMO])
    same = load_config([DEMO, "cluster.ranks=1", "tracking=online", "checkpoint.every_steps=7"])
    other = load_config([DEMO, "sync.alpha=0.02"])
    assert config_hash(base) == config_hash(same)
    assert config_hash(base) != config_hash(other)
    assert differences(other, base) == ["sync.alpha: 0.4375 -> 0.02"]
    assert differences(same, base) == []
    assert differences(load_config([DEMO, "seed=2"]), base) == ["seed: 1 -> 2"]


def test_a_run_from_before_a_setting_is_the_run_that_has_its_old_value() -> None:
    stored = to_dict(load_config([DEMO]))
    del stored["sync"]["delay_steps"]
    assert differences(load_config([DEMO]), parse_identity(stored)) == []
    delayed = load_config([DEMO, "sync.delay_steps=2"])
    assert differences(delayed, parse_identity(stored)) == ["sync.delay_steps: 0 -> 2"]
    assert config_hash(delayed) != config_hash(parse_identity(stored))
    del stored["compile"]
    assert differences(load_config([DEMO]), parse_identity(stored)) == []
    compiled = load_config([DEMO, "compile=default"])
    assert differences(compiled, parse_identity(stored)) == ["compile: none -> default"]
    assert config_hash(compiled) != config_hash(parse_identity(stored))
    del stored["ema"]
    assert differences(load_config([DEMO]), parse_identity(stored)) == []
    averaged = load_config([DEMO, "ema.decay=0.99"])
    assert differences(averaged, parse_identity(stored)) == ["ema.decay: None -> 0.99"]


@pytest.mark.parametrize("name", sorted(
    path.relative_to(CONFIG_DIR / "experiment").with_suffix("").as_posix()
    for path in (CONFIG_DIR / "experiment").rglob("*.yaml")
))  # fmt: skip
def test_every_experiment_composes_and_survives_yaml(name: str, tmp_path: Path) -> None:
    config = load_config([f"experiment={name}"])
    assert config.experiment == name
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert parse_config(yaml.safe_load(path.read_text())) == config


RULES = {
    "parallel": (),
    "every_step": (),
    "constant": ("sync.h=3",),
    "quadratic": ("sync.h_base=2", "sync.alpha=0.3"),
    "power": ("sync.h_base=2", "sync.coefficient=0.3", "sync.exponent=3"),
    "post_local": ("sync.switch_epoch=2", "sync.h=3"),
    "swap": ("sync.switch_epoch=2",),
    "stagewise": ("sync.h=3",),
    "growing": ("sync.h_base=2", "sync.growth=1"),
}
SCHEDULES = {
    "cosine": (),
    "linear": (),
    "power_of_two": (),
    "step": ("schedule.milestone_epochs=[2,4]",),
    "constant": (),
}


def test_all_groups_are_covered_here() -> None:
    for group, table in (("sync", RULES), ("schedule", SCHEDULES)):
        # tests/e2e/test_own_parts.py, tests/e2e/test_rounds_of_a_run.py
        own = {"custom"} | ({"adaptive", "replay"} if group == "sync" else set())
        assert {path.stem for path in (CONFIG_DIR / group).iterdir()} == set(table) | own


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_rule_and_schedule_makes_a_plan(rule: str, schedule: str) -> None:
    config = load_config(
        [
            *("epochs=6", "global_batch=100", "schedule.peak_lr=0.4", "schedule.warmup_epochs=1"),
            *(f"sync={rule}", *RULES[rule], f"schedule={schedule}", *SCHEDULES[schedule]),
        ]
    )
    plan = make_plan(config, 1442)
    assert plan.total_steps == 6 * 14
    assert sum(r.length for r in plan.rounds()) == 84
    gradient_rounds = {"parallel": 84, "post_local": 28, "swap": 28}
    assert plan.gradient_rounds == gradient_rounds.get(rule, 0)
    assert plan.schedule(14) == (0.5 if schedule == "power_of_two" else 0.4)


def leaves(tree: dict[str, Any]) -> set[str]:
    return {
        f"{key}.{leaf}" if leaf else key
        for key, value in tree.items()
        for leaf in (leaves(value) if isinstance(value, dict) else [""])
    }


def test_the_hash_covers_every_setting_that_is_not_execution() -> None:
    config = load_config([DEMO])
    left_out = leaves(to_dict(config)) - set(identity(config))
    assert {name.split(".")[0] for name in left_out} == {
        "checkpoint", "cluster", "compile", "cuda_graphs", "data", "ema", "evaluation",
        "experiment", "profile", "ranks_per_worker", "runs_dir", "speed", "stop_after_steps",
        "sync", "tracking",
    }  # fmt: skip
    assert {name for name in left_out if name.startswith(("data", "evaluation", "sync"))} == {
        "data.loader_threads",
        "data.prefetch_batches",
        "data.root",
        "evaluation.batch",
        "evaluation.every_epochs",
        # at the values of runs from before there were such settings
        "data.label_noise",
        "sync.delay_steps",
        "sync.h_max",
        "sync.outer_lr",
        "sync.outer_momentum",
        "sync.outer_nesterov",
        "sync.outer_rate_correction",
    }


def test_an_edit_of_a_file_counts_at_once(tmp_path: Path) -> None:
    """As in a notebook, whose process goes on."""
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    for epochs in (7, 8):
        file.write_text(
            f"# @package _global_\nepochs: {epochs}\nglobal_batch: 64\n"
            "sync: {h_base: 2, alpha: 0.1}\nschedule: {peak_lr: 0.1, warmup_steps: 0}\n"
        )
        config = load_config(["experiment=mine"], more=[tmp_path])
        assert (config.epochs, config.experiment) == (epochs, "mine")
        changed = load_config(["experiment=mine", "seed=2", "epochs=8"], more=[tmp_path])
        assert changed.experiment == ("mine" if epochs == 8 else "mine/epochs=8")
    (tmp_path / "model").mkdir()
    small_vit = "name: small_vit\ntimm_name: null\nchannels_last: false\n"
    (tmp_path / "model" / "wide.yaml").write_text(small_vit)
    assert load_config(["experiment=mine", "model=wide"], more=[tmp_path]).model.name == "small_vit"


FIELDS = "__pydantic_fields__"


def test_every_field_is_documented() -> None:
    for cls in vars(schema).values():
        if (
            isinstance(cls, type)
            and dataclasses.is_dataclass(cls)
            and cls.__module__ == schema.__name__
        ):
            assert cls.__doc__
            for name in (field.name for field in dataclasses.fields(cls)):
                owners = [base for base in cls.__mro__ if name in vars(base).get(FIELDS, {})]
                documented = any(vars(base)[FIELDS][name].description for base in owners)
                assert documented, f"{cls.__name__}.{name} has no docstring"
