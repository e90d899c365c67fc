"""The run configuration: its sections and keys, with their ranges and defaults.

A field is documented once, here, beside its definition; docs/config.md is made from it. `trainer.config.file`
reads a config from YAML and the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from trainer.config.base import (
    MOST_SEQUENCES,
    Line,
    Minutes,
    ModelFields,
    Name,
    PositiveFloat,
    PositiveInt,
    Ratio,
    Section,
    Sequences,
    count_or_auto,
)
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.data import DataConfig
from trainer.config.evaluation import EvalConfig
from trainer.config.layers import LayersFromConfig
from trainer.config.objective import ObjectiveConfig
from trainer.config.optimizer import OptimizerConfig
from trainer.config.schedule import ScheduleConfig
from trainer.runtime.paths import user_path


class RunConfig(Section):
    name: Name = "run"
    """Shown in the first line and in the model card."""
    dir: Line
    """The run folder: checkpoints, metrics, logs. Also what `--resume auto` looks into."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the weights, the data order, the masks and the dropout."""


CUDA_GRAPHS = "reduce-overhead"  # torch.compile's name of the mode
AUTOTUNE = "max-autotune"


def _compile_mode(value: Any) -> Any:
    if not isinstance(value, bool) and value not in (CUDA_GRAPHS, AUTOTUNE):
        raise PydanticCustomError("compile_mode", f"Input should be true, false, {CUDA_GRAPHS} or {AUTOTUNE}")
    return value


