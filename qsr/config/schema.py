"""Every setting of a run, with its unit. load.py fills these from Hydra's YAML, strictly.

Where a setting has kinds (an optimizer, a schedule, a rule), one word names the kind and each kind
has only the fields that it uses: `sync.alpha` exists under `rule: quadratic` and nowhere else.
A field that is documented as "execution" changes how a run is carried out and not what it
computes; it may differ between a run and its resumption.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from qsr.config.own import load_own
from qsr.config.own_rules import own_rule
from qsr.core.adaptive import AdaptiveRule, ReplayRule, read_rounds
from qsr.core.outer import OuterOptions
from qsr.core.rules import (
    CappedRule,
    ConstantRule,
    EveryStepRule,
    GrowingRule,
    PostLocalRule,
    PowerRule,
    QuadraticRule,
    Rule,
    StagewiseRule,
    SwapRule,
)

STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

PositiveInt = Annotated[int, Field(ge=1)]
# more than any machine has; beyond, torch, DALI or the system fail without saying of what
ThreadCount = Annotated[int, Field(ge=1, le=4096)]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
# torch computes in float32, whose largest number is 3.4e38
Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Channels = tuple[Finite, Finite, Finite]
Compile = Literal["none", "default", "max_autotune"]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Which network to train, from scratch."""

    name: Literal[
        "resnet152", "resnet50", "vit_b16", "vit_s16", "timm", "small_resnet", "small_vit"
    ]
    """resnet152, resnet50: torchvision's. vit_b16: vit-pytorch 1.2.8's SimpleViT, the paper's;
    vit_s16: the same of half the width. timm: any timm model. small_resnet (BatchNorm) and
    small_vit (SimpleViT): for small images and CPUs."""
    timm_name: str | None
    """Name in timm's registry, for name=timm only."""
    channels_last: bool
    """Keep convolution weights and images in channels_last memory format."""

    @property
    def label(self) -> str:
        """Name of the network, for people."""
        return self.timm_name or self.name

    @property
    def speed_name(self) -> str:
        """Name of the network in a cluster's profile."""
        return self.name if self.timm_name is None else f"timm/{self.timm_name}"


@dataclass(frozen=True, config=STRICT)
class OwnPart:
    """A part of the run that you wrote."""

    target: str
    """MODULE:NAME of a function or class, found in the folder in which you start or among the
    installed packages; or FILE.py:NAME."""
    options: dict[str, Any]
    """Keyword arguments for it."""
    source: dict[str, str]
    """Hashes of its files, which qsr fills in: a run resumes with the same source only."""

    def __hash__(self) -> int:
        return hash((self.target, json.dumps(self.options), *self.source.items()))

    def load(self, group: str) -> Callable[..., Any]:
        """The function or class. `group`: where its settings are. Raises ConfigError."""
        return load_own(group, self.target, self.source)

    @property
    def label(self) -> str:
        """Target and options, for people."""
        return f"{self.target}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


@dataclass(frozen=True, config=STRICT)
class OwnModelConfig(OwnPart):
    """A network of your own: target(num_classes=, image_size=, **options) returns a module for
    images [b, 3, size, size] and logits [b, num_classes]."""

    name: Literal["custom"]
    """Kind of network."""
    channels_last: bool
    """Keep convolution weights and images in channels_last memory format."""

    __hash__ = OwnPart.__hash__

    @property
    def speed_name(self) -> str:
        """Name of the network in a cluster's profile."""
        options = hashlib.sha256(json.dumps(self.options).encode()).hexdigest()[:8]
        return f"custom/{self.target.replace(':', '.')}{f'-{options}' if self.options else ''}"


AnyModel = Annotated[ModelConfig | OwnModelConfig, Field(discriminator="name")]


@dataclass(frozen=True, config=STRICT)
class SgdConfig:
    """Stochastic gradient descent, torch.optim.SGD."""

    name: Literal["sgd"]
    """Kind of optimizer."""
    momentum: Fraction
    """Momentum coefficient, 0 for none."""
    nesterov: bool
    """Nesterov momentum."""
    weight_decay: NonNegative
    """L2 coefficient, on every parameter."""
    clip_norm: Positive | None
    """Largest global gradient norm; null: no clipping. Data parallel runs clip the averaged
    gradient, local ones each worker's own."""


