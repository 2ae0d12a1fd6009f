"""The published experiments: their recipes, their headers, their rehearsals."""

import math
from typing import Any

import pytest

from qsr.config import schema
from qsr.config.load import CONFIG_DIR, differences, load_config, to_dict
from qsr.config.planning import make_plan, plan_to_follow
from qsr.core.plan import Plan
from qsr.data.prepare.digits import DIGITS
from qsr.errors import UnknownPlanError
from qsr.planner.forecast import forecast
from qsr.planner.solve import solve
from qsr.report.paper import ReferenceRow, read_reference

PUBLISHED = sorted(
    path.relative_to(CONFIG_DIR / "experiment").with_suffix("").as_posix()
    for path in (CONFIG_DIR / "experiment").rglob("*.yaml")
    if path.parent.name not in ("demo", "evidence")
)


REFERENCE = read_reference(CONFIG_DIR.parent / "results" / "paper" / "tables.csv")
NOT_KNOWN = ["vit_b16_b4096/adaptive_h16"]
"""Their rounds follow the loss."""
VIT = ["experiment=vit_b16_b4096/parallel"]


def plan_of(config: schema.Config) -> Plan:
    assert config.data.train_images is not None
    return make_plan(config, config.data.train_images)


def test_there_is_a_file_for_every_row() -> None:
    folders = {name.partition("/")[0] for name in PUBLISHED}
    assert folders == {
        *("resnet152_b4096", "vit_b16_b4096", "resnet152_b16384", "vit_b16_b16384"),
        *("vit_b16_linear", "resnet152_step", "vit_b16_step"),
        *("resnet50_b2048", "vit_s16_b1024"),
    }
    rows = {row.experiment for row in REFERENCE}
    assert rows < set(PUBLISHED)
    # rows of the tables, rules that the paper compares with, a control, rows of smaller networks
    assert len(PUBLISHED) == 29 + 15 + 1 + 4


# setting:    ResNet-152, ViT-B/16 local, ViT-B/16 data parallel, ResNet-50, ViT-S/16
RECIPE: dict[str, tuple[Any, Any, Any, Any, Any]] = {
    "epochs":              (200, 300, 300, 90, 90),
    "local_batch":         (256, 256, 256, 256, 128),
    # the data parallel ViT-B and the ViT-S: all images of a worker in one pass
    "micro_batch":         (32, 128, None, 32, None),
    "precision":           5 * ("fp16",),
    "cuda_graphs":         (False, False, False, True, False),
    "model.name":          ("resnet152", "vit_b16", "vit_b16", "resnet50", "vit_s16"),
    "optimizer.name":      ("sgd", "adamw", "adamw", "sgd", "adamw"),
    "optimizer.weight_decay": (1e-4, 0.05, 0.1, 1e-4, 0.1),
    "optimizer.clip_norm": (None, None, 1.0, None, 1.0),
    "schedule.final_lr":   5 * (1e-6,),
    "loss.label_smoothing": (0.1, 0.0, 0.0, 0.1, 0.0),
    "loss.mixup_alpha":    (0.0, 0.2, 0.2, 0.0, 0.2),
    "data.name":           5 * ("imagenet",),
    "data.image_size":     5 * (224,),
    "data.eval_crop_fraction": 5 * (224 / 256,),
    "data.augmentation.min_area": 5 * (0.08,),
    "data.augmentation.max_aspect": 5 * (4 / 3,),
    "data.augmentation.flip_probability": 5 * (0.5,),
    "data.augmentation.randaugment": ("none", "composer", "composer", "none", "composer"),
    "data.augmentation.randaugment_depth": (None, 2, 2, None, 2),
    "data.augmentation.randaugment_severity": (None, 10.0, 10.0, None, 10.0),
    "evaluation.batchnorm_micro_batches": 5 * (128,),
    "sync.average_momentum": 5 * (False,),
    "sync.average_second_moment": 5 * (False,),
    "sync.delay_steps": 5 * (0,),
    "ema.names":           5 * ((),),
}  # fmt: skip