class ModelConfig(Section):
    preset: Line | None = None
    """A named architecture, initialised at random: roberta-base, roberta-large, bert-base, albert-base, distilbert,
    modernbert-base, nezha-base; gpt2 and gpt2-small-char with objective.name clm; xlnet-base with plm; electra-small,
    electra-base and deberta-v3-base, which rtd trains, and mlm as well."""
    config: Line | None = None
    """A Hugging Face config.json (or its folder), initialised at random."""
    from_pretrained: Line | None = None
    """A Hugging Face checkpoint folder or hub name whose weights training continues from. Where its config names no
    model type, or one that the weights are not of, their names decide."""
    tokenizer: Line | None = None
    """Tokenizer folder. Default: the one inside `from_pretrained`, which also takes the place of a recipe's."""
    layers_from: LayersFromConfig | None = None
    """With preset or config: begin with some layers of a trained model, as DistilBERT does, and not at random."""
    overrides: ModelFields = Field(default_factory=dict)
    """Fields of the Hugging Face config to change, such as hidden_size."""
    code: bool = False
    """Run the code that lies in the folder of `config` or `from_pretrained`, of which the `auto_map` of its config.json
    names the classes: a model that transformers has no class for. Set it for code that you trust. It belongs to a run:
    checkpoints hold the code, and a resume cannot change it."""
    document_attention: bool = False
    """Keep attention within documents, and restart positions at each (RoBERTa, XLM-RoBERTa, CamemBERT, BERT, ERNIE,
    ELECTRA, DistilBERT, ModernBERT, NEZHA). Off: packed blocks attend across documents, as in RoBERTa's
    FULL-SENTENCES. On NVIDIA GPUs in bf16 or fp16, without attention dropout, by variable-length flash attention, else
    by a block mask. It belongs to a run: a resume cannot change it."""
    attention_backend: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """Which kernel of torch's scaled_dot_product_attention to use, where it can; layers with a mask take another one.
    auto: on a GPU the fastest for blocks of seq_len, measured at the first start and remembered in the run folder; on
    CPU torch's own choice."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What computes the cross-entropy in training: torch, or DeepSpeed's kernel in Triton, which reads the logits once
    a pass and keeps no copy of them in fp32. auto: on a GPU Triton, if it agrees with torch there, which each start
    tries; else torch."""
    compile: Annotated[bool | Literal["reduce-overhead", "max-autotune"], BeforeValidator(_compile_mode)] = False
    """torch.compile the model, with static shapes, at ZeRO 0 to 2; max-autotune: each matrix product by the fastest of
    several kernels, which are timed at the first step, for minutes; reduce-overhead: with CUDA graphs, which launch a
    small model's kernels faster; for batches without accumulation, with a number for batch.micro_size and no
    offload."""
    frozen: list[Line] = Field(default_factory=list)
    """Weights that are kept as they are: patterns on their names, as of a shell, such as "bert.encoder.*". They have no
    gradients and no optimizer state, and lie in fp32 in each checkpoint, whatever the precision. A resume may change
    them: what begins to train starts with fresh moments."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""

    @model_validator(mode="after")
    def one_source(self) -> Self:
        given = [name for name in ("preset", "config", "from_pretrained") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of preset, config, from_pretrained; got {' and '.join(given) if given else 'none'}"
            )
        if self.layers_from is not None and self.from_pretrained is not None:
            raise ValueError("has both from_pretrained and layers_from, which is for a preset or config: leave one out")
        if self.tokenizer is None and self.from_pretrained is None:
            raise ValueError("tokenizer is needed: the folder that `maskwright tokenizer train` wrote")
        if self.code and self.preset is not None:
            raise ValueError("code does nothing with preset: it is for a folder given as config or from_pretrained")
        return self


class WarmupConfig(Section):
    start_size: Sequences
    """Sequences of the first steps. It and the increment must divide by micro_size × ranks."""
    increment: Sequences | None = None
    """Sequences by which the batch grows, each size for an equal share of the tokens. Default: start_size."""
    tokens: PositiveInt
    """When the batch has grown to its global_size, counted as `tokens` in the metrics."""


class BatchConfig(Section):
    global_size: Sequences = 256
    """Sequences an optimizer step, over all ranks."""
    micro_size: Annotated[int | Literal["auto"], count_or_auto(MOST_SEQUENCES)] = 8
    """Sequences a rank in one forward pass. Accumulation is global_size / (micro_size × ranks) and must divide. auto
    takes the largest that fits into `memory_gib`, at the first start, and remembers it in the run folder; data order
    and masks do not depend on it, dropout does."""
    memory_gib: PositiveFloat | None = None
    """With micro_size: auto, the memory that a rank's tensors may take. Default: 90 % of what is free on its GPU; on
    CPU, half of what is available on the machine, divided among its ranks."""
    warmup: WarmupConfig | None = None
    """Begin with smaller batches. Sizes depend on the tokens consumed, not on ranks. Default: global_size from the
    first step on."""

    @model_validator(mode="after")
    def warmup_fits(self) -> Self:
        if self.warmup is None:
            return self
        start, increment = self.warmup.start_size, self.warmup.increment or self.warmup.start_size
        if start >= self.global_size:
            raise ValueError(f"warmup.start_size must be below global_size {self.global_size}, got {start}")
        if (self.global_size - start) % increment:
            raise ValueError(
                f"warmup does not lead from start_size {start} to global_size {self.global_size} in steps of "
                f"{increment} (warmup.increment; default: start_size)"
            )
        return self


class ProfileConfig(Section):
    start: PositiveInt
    """First step that is profiled; the first steps of a start are slower than the others."""
    steps: PositiveInt = 3
    """How many steps. A trace has some MB a step."""
    all_ranks: bool = False
    """A trace of each rank; else of rank 0 alone."""


class TrainConfig(Section):
    steps: PositiveInt | None = None
    """Length in optimizer steps. Give exactly one of steps, tokens, epochs."""
    tokens: PositiveInt | None = None
    """Length in tokens (sequences × seq_len), rounded up to whole steps."""
    epochs: PositiveFloat | None = None
    """Length in passes over the training data, to the sample: the last step is as small as it has to be. Of several
    sources a pass is as many blocks as they have together; how often each of them is seen follows from its weight."""
    min_steps: PositiveInt | None = None
    """A run of epochs or tokens has at least so many steps, however small the text; a run of steps has what it says.
    Default: as long as they are."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of forward and backward; master weights and optimizer state are fp32. fp16 has a dynamic loss scale."""
    gradient_accumulation_dtype: Literal["fp32"] | None = None
    """bf16 only: accumulate gradients in fp32 (4 more bytes a parameter). Default: in the training precision."""
    deterministic: bool = False
    """On GPUs: use kernels that give the same bits at each start, so that a resume there is bit for bit. It costs
    speed: attention is flash's deterministic variant or math, and what is compiled is not tuned by timing. On a CPU
    nothing changes."""
    profile: ProfileConfig | None = None
    """Write a trace of some steps by torch.profiler to RUN/profile, for TensorBoard's profiler or Perfetto. Default:
    none, at no cost."""

    @model_validator(mode="after")
    def one_length(self) -> Self:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of steps, tokens, epochs; got {' and '.join(given) if given else 'none'}"
            )
        if self.gradient_accumulation_dtype is not None and self.precision != "bf16":
            raise ValueError(f"gradient_accumulation_dtype needs precision bf16, got precision {self.precision}")
        return self