@dataclass(frozen=True, config=STRICT)
class AdamWConfig:
    """AdamW, torch.optim.AdamW."""

    name: Literal["adamw"]
    """Kind of optimizer."""
    beta1: Annotated[float, Field(ge=0, lt=1)]
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)]
    """Decay of the second moment."""
    eps: Positive
    """Added to the root of the second moment."""
    weight_decay: NonNegative
    """Decoupled decay coefficient (times the learning rate), on every parameter."""
    clip_norm: Positive | None
    """Largest global gradient norm; null: no clipping. Data parallel runs clip the averaged
    gradient, local ones each worker's own."""


OptimizerConfig = Annotated[SgdConfig | AdamWConfig, Field(discriminator="name")]


@dataclass(frozen=True, config=STRICT)
class WarmupConfig:
    """What all schedules share: the peak and the linear warm-up to it. Give one warm-up unit."""

    peak_lr: Positive
    """Learning rate at the end of the warm-up."""
    final_lr: NonNegative
    """Learning rate where the warm-up starts, as in the released code; and at the end, for the
    schedules that decay to it (cosine, linear, power_of_two)."""
    warmup_steps: Annotated[int, Field(ge=0)] | None
    """Length of the warm-up in steps."""
    warmup_epochs: Annotated[int, Field(ge=0)] | None
    """Length of the warm-up in epochs."""


@dataclass(frozen=True, config=STRICT)
class CosineConfig(WarmupConfig):
    """Half a cosine from peak_lr to final_lr."""

    name: Literal["cosine"]
    """Kind of schedule."""
    stop_epoch: PositiveInt | None
    """Epoch from which the rate stays constant (the "modified cosine"); null: never."""


@dataclass(frozen=True, config=STRICT)
class LinearConfig(WarmupConfig):
    """Straight from peak_lr to final_lr."""

    name: Literal["linear"]
    """Kind of schedule."""


@dataclass(frozen=True, config=STRICT)
class PowerOfTwoConfig(WarmupConfig):
    """The cosine, rounded to powers of two after the warm-up: the paper's step schedule."""

    name: Literal["power_of_two"]
    """Kind of schedule."""


@dataclass(frozen=True, config=STRICT)
class StepConfig(WarmupConfig):
    """peak_lr times `factor` at every milestone passed."""

    name: Literal["step"]
    """Kind of schedule."""
    milestone_epochs: tuple[PositiveInt, ...]
    """Epochs at which the rate falls."""
    factor: Annotated[float, Field(gt=0, le=1)]
    """What the rate is multiplied with there."""


@dataclass(frozen=True, config=STRICT)
class ConstantConfig(WarmupConfig):
    """peak_lr throughout."""

    name: Literal["constant"]
    """Kind of schedule."""


@dataclass(frozen=True, config=STRICT)
class OwnScheduleConfig(OwnPart, WarmupConfig):
    """A schedule of your own: target(peak_lr=, final_lr=, warmup_steps=, total_steps=, **options)
    returns a function of the step with those two counts as attributes, as CosineSchedule is."""

    name: Literal["custom"]
    """Kind of schedule."""


ScheduleConfig = Annotated[
    CosineConfig
    | LinearConfig
    | PowerOfTwoConfig
    | StepConfig
    | ConstantConfig
    | OwnScheduleConfig,
    Field(discriminator="name"),
]