#              workers, peak rate, warm-up steps, total steps, schedule
SETTINGS = {
    "resnet152_b4096": (16, 0.8, 1_560, 62_400, "cosine"),
    "resnet152_b16384": (64, 1.6, 390, 15_600, "cosine"),
    "resnet152_step": (16, 0.8, 1_560, 62_400, "power_of_two"),
    "vit_b16_b4096": (16, 0.008, 10_000, 93_600, "cosine"),
    "vit_b16_b16384": (64, 0.016, 2_500, 23_400, "cosine"),
    "vit_b16_linear": (16, 0.008, 10_000, 93_600, "linear"),
    "vit_b16_step": (16, 0.008, 10_000, 93_600, "power_of_two"),
    "resnet50_b2048": (8, 0.8, 3_125, 56_250, "cosine"),
    "vit_s16_b1024": (8, 0.001, 10_000, 112_590, "cosine"),
}


def column_of(folder: str, row: str) -> int:
    if folder in ("resnet50_b2048", "vit_s16_b1024"):
        return 3 + ("vit" in folder)
    return 0 if folder.startswith("resnet") else 2 if row == "parallel" else 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes(name: str) -> None:
    config = load_config([f"experiment={name}"])
    folder, _, row = name.partition("/")
    column = column_of(folder, row)
    for setting, values in RECIPE.items():
        value: Any = config
        for part in setting.split("."):
            value = getattr(value, part)
        assert value == pytest.approx(values[column]), setting
    rivals = {"quadratic_h4_capped": (312, 1.0, 0.0), "diloco_h10": (None, 0.7, 0.9)}
    sync = config.sync
    paper = (None, 1.0, 0.0)
    assert (sync.h_max, sync.outer_lr, sync.outer_momentum) == rivals.get(row, paper)
    assert config.data.train_images is not None
    schedule = plan_to_follow(config, config.data.train_images).schedule
    assert SETTINGS[folder] == (
        config.workers,
        config.schedule.peak_lr,
        schedule.warmup_steps,
        schedule.total_steps,
        config.schedule.name,
    )
    match config.optimizer:
        case schema.SgdConfig(momentum=momentum, nesterov=nesterov):
            assert (momentum, nesterov) == (0.9, False)
        case schema.AdamWConfig(beta1=beta1, beta2=beta2, eps=eps):
            assert (beta1, beta2, eps) == (0.9, 0.999, 1e-8)


@pytest.mark.parametrize("row", REFERENCE, ids=lambda row: row.experiment)
def test_published_volumes_to_the_printed_digit(row: ReferenceRow) -> None:
    plan = plan_of(load_config([f"experiment={row.experiment}"]))
    if row.volume_percent is not None:
        assert round(100 * plan.volume, 1) == row.volume_percent.value


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_header_gives_command_gpu_hours_and_volume(name: str) -> None:
    header = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text().partition("defaults:")[0]
    assert f"#   python scripts/train.py experiment={name} seed=1,2,3\n" in header
    if name in NOT_KNOWN:
        with pytest.raises(UnknownPlanError, match="are not known before the run"):
            forecast(load_config([f"experiment={name}"]))
        assert "hours and volume are not known before the run" in header
        return
    small = name.startswith(("resnet50_", "vit_s16_"))
    profile = "h100_2x8" if small else "paper_8x8" if "_b16384/" in name else "paper_2x8"
    found = forecast(load_config([f"experiment={name}", f"speed={profile}"]))
    assert found.planned.cost is not None
    assert found.model is not None
    hours = f"{found.planned.cost.gpu_hours:.0f} GPU hours a seed"
    if found.unverified(found.planned):
        hours += " (unverified)" if small else " (compute unverified)"
    assert f"# Predicted on {profile}: {hours}, volume {100 * found.plan.volume:.1f} %.\n" in header
    blocking = found.model.run(found.plan, overlapped=False).gpu_hours
    text = f"# {blocking:.0f} GPU hours if its gradients' all-reduces do not overlap, as in the"
    assert (text in header) == (found.plan.gradient_rounds > 0)