class ResilienceConfig(Section):
    on_divergence: Literal["stop", "rollback"] = "stop"
    """stop ends with exit code 4. rollback loads the last good checkpoint and goes on behind the data seen since."""
    max_skipped_steps: PositiveInt = 20
    """Training has diverged after this many skipped steps in a row."""
    max_loss_ratio: Ratio | None = None
    """Training has diverged when the loss of a step is above this many times the median of the last steps."""
    max_grad_norm_ratio: Ratio | None = None
    """Skip a step whose gradient norm, before clipping, is above this many times the median of the last steps."""
    window: Annotated[int, Field(gt=0, le=1_000_000)] = 100
    """Applied steps that the two medians are taken over; before there are so many, nothing is above them."""
    max_rollbacks: PositiveInt = 3
    """Rollbacks in the whole run; training that diverges once more ends with exit code 4."""
    stop_before_end_seconds: Annotated[int, Field(gt=0, le=65_535)] = 300
    """So long before the time limit of a SLURM job the run saves and stops, to be requeued: a step, a batch of an
    evaluation, a save and a minute have to fit."""
    max_idle_starts: PositiveInt | None = 3
    """A SLURM job ends (exit code 1, no requeue) when so many starts of it in a row began at the step where it stands
    again: what it does is lost each time. null goes on for ever."""


class LoggingConfig(Section):
    every_steps: PositiveInt | None = None
    """Steps between two lines in metrics.jsonl, in TensorBoard and on the console. Default: a twentieth of the run's
    steps, at least 1 and at most 10."""
    tensorboard: bool = True
    """Write the metrics to RUN/tensorboard as well."""


class WatchdogConfig(Section):
    """Limits are on time without a sign of progress (a batch read, a micro-batch done), not on a phase as a whole."""

    start_minutes: Minutes | None = 60.0
    """End the run (exit code 1) when it makes no progress for so long before its first step is done: reading inputs
    and a checkpoint, building, compiling. All stacks go to the ranks' logs, and the ranks that are behind are named.
    null: never, here and below."""
    data_minutes: Minutes | None = 30.0
    """The same while any rank waits for data."""
    step_minutes: Minutes | None = 30.0
    """The same within a step."""
    evaluate_minutes: Minutes | None = 30.0
    """The same within an evaluation."""
    save_minutes: Minutes | None = 60.0
    """The same within a save, which counts as a whole: the time in which the slowest rank writes its files."""
    straggler_minutes: Minutes | None = 10.0
    """Time between two looks for ranks that hold up the others; null never looks. A line on the console, no more."""
    straggler_ratio: Ratio = 1.5
    """A straggler takes this many times the median rank's time to read its data, or for its forward passes, and loses
    at least 5 % of all time with it."""


DEFAULTS = 2  # the newest set; trainer.schedule.run_length says what belongs to each