@dataclass(frozen=True, config=STRICT)
class RuleConfig:
    """A synchronization rule: its settings, and all that the rest of the program asks of it. Beside
    them, what is averaged at a round's end with the parameters, and when it counts.

    A new rule is a class in core/rules.py, and one here with a YAML file in configs/sync/.
    """

    average_momentum: bool
    """Also average SGD's momentum or AdamW's first moment (the paper does not)."""
    average_second_moment: bool
    """Also average AdamW's second moment (the paper does not)."""
    delay_steps: Annotated[int, Field(ge=0)]
    """Steps that the workers take while an average travels, before it is applied; 0: they wait
    (the paper's)."""
    h_max: PositiveInt | None
    """Most steps of a round, whatever the rule says; null: no limit (the paper's)."""
    outer_lr: Positive
    """Learning rate of the outer optimizer, which moves the average on; 1: not at all, without a
    momentum (the paper's)."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1)]
    """Momentum of the outer optimizer, as in DiLoCo; 0: none (the paper's)."""
    outer_nesterov: bool
    """Whether the outer momentum is Nesterov's."""
    outer_rate_correction: bool
    """Keep the outer momentum per unit of a round's summed learning rate, for an H that varies."""

    def rule_for(self, steps_per_epoch: int) -> Rule:
        """The rule of a plan."""
        rule = self.make_rule(steps_per_epoch)
        return rule if self.h_max is None else CappedRule(rule, self.h_max)

    @property
    def outer(self) -> OuterOptions:
        """The outer optimizer."""
        return OuterOptions(
            self.outer_lr, self.outer_momentum, self.outer_nesterov, self.outer_rate_correction
        )

    @property
    def label(self) -> str:
        """The rule in words, for tables and legends."""
        words = [self.rule_label]
        if self.h_max is not None:
            words.append(f"H <= {self.h_max}")
        if self.outer_lr != 1:
            words.append(f"outer lr {self.outer_lr:g}")
        if self.outer_momentum:
            kind = "Nesterov" if self.outer_nesterov else "momentum"
            corrected = ", corrected" * self.outer_rate_correction
            words.append(f"outer {kind} {self.outer_momentum:g}{corrected}")
        return ", ".join(words)

    def make_rule(self, steps_per_epoch: int) -> Rule:
        """The rule without h_max."""
        raise NotImplementedError

    @property
    def rule_label(self) -> str:
        """The rule in words, without what holds for all rules."""
        raise NotImplementedError

    @property
    def smallest_h(self) -> int | None:
        """The smallest H of rounds that end in an average of parameters and are followed by others;
        None: there are no such rounds, or the rule is not one of ours."""
        raise NotImplementedError

    def rehearsed(self, *, lr: float, epochs: float, steps: float) -> Self:
        """The rule of a smaller run of the same shape and volume. The arguments are its learning
        rates, its epochs and its steps, relative to those of this run."""
        return self


@dataclass(frozen=True, config=STRICT)
class EveryStepSync(RuleConfig):
    """Average in every step."""

    rule: Literal["every_step"]
    """Kind of rule."""
    average: Literal["gradients", "parameters"]
    """gradients: data parallel training. parameters: the local method with H = 1."""

    def make_rule(self, steps_per_epoch: int) -> Rule:
        return EveryStepRule(self.average)

    @property
    def rule_label(self) -> str:
        return "data parallel" if self.average == "gradients" else "local, H = 1"

    @property
    def smallest_h(self) -> int:
        return 1


@dataclass(frozen=True, config=STRICT)
class ConstantSync(RuleConfig):
    """The same H in every round."""

    rule: Literal["constant"]
    """Kind of rule."""
    h: PositiveInt
    """Local steps per round."""

    def make_rule(self, steps_per_epoch: int) -> Rule:
        return ConstantRule(self.h)

    @property
    def rule_label(self) -> str:
        return f"constant H = {self.h}"

    @property
    def smallest_h(self) -> int:
        return self.h


@dataclass(frozen=True, config=STRICT)
class QuadraticSync(RuleConfig):
    """QSR: H = max(h_base, floor((alpha / lr)^2))."""

    rule: Literal["quadratic"]
    """Kind of rule."""
    h_base: PositiveInt
    """Smallest H, in steps."""
    alpha: Positive
    """Growth coefficient, in the unit of the learning rate."""

    def make_rule(self, steps_per_epoch: int) -> Rule:
        return QuadraticRule(self.h_base, self.alpha)

    @property
    def rule_label(self) -> str:
        return f"QSR, H_base = {self.h_base}, alpha = {self.alpha:g}"

    @property
    def smallest_h(self) -> int:
        return self.h_base

    def rehearsed(self, *, lr: float, epochs: float, steps: float) -> Self:
        return replace(self, alpha=self.alpha * lr)


@dataclass(frozen=True, config=STRICT)
class PowerSync(RuleConfig):
    """H = max(h_base, floor((coefficient / lr)^exponent))."""

    rule: Literal["power"]
    """Kind of rule."""
    h_base: PositiveInt
    """Smallest H, in steps."""
    coefficient: Positive
    """Growth coefficient, in the unit of the learning rate."""
    exponent: Positive
    """1: H ~ 1/lr. 3: the cubic rule."""

    def make_rule(self, steps_per_epoch: int) -> Rule:
        return PowerRule(self.h_base, self.coefficient, self.exponent)

    @property
    def rule_label(self) -> str:
        return f"H_base = {self.h_base}, ({self.coefficient:g}/lr)^{self.exponent:g}"

    @property
    def smallest_h(self) -> int:
        return self.h_base

    def rehearsed(self, *, lr: float, epochs: float, steps: float) -> Self:
        return replace(self, coefficient=self.coefficient * lr)


@dataclass(frozen=True, config=STRICT)
class StagewiseSync(RuleConfig):
    """H doubles whenever the learning rate has halved."""

    rule: Literal["stagewise"]
    """Kind of rule."""
    h: PositiveInt
    """Local steps per round at the first rate."""

    def make_rule(self, steps_per_epoch: int) -> Rule:
        return StagewiseRule(self.h)

    @property
    def rule_label(self) -> str:
        return f"stagewise doubling from H = {self.h}"

    @property
    def smallest_h(self) -> int:
        return self.h


@dataclass(frozen=True, config=STRICT)
class GrowingSync(RuleConfig):
    """H = h_base + floor(growth * round)."""

    rule: Literal["growing"]
    """Kind of rule."""
    h_base: PositiveInt
    """H of the first round, in steps."""
    growth: Positive
    """Steps that each round is longer than the one before."""

    def make_rule(self, steps_per_epoch: int) -> Rule:
        return GrowingRule(self.h_base, self.growth)

    @property
    def rule_label(self) -> str:
        return f"H = {self.h_base} + {self.growth:g} x round"

    @property
    def smallest_h(self) -> int:
        return self.h_base

    def rehearsed(self, *, lr: float, epochs: float, steps: float) -> Self:
        return replace(self, growth=self.growth / steps)  # as many fewer rounds


@dataclass(frozen=True, config=STRICT)
class PostLocalSync(RuleConfig):
    """Data parallel until switch_epoch, constant H after it."""

    rule: Literal["post_local"]
    """Kind of rule."""
    switch_epoch: Annotated[int, Field(ge=0)]
    """First epoch of local training."""
    h: PositiveInt
    """Local steps per round after it."""

    def make_rule(self, steps_per_epoch: int) -> Rule:
        return PostLocalRule(self.switch_epoch * steps_per_epoch, self.h)

    @property
    def rule_label(self) -> str:
        return f"post-local from epoch {self.switch_epoch}, H = {self.h}"

    @property
    def smallest_h(self) -> int:
        return self.h

    def rehearsed(self, *, lr: float, epochs: float, steps: float) -> Self:
        return replace(self, switch_epoch=round(self.switch_epoch * epochs))


@dataclass(frozen=True, config=STRICT)
class SwapSync(RuleConfig):
    """Data parallel until switch_epoch, alone after it, one average at the end."""

    rule: Literal["swap"]
    """Kind of rule."""
    switch_epoch: Annotated[int, Field(ge=0)]
    """First epoch of local training."""

    def make_rule(self, steps_per_epoch: int) -> Rule:
        return SwapRule(self.switch_epoch * steps_per_epoch)

    @property
    def rule_label(self) -> str:
        return f"SWAP from epoch {self.switch_epoch}"

    @property
    def smallest_h(self) -> None:
        return None

    def rehearsed(self, *, lr: float, epochs: float, steps: float) -> Self:
        return replace(self, switch_epoch=round(self.switch_epoch * epochs))


@dataclass(frozen=True, config=STRICT)
class AdaptiveSync(RuleConfig):
    """AdaComm: H falls with the training loss. Its rounds are not known before the run."""

    rule: Literal["adaptive"]
    """Kind of rule."""
    h: PositiveInt
    """Local steps of the first round."""

    def make_rule(self, steps_per_epoch: int) -> Rule:
        return AdaptiveRule(self.h)

    @property
    def rule_label(self) -> str:
        return f"adaptive from H = {self.h}"

    @property
    def smallest_h(self) -> int:
        return 1


@dataclass(frozen=True, config=STRICT)
class ReplaySync(RuleConfig):
    """Rounds from a file: those of an adaptive run, or any others."""

    rule: Literal["replay"]
    """Kind of rule."""
    file: str
    """The folder of an adaptive run, or a text file with the H of every round; 100x4 stands for a
    hundred rounds of 4 steps."""
    rounds: str
    """The rounds in it, which qsr fills in: a run resumes with the same rounds only."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """H of every round."""
        return read_rounds(self.rounds)

    def make_rule(self, steps_per_epoch: int) -> Rule:
        return ReplayRule(self.lengths)

    @property
    def rule_label(self) -> str:
        return f"rounds of {self.file}"

    @property
    def smallest_h(self) -> int:
        return min(self.lengths)


@dataclass(frozen=True, config=STRICT)
class OwnSync(OwnPart, RuleConfig):
    """A rule of your own: target(**options) returns a qsr.Rule. A rehearsal does not scale its
    options."""

    rule: Literal["custom"]
    """Kind of rule."""

    def make_rule(self, steps_per_epoch: int) -> Rule:
        return own_rule(self.target, self.load("sync"), self.options)

    label = RuleConfig.label

    @property
    def rule_label(self) -> str:
        return super().label

    @property
    def smallest_h(self) -> None:
        return None


SyncConfig = Annotated[
    EveryStepSync
    | ConstantSync
    | QuadraticSync
    | PowerSync
    | StagewiseSync
    | GrowingSync
    | PostLocalSync
    | SwapSync
    | AdaptiveSync
    | ReplaySync
    | OwnSync,
    Field(discriminator="rule"),
]


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """Cross entropy and its regularization."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    """Probability mass spread evenly over the classes."""
    mixup_alpha: NonNegative
    """Beta(a, a) parameter of mixup, one coefficient per micro-batch; 0: no mixup."""


@dataclass(frozen=True, config=STRICT)
class AugmentationConfig:
    """Training augmentation: random resized crop, flip, RandAugment, in this order."""

    min_area: Annotated[float, Field(gt=0, le=1)]
    """Smallest crop, as a fraction of the image's area."""
    max_area: Annotated[float, Field(gt=0, le=1)]
    """Largest crop, as a fraction of the image's area."""
    min_aspect: Positive
    """Smallest width / height of a crop."""
    max_aspect: Positive
    """Largest width / height of a crop."""
    flip_probability: Fraction
    """Probability of a horizontal flip."""
    randaugment: Literal["none", "composer", "torchvision", "timm"]
    """Whose RandAugment: they differ in their operations, in how strong "9" is, and in the corners.
    composer: the paper's, of version 0.15.1. torchvision: transforms.v2.RandAugment. timm:
    "rand-m{severity}-n{depth}-mstd0.5-inc1"."""
    randaugment_depth: PositiveInt | None
    """Operations per image; null without RandAugment. The paper: 2."""
    randaugment_severity: NonNegative | None
    """Strength in that library's unit; null without RandAugment. composer: 0 to 10 (the paper: 10),
    each operation draws uniformly up to it. torchvision: 0 to 30, a whole number. timm: 0 to 10."""


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """An ImageFolder tree (train/CLASS/*, val/CLASS/*) and how it is read."""

    name: str
    """Name of the data set, for tables."""
    root: str
    """Folder that holds train/ and val/. Execution."""
    classes: PositiveInt | None
    """Number of classes; null: whatever the folder holds."""
    train_images: PositiveInt | None
    """Number of training images; null: whatever the folder holds."""
    val_images: PositiveInt | None
    """Number of validation images; null: whatever the folder holds."""
    image_size: PositiveInt
    """Side of the square image that the model sees, in pixels."""
    eval_crop_fraction: Annotated[float, Field(gt=0, le=1)]
    """Validation: centre crop of image_size from an image whose short side is
    image_size / eval_crop_fraction pixels."""
    mean: Channels
    """Mean of the channels, on the scale 0-1."""
    std: Channels
    """Standard deviation of the channels, on the scale 0-1."""
    augmentation: AugmentationConfig
    """Random changes of the training images."""
    label_noise: Fraction
    """Share of the training images that get another class as label, drawn from the seed."""
    loader: Literal["auto", "dali", "torchvision", "memory"]
    """auto: DALI where it is installed, torchvision elsewhere. memory: all images are read once, by
    torchvision's, and stay in the device's memory; for small images without augmentation."""
    decode: Literal["auto", "cpu", "gpu"]
    """Where DALI decodes JPEGs; auto: on the GPU where the run has one."""
    loader_threads: Annotated[int, Field(ge=0, le=4096)] | None
    """Threads per rank that decode and transform; null: one less than the cores that the rank has,
    at most 32. Execution."""
    prefetch_batches: Annotated[int, Field(ge=1, le=1024)] | None
    """Batches prepared ahead, which take memory (on a GPU the GPU's); null: 2, or more if
    batches are so small that threads would lack work. Execution."""


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """Validation during and after the run."""

    every_epochs: PositiveInt
    """Epochs between evaluations; the last step is always evaluated. Execution: training is the
    same, bit for bit, with any evaluations."""
    batch: BatchSize
    """Images per rank and forward pass. Execution."""
    batchnorm_micro_batches: PositiveInt
    """Training micro-batches, over all workers, from which the BatchNorm statistics of the
    averaged model are estimated before each evaluation."""


@dataclass(frozen=True, config=STRICT)
class EmaConfig:
    """Averages of the workers' mean over time, evaluated and saved beside it. Training is the same,
    bit for bit, with any of them; each takes the memory of one model per rank."""

    decay: Annotated[float, Field(gt=0, lt=1)] | None
    """Exponential moving average: the share of the old average that a step keeps, so that a round
    of H steps keeps decay^H; null: none."""
    uniform_fraction: Annotated[float, Field(gt=0, le=1)] | None
    """Uniform average of the models of this last part of the run's steps, as in 0.25; null: none.
    After a round of H steps the model counts H times."""

    @property
    def names(self) -> tuple[str, ...]:
        """The averages that are made, of ema and uniform."""
        made = {"ema": self.decay, "uniform": self.uniform_fraction}
        return tuple(name for name, value in made.items() if value is not None)


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """Checkpoints to resume from. Execution."""

    every_steps: PositiveInt | None
    """Steps between checkpoints; null: only at the end."""
    keep: PositiveInt
    """Newest checkpoints that stay on disk."""
    stop_signals: tuple[Literal["SIGTERM", "SIGUSR1", "SIGUSR2"], ...]
    """Signals on which all ranks save after the same step and leave, as always on SIGHUP."""


@dataclass(frozen=True, config=STRICT)
class AllReduceTimes:
    """Measured all-reduces."""

    ranks: PositiveInt
    """Ranks that took part."""
    sizes_bytes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """What was reduced, in rising order."""
    seconds: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Time of each."""


@dataclass(frozen=True, config=STRICT)
class DataParallelSteps:
    """Measured steps of data parallel training, for all that a step of it is made of."""

    ranks: PositiveInt
    """Ranks that took part, all of the profile's."""
    images: PositiveInt
    """Of a rank in a step."""
    micro_batches: PositiveInt
    """Backward passes of a rank in a step."""
    blocking_seconds: Positive
    """Of a step whose all-reduce follows the backward pass."""
    overlapped_seconds: Positive | None
    """Of a step whose all-reduces overlap with it; null where a rank holds several workers."""
    bucket_mib: Positive
    """Size of the buckets of that one."""


@dataclass(frozen=True, config=STRICT)
class FittedRun:
    """A published run whose time a profile was fitted to, so that it cannot be predicted by it."""

    model: str
    """Key of seconds_per_image."""
    ranks: PositiveInt
    """Ranks of the run, each one worker."""
    global_batch: PositiveInt
    """Samples per step over all workers."""
    steps: PositiveInt
    """Steps of the run."""
    averages: PositiveInt
    """All-reduces of the run, none of them overlapped."""
    hours: Positive
    """Published time."""


@dataclass(frozen=True, config=STRICT)
class SpeedConfig:
    """How fast machines are, for plans. Measured by qsr plan calibrate, or fitted."""

    name: str
    """Name of the profile, for records."""
    machines: PositiveInt
    """Machines that it is about."""
    ranks_per_machine: PositiveInt
    """Ranks, one per GPU, of each machine; they share its link."""
    link_gbit_per_second: Positive | None
    """Effective bandwidth of a machine's link per direction, in 10^9 bits per second; with one
    machine, that between its ranks. null: unknown, which will do for one rank."""
    latency_seconds: NonNegative
    """Time of one message without its bytes."""
    allreduce: AllReduceTimes | None
    """Measured all-reduces, which come before link and latency where as many ranks take part."""
    seconds_per_image: dict[str, Positive]
    """Training time of one image on one rank while all ranks compute: forward, backward, update.
    By "MODEL@IMAGE_SIZE/PRECISION", as in "vit_b16@224/fp16"; timm's models are "timm/NAME@...".
    Compiled steps have keys of their own, as in "vit_b16@224/fp16/compile=default".
    """
    data_parallel: dict[str, DataParallelSteps]
    """Measured data parallel steps, by the keys of seconds_per_image. They tell how long ranks wait
    for each other, and come before the formula for steps that overlap, in runs whose steps are of
    the same images on as many ranks."""
    price_per_gpu_hour: Positive | None
    """Price of an hour of one rank, in any currency."""
    fitted_to: tuple[FittedRun, ...]
    """Published runs that constants were fitted to."""
    sources: dict[str, str]
    """Where each constant comes from, by its name or its key of seconds_per_image. A text that
    begins with "unverified" marks every number that the constant enters."""
    inside_gbit_per_second: Positive | None = None
    """Effective bandwidth between the ranks of one machine, of each rank per direction, for workers
    of several ranks; null: unknown, or that of the link if there is one machine."""


@dataclass(frozen=True, config=STRICT)
class ClusterConfig:
    """Where a run is carried out. Execution: K workers are the same run on any of these."""

    name: str
    """Name of the cluster, for records."""
    ranks: PositiveInt | None
    """Processes. Must divide the workers: each rank holds workers / ranks of them. null: as many
    as the launcher started; without a launcher one per worker, or per GPU."""
    device: Literal["auto", "cpu", "cuda"]
    """auto: CUDA where there is a GPU."""
    threads_per_rank: ThreadCount | None
    """CPU threads for torch in each rank; null: the cores of the machine over its ranks."""
    timeout_seconds: Annotated[float, Field(gt=0, le=604_800)]
    """How long a collective waits for the other ranks before the run fails."""
    overlap_gradients: bool
    """Whether averages of gradients are hidden behind the backward pass (torch's DDP), in data
    parallel steps and within workers of several ranks; not where a rank holds several workers.
    false: they block after it, as in the paper."""
    bucket_mib: Annotated[float, Field(gt=0, le=65_536)]
    """Size of the buckets of gradients that are all-reduced while the backward pass goes on, in MiB
    (25 is torch's)."""


@dataclass(frozen=True, config=STRICT)
class LocalCluster(ClusterConfig):
    """Processes on this machine, or those that torchrun or srun has started."""

    launcher: Literal["local"]
    """Kind of cluster."""


@dataclass(frozen=True, config=STRICT)
class SlurmCluster(ClusterConfig):
    """A Slurm cluster, for qsr submit: a job for a run, a job array for several."""

    launcher: Literal["slurm"]
    """Kind of cluster."""
    nodes: PositiveInt
    """Machines of a job."""
    gpus_per_node: Annotated[int, Field(ge=0)]
    """GPUs that the job asks for on each node; 0: none, or asked for in `sbatch`."""
    ranks_per_node: PositiveInt | None
    """Ranks on each node; null: one per GPU."""
    cpus_per_task: PositiveInt | None
    """CPU cores of each rank, for its threads and its loader; null: the partition's default."""
    memory_gb: PositiveInt | None
    """Memory of the job on each node, in GB; null: the partition's default."""
    time_limit_minutes: PositiveInt
    """After so long Slurm ends the job; it is requeued before, if it may be."""
    partition: str | None
    """Where to queue; null: the cluster's default."""
    account: str | None
    """Who is charged; null: the user's default."""
    qos: str | None
    """Quality of service; null: the default."""
    constraint: str | None
    """Features that the nodes must have."""
    reservation: str | None
    """Reservation to run in."""
    sbatch: dict[str, str | int | bool]
    """Any other options of sbatch by their long names, as in {exclusive: true, mail-type: END}."""
    requeue: bool
    """Whether the job may go back into the queue: when it was told to stop, when a node died."""
    signal: Literal["SIGUSR1", "SIGUSR2", "SIGTERM"]
    """What Slurm sends to every rank before the time limit, and in one of its two ways to preempt.
    Must be one that runs listen to."""
    signal_lead_seconds: Annotated[int, Field(ge=1, le=65_535)]
    """How long before the time limit. A checkpoint must be written within it; Slurm may send the
    signal up to 60 seconds early."""
    setup: tuple[str, ...]
    """Lines of the batch script before the ranks start: modules, conda, exports."""
    python: str | None
    """The ranks' Python; null: the one that submits. In a container, the container's."""
    container: str | None
    """Words before `python`, as in "apptainer exec --nv image.sif"."""
    srun_arguments: tuple[str, ...]
    """More arguments for srun, as in --cpu-bind=cores."""
    network_interface: str | None
    """Interface between the nodes, for NCCL and gloo, as in ib0; null: they choose."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str | int]
    """More environment variables for the ranks, as NCCL's."""
    parallel: PositiveInt | None = None
    """Most runs of a job array that run at once; null: no limit."""

    @property
    def tasks_per_node(self) -> int:
        """Ranks on each node; 0 if neither they nor GPUs are given."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def job_ranks(self) -> int:
        """Ranks of a job."""
        return self.nodes * self.tasks_per_node


AnyCluster = Annotated[LocalCluster | SlurmCluster, Field(discriminator="launcher")]


@dataclass(frozen=True, config=STRICT)
class TrackingConfig:
    """What is reported while training. metrics.jsonl is always written. Execution."""

    wandb: Literal["none", "offline", "online"]
    """Mirror the metrics to Weights & Biases."""
    wandb_project: str
    """Project name there."""
    wandb_entity: str | None
    """Team or user there; null: wandb's default."""
    tensorboard: bool
    """Write them for TensorBoard too, to tensorboard/ in the run folder."""
    log_every_steps: PositiveInt
    """Steps between rows of training metrics. Only then does the host wait for the device."""
    progress: bool
    """Show progress on the terminal."""


@dataclass(frozen=True, config=STRICT)
class ProfileConfig:
    """A trace of what the host and the device do, for Perfetto. Execution."""

    steps: tuple[PositiveInt, PositiveInt] | None
    """First and last step to record, counted from 1, as in [10, 15]; each rank writes them to
    profile/ in the run folder. null: none."""


@dataclass(frozen=True, config=STRICT)
class Config:
    """One run."""

    experiment: str
    """Name of the experiment file, with the overrides that change what it computes; the run's
    folder is RUNS_DIR/EXPERIMENT/seed_SEED."""
    seed: Annotated[int, Field(ge=0)]
    """Root of every random choice."""
    workers: PositiveInt
    """K: the replicas that train alone during a round."""
    ranks_per_worker: PositiveInt
    """Processes that make one worker: they train data parallel among themselves in every step, as
    the GPUs of a machine. 1: a worker is one process, or shares it with others (cluster.ranks)."""
    epochs: PositiveInt
    """Passes over the training set; an epoch has floor(train_images / global_batch) steps."""
    global_batch: PositiveInt
    """Samples per step over all workers."""
    micro_batch: PositiveInt | None
    """Samples that go through the model at once (what BatchNorm sees); null: all that a worker, or
    each of its ranks, has in a step."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Autocast type of the forward pass. Parameters and averages stay fp32. fp16 scales the loss
    dynamically, on each worker by itself."""
    fp16_overflow: Literal["repeat", "skip"]
    """What follows when fp16 gradients overflow. repeat: the worker goes through its batch again at
    half the loss scale, as the paper's code does, while the right scale is being looked for; later,
    and with skip: the worker skips the update."""
    compile: Compile
    """torch.compile of the network's training passes: minutes before the first step, faster steps,
    other last bits. max_autotune: also choose kernels by measuring them; a resumed run has the same
    bits as long as the cache ($TORCHINDUCTOR_CACHE_DIR, else ~/.cache/qsr/inductor) is kept."""
    cuda_graphs: bool
    """Whether a micro-batch's pass is captured on the GPU and launched at once, which helps where
    the host cannot launch kernels as fast as the GPU runs them, as with small micro-batches."""
    model: AnyModel
    """The network."""
    optimizer: OptimizerConfig
    """The optimizer of every worker."""
    schedule: ScheduleConfig
    """Learning rate over the steps."""
    sync: SyncConfig
    """When workers average, and what."""
    loss: LossConfig
    """The training loss."""
    data: DataConfig
    """Images."""
    ema: EmaConfig
    """Averages of the model over time."""
    evaluation: EvaluationConfig
    """Validation."""
    checkpoint: CheckpointConfig
    """Checkpoints."""
    cluster: AnyCluster
    """Processes and devices."""
    tracking: TrackingConfig
    """Logs."""
    speed: SpeedConfig | None
    """How fast the machines are, for plans; null: not known. Execution."""
    profile: ProfileConfig
    """A trace of some steps."""
    runs_dir: str
    """Folder of all run folders. Execution."""
    stop_after_steps: PositiveInt | None
    """End the session after this step of the plan, with a checkpoint; the same command without it
    goes on. null: run to the end. Execution."""

    @property
    def local_batch(self) -> int:
        """Samples per worker and step."""
        return self.global_batch // self.workers

    @property
    def shards(self) -> int:
        """Parts of a step's samples, each for one copy of the model: one for each worker or, if
        several ranks make one worker, one for each rank."""
        return self.workers * self.ranks_per_worker

    @property
    def shard_size(self) -> int:
        """Samples per shard and step."""
        return self.global_batch // self.shards

    @property
    def micro_batch_size(self) -> int:
        """Samples that go through the model at once."""
        return self.micro_batch or self.shard_size