@pytest.mark.parametrize(
    ("name", "budget"),
    [("resnet50_b2048/quadratic_h4", "volume=20"), ("vit_s16_b1024/quadratic_h4", "volume=10")],
)
def test_an_untried_rule_is_the_recommended_one_for_its_budget(name: str, budget: str) -> None:
    config = load_config([f"experiment={name}"])
    sync = solve(config, budget).config.sync
    assert sync == config.sync
    header = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text().partition("defaults:")[0]
    assert f"# Untried: alpha is what scripts/plan.py solve recommends for {budget}." in header


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(
            (f"{folder}/parallel", f"{folder}/{row}")
            for folder, rows in {
                "resnet152_b4096": ("constant_h2", "constant_h4", "quadratic_h2", "quadratic_h4"),
                "resnet152_b16384": ("constant_h2", "constant_h4", "quadratic_h2", "quadratic_h4"),
                "resnet152_step": ("constant_h2", "quadratic_h2"),
                "resnet50_b2048": ("quadratic_h4",),
                "vit_s16_b1024": ("quadratic_h4",),
            }.items()
            for row in rows
        ),
        *(
            ("vit_b16_b4096/parallel_local_recipe", f"vit_b16_b4096/{row}")
            for row in ("constant_h4", "constant_h8", "quadratic_h4", "quadratic_h8")
        ),
    ],
)
def test_arms_that_differ_in_synchronization_only(one: str, other: str) -> None:
    """So that ResNet-152 needs no control such as ViT-B's parallel_local_recipe."""
    arms = [to_dict(load_config([f"experiment={name}"])) for name in (one, other)]
    rules = [arm.pop("sync")["rule"] for arm in arms]
    assert rules[0] == "every_step"
    assert rules[1] != "every_step"
    assert [arm.pop("experiment") for arm in arms] == [one, other]
    assert arms[0] == arms[1]


def test_vit_bs_arms_differ_in_the_recipe_too() -> None:
    names = ("vit_b16_b4096/parallel", "vit_b16_b4096/parallel_local_recipe")
    arms = [load_config([f"experiment={name}"]) for name in names]
    assert arms[0].sync == arms[1].sync
    settings = [(a.micro_batch, a.optimizer.weight_decay, a.optimizer.clip_norm) for a in arms]
    assert settings == [(None, 0.1, 1.0), (128, 0.05, None)]
    different = [line.partition(":")[0] for line in differences(*arms)]
    assert different == ["micro_batch", "optimizer.clip_norm", "optimizer.weight_decay"]


@pytest.mark.parametrize("row", REFERENCE, ids=lambda row: row.experiment)
def test_the_header_gives_the_published_values(row: ReferenceRow) -> None:
    header = (CONFIG_DIR / "experiment" / f"{row.experiment}.yaml").read_text()
    line = next(text for text in header.splitlines() if text.startswith("# Paper (our table "))
    for reference, text in (
        (row.top1, "top-1 {:.2f}"),
        (row.volume_percent, "volume {:g} %"),
        (row.total_hours, "{:.1f} h"),
    ):
        if reference is not None:
            tag = reference.tag if reference.verified else "R, unverified"
            assert f"{text.format(reference.value)} [{tag}]" in line


@pytest.mark.parametrize(
    ("name", "rival"),
    [
        ("vit_b16_b4096/quadratic_h4", "vit_b16_b4096/inverse_h4"),
        ("vit_b16_b4096/quadratic_h4", "vit_b16_b4096/cubic_h4"),
        ("vit_b16_b4096/quadratic_h4", "vit_b16_b4096/growing_h4"),
        ("resnet152_b4096/quadratic_h2", "resnet152_b4096/inverse_h2"),
        ("resnet152_b4096/quadratic_h2", "resnet152_b4096/cubic_h2"),
    ],
)
def test_rivals_communicate_as_much_as_qsr(name: str, rival: str) -> None:
    volumes = [plan_of(load_config([f"experiment={n}"])).volume for n in (name, rival)]
    assert volumes[0] == pytest.approx(volumes[1], abs=0.0005)