class Config(Section):
    defaults: Annotated[int, Field(ge=1, le=DEFAULTS)] = DEFAULTS
    """Which set of defaults holds for what follows from the length of the run. A run that has begun keeps the one that
    it began with. 1: a warm-up of 1,000 steps, epochs rounded up to whole steps, a line every 10 steps."""
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    deepspeed: Line = "zero1"
    """A preset in ds_configs/ (zero0, zero1, zero2, zero3, zero2_offload, zero3_offload) or the path of a JSON file."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    eval: EvalConfig = EvalConfig()
    logging: LoggingConfig = LoggingConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @model_validator(mode="before")
    @classmethod
    def whole_documents_have_their_own_attention(cls, raw: Any) -> Any:
        data, model = (raw.get(name) if isinstance(raw, dict) else None for name in ("data", "model"))
        if isinstance(data, dict) and isinstance(model, dict) and data.get("samples") == "documents":
            return {**raw, "model": {"document_attention": True, **model}}
        return raw

    @model_validator(mode="after")
    def whole_documents_have_no_other(self) -> Self:
        if self.data.samples == "documents" and not self.model.document_attention:
            raise ValueError(
                "with data.samples=documents needs model.document_attention=true: the documents of a block have "
                "nothing to do with each other"
            )
        return self

    @model_validator(mode="after")
    def pairs_are_of_the_stream(self) -> Self:
        if self.objective.pair is None:
            return self
        for key, is_set, other in (
            ("data.samples=documents", self.data.samples == "documents", "data.samples=stream"),
            ("model.document_attention=true", self.model.document_attention, "model.document_attention=false"),
        ):
            if is_set:
                raise ValueError(
                    f"with objective.pair cannot have {key}, because the segments of a pair attend to each other: set "
                    f"{other}, or objective.pair=null"
                )
        return self

    @model_validator(mode="after")
    def mask_ratios_have_one_place(self) -> Self:
        given = next((number for number, phase in enumerate(self.data.phases) if phase.mask_ratio is not None), None)
        if given is None:
            return self
        if isinstance(self.objective.mask_ratio, list):
            raise ValueError(
                f"with data.phases[{given}].mask_ratio needs one number for objective.mask_ratio, that of the last "
                "phase, and not stages"
            )
        self.objective.refuse_unused("mask_ratio", f"data.phases[{given}].mask_ratio")
        return self

    @model_validator(mode="after")
    def attention_is_as_deterministic_as_the_rest(self) -> Self:
        if self.train.deterministic and self.model.attention_backend in ("cudnn", "efficient"):
            raise ValueError(
                f"with train.deterministic=true needs model.attention_backend auto, flash or math, not "
                f"{self.model.attention_backend}, which adds up in an order of its own each time"
            )
        return self

    @model_validator(mode="after")
    def evaluations_are_judged_where_there_are_some(self) -> Self:
        lacking = "data.validation" if self.data.validation is None else "eval.every_steps"
        wanted = "checkpoint.keep_best=true" if self.checkpoint.keep_best else f"eval.patience={self.eval.patience}"
        is_wanted = self.checkpoint.keep_best or self.eval.patience is not None
        if is_wanted and (self.data.validation is None or self.eval.every_steps is None):
            raise ValueError(f"with {wanted} needs {lacking}: without evaluations no checkpoint is the best")
        return self

    @model_validator(mode="after")
    def evaluations_mask_where_something_is_masked(self) -> Self:
        if self.eval.mask_ratio is not None:
            self.objective.refuse_unused("mask_ratio", "eval.mask_ratio")
        return self

    @model_validator(mode="after")
    def micro_size_is_known_to_cuda_graphs(self) -> Self:
        if self.model.compile == CUDA_GRAPHS and self.batch.micro_size == "auto":
            raise ValueError(
                f"with model.compile={CUDA_GRAPHS} needs a number for batch.micro_size, which is batch.global_size / "
                "ranks: CUDA graphs cannot accumulate"
            )
        return self


def run_folder(config: Config) -> Path:
    """Read `run.dir` as a path."""
    return user_path(config.run.dir, "run.dir")