@pytest.mark.parametrize(
    "settings",
    [
        *([f"experiment={name}"] for name in PUBLISHED if name not in NOT_KNOWN),
        [*VIT, "sync=stagewise", "sync.h=4"],
        [*VIT, "sync=growing", "sync.h_base=4", "sync.growth=0.01"],
    ],
    ids=" ".join,
)
def test_a_rehearsal_has_the_volume_of_its_original(settings: list[str]) -> None:
    """But for what rounding to whole steps explains.

    With H(t) as a curve over the run, T steps hold T * integral(1/H) rounds in the limit. A round
    of H_s steps covers less of that integral than 1 by at most 1 - H_s / H_{s+1}, because H grows
    while it lasts, and so all rounds together by at most log(H_last / H_first); the rounds that
    are cut (at the end, where H jumps at the warm-up's end or a switch) add at most two.
    """
    original = plan_of(load_config(settings))
    small = plan_of(load_config([*settings, "rehearsal=digits"]))
    first = small.round_at(small.schedule.warmup_steps).length
    rounding = 2 + math.log(small.longest_round.length / first)
    assert abs(small.volume - original.volume) * small.total_steps <= rounding


def test_a_rehearsal_by_hand() -> None:
    config = load_config(["experiment=vit_b16_b16384/quadratic_h4", "rehearsal=digits", "seed=7"])
    assert config.experiment == "vit_b16_b16384/quadratic_h4/rehearsal=digits"
    assert (config.model.name, config.data.name, config.data.image_size) == (
        "small_vit", "digits", 16,
    )  # fmt: skip
    # 64 / 16 workers of 16 images; 256 / 128 micro-batches, as in the original
    assert (config.workers, config.global_batch, config.micro_batch) == (4, 64, 8)
    assert (config.cluster.ranks, config.precision, config.seed) == (2, "fp32", 7)
    # 1442 // 64 = 22 steps for each of 15 epochs; warm-up 2,500 of 23,400 steps: 35.3 of 330
    plan = plan_of(config)
    assert (plan.total_steps, plan.schedule.warmup_steps) == (330, 35)
    # a quarter of 0.016, of 0.0175 and of 1e-6
    schedule, sync = config.schedule, config.sync
    assert isinstance(schedule, schema.CosineConfig)
    assert isinstance(sync, schema.QuadraticSync)
    assert (schedule.peak_lr, schedule.final_lr) == (0.004, 2.5e-7)
    assert (sync.h_base, sync.alpha) == (4, 0.004375)
    # what rows differ in stays
    assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.05, None)
    assert config.loss.mixup_alpha == 0.2
    assert config.data.augmentation.randaugment_depth == 2
    assert (config.data.train_images, config.data.val_images) == (DIGITS.train, DIGITS.val)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("vit_b16_b4096/post_local_h4", "sync.switch_epoch", 9),  # 180 of 300
        ("vit_b16_b4096/swap", "sync.switch_epoch", 12),  # 240 of 300
        ("resnet152_b4096/swap", "sync.switch_epoch", 12),  # 160 of 200
        ("resnet152_b4096/modified_cosine_cubic_h2", "schedule.stop_epoch", 12),  # 160 of 200
        ("resnet152_b4096/cubic_h2", "sync.coefficient", 0.038),  # a quarter of 0.152
        ("vit_b16_linear/parallel", "optimizer.clip_norm", 1.0),
        ("resnet152_b4096/parallel", "micro_batch", 2),  # 8 micro-batches
    ],
)
def test_what_a_rehearsal_keeps(name: str, setting: str, value: float) -> None:
    config: Any = load_config([f"experiment={name}", "rehearsal=digits"])
    for part in setting.split("."):
        config = getattr(config, part)
    assert config == pytest.approx(value)


def test_a_rehearsal_averages_over_the_same_part_of_the_run() -> None:
    settings = ["experiment=vit_b16_b4096/quadratic_h4", "ema.decay=0.9999"]
    settings += ["ema.uniform_fraction=0.2", "rehearsal=digits"]
    config = load_config(settings)
    steps = plan_of(config).total_steps  # instead of 93,600
    assert config.ema.decay == pytest.approx(0.9999 ** (93_600 / steps), rel=1e-12)
    assert config.ema.uniform_fraction == 0.2
    shortest = load_config([*settings, "ema.decay=0.001"])
    assert shortest.ema.decay == 1e-9


def test_a_rehearsal_of_milestones() -> None:
    config = load_config(
        [
            *("experiment=resnet152_b4096/quadratic_h2", "rehearsal=digits"),
            *("schedule=step", "schedule.milestone_epochs=[40,120]"),
        ]
    )
    assert isinstance(config.schedule, schema.StepConfig)
    assert config.schedule.milestone_epochs == (3, 9)  # of 15 epochs instead of 200
