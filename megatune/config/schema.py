"""The configuration: one schema, every key described. `docs/config.md` is generated from it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megatune.config.section import Section
from megatune.config.slurm import SlurmConfig


class ModelConfig(Section):
    path: str = Field(
        description="Hugging Face folder, GGUF file, hub name (needs a network), or `package:NAME` for a GGUF file "
        "inside an installed Python package."
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="Compute dtype. auto: bf16 on GPUs and on CPUs with AMX tiles, else fp32. Trainable weights and "
        "optimizer states are kept in fp32 in any case, but for optim.name: adamw_8bit and adamw_bf16.",
    )
    quantise: Literal["nf4", "int8"] | None = Field(
        None,
        description="Keep the frozen weights of the decoder layers' linear layers in few bits, for method lora "
        "(QLoRA): nf4 (4 bits, scales in 8) or int8. Each process has all of its share under every ZeRO stage.",
    )
    fp8: Literal["rowwise", "blockwise"] | None = Field(
        None,
        description="Compute the decoder layers' linear layers in 8 bit floating point, for method full: scales for "
        "each row, or for blocks of 128 (finer; compute capability 9.0 only). CPUs imitate it, slowly.",
    )
    cache: str | None = Field(
        None, description="Folder for converted models. Default: $MEGATUNE_CACHE or ~/.cache/megatune."
    )


class FullMethod(Section):
    type: Literal["full"] = Field("full", description="Train every weight.")


class FreezeMethod(Section):
    type: Literal["freeze"] = Field(description="Train a part of the weights, freeze the rest.")
    last_layers: int = Field(0, ge=0, description="Train the last N decoder layers.")
    modules: list[str] = Field(
        default_factory=list,
        description="Also train parameters whose global name matches one of these shell patterns, "
        "for example `norm.weight` or `layers.*.mlp.*`.",
    )

    @model_validator(mode="after")
    def _something_trains(self) -> FreezeMethod:
        if not self.last_layers and not self.modules:
            raise ValueError("freeze trains nothing: set last_layers or modules")
        return self


class LoraMethod(Section):
    type: Literal["lora"] = Field(description="Low-rank adapters (arXiv:2106.09685) beside frozen weights.")
    rank: int = Field(16, ge=1, description="Rank r of each adapter.")
    alpha: float = Field(32.0, gt=0, description="Scale is alpha / rank (alpha / sqrt(rank) with rslora).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear",
        description="Projections that get an adapter, by their Hugging Face names (q_proj, k_proj, v_proj, o_proj, "
        "gate_proj, up_proj, down_proj), or all-linear for each of them.",
    )
    rslora: bool = Field(False, description="Rank-stabilised scale alpha / sqrt(rank) (arXiv:2312.03732).")


Method = Annotated[FullMethod | FreezeMethod | LoraMethod, Field(discriminator="type")]


class DataConfig(Section):
    train: list[str] = Field(description="Training files: .jsonl, .json, .parquet or .csv.")
    eval: str | list[str] | None = Field(
        None, description="Held-out files, evaluated on; none: no evaluation."
    )
    eval_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Without `eval`: hold out this share of the training rows (by a hash of the row).",
    )
    format: Literal["auto", "messages", "alpaca", "sharegpt", "prompt_completion", "text"] = Field(
        "auto", description="Row format; auto looks at the first row of each file."
    )
    seq_length: int = Field(
        4096, ge=8, description="Tokens in one packed sequence, and the limit for one sample."
    )
    packing: bool = Field(
        True, description="Pack samples into sequences (best fit). Attention never crosses a sample's border."
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="Tokens with loss: every assistant turn, the last one only, or all tokens."
    )
    system: str | None = Field(None, description="System message for rows that have none.")
    chat_template: str | None = Field(
        None, description="Path of a Jinja chat template; default: the tokenizer's own."
    )
    too_long: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="What to do with a sample longer than seq_length. Counted and reported."
    )
    on_error: Literal["error", "skip"] = Field(
        "error", description="A row that cannot be used: stop with its file and line, or skip and count it."
    )
    max_samples: int | None = Field(
        None, ge=1, description="Use only the first N samples of the training files."
    )
    cache: str | None = Field(
        None, description="Folder of the token cache. Default: <checkpoint.folder>/cache."
    )

    @field_validator("train", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


_SWITCHES = ("overlap", "offload", "offload_optimizer")


class ParallelConfig(Section):
    tensor: int = Field(
        1, ge=1, description="Tensor parallel size; the norm regions are then sequence parallel."
    )
    pipeline: int = Field(1, ge=1, description="Pipeline parallel size.")
    context: int = Field(
        1, ge=1, description="Context parallel size: each sequence is cut over this many processes."
    )
    expert: int = Field(
        1,
        ge=1,
        description="Expert parallel size, out of dp_shard x context (x tensor where expert_tensor is 1).",
    )
    expert_tensor: int | None = Field(
        None, ge=1, description="Tensor parallel size inside an expert; default: as `tensor`."
    )
    replicate: int = Field(
        1,
        ge=1,
        description="Copies of the sharded model (hybrid sharding): dp_replicate x dp_shard processes.",
    )
    zero: Literal[0, 1, 2, 3] = Field(
        3,
        description="ZeRO stage: 0 replicate, 1 shard optimizer state, 2 also gradients, 3 also parameters.",
    )
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zbv"] = Field(
        "1f1b",
        description="Pipeline schedule: GPipe, 1F1B, interleaved 1F1B, or zero-bubble (ZB-H1, ZBV).",
    )
    virtual: int | None = Field(
        None, ge=1, description="Stages a process holds; default: 2 for interleaved and zbv, else 1."
    )
    stages: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="Layers of each of the pipeline x virtual stages, in order; default: balanced by cost, embedding "
        "and head included.",
    )
    context_method: Literal["ring", "ulysses"] = Field(
        "ring",
        description="Context parallel attention: ring (keys and values go round) or ulysses (heads are dealt).",
    )
    overlap: bool = Field(
        True, description="Let collectives run behind computation; false: one after the other, for measuring."
    )
    recompute: Literal["none", "selective", "full"] | int = Field(
        "none",
        description="Recompute activations in backward: none, selective (inside attention and MLP), full (every "
        "layer), or every n-th layer.",
    )
    offload: bool = Field(False, description="Keep activations that wait for backward in pinned host memory.")
    offload_optimizer: bool = Field(
        False,
        description="Keep fp32 masters and optimizer states in host memory; the CPU updates them, in chunks behind the "
        "copies of gradients and weights (zero 0, 1 or 2; not for muon and adamw_bf16).",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name not in _SWITCHES:
            raise ValueError("must be a number or a name, not true or false")
        return value

    @field_validator("recompute")
    @classmethod
    def _recompute_every(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:
            raise ValueError("every n-th layer needs n >= 1")
        return value


class MoEConfig(Section):
    aux_loss: float = Field(
        0.0,
        ge=0,
        description="Weight of the load-balancing loss (arXiv:2101.03961), of each micro-batch; 0: off.",
    )
    bias_rate: float = Field(
        0.0,
        ge=0,
        description="Aux-loss-free balancing (arXiv:2408.15664): change of the router's bias a step; 0: off.",
    )
    capacity: float | None = Field(
        None,
        gt=0,
        description="Each expert takes at most this times its even share of a micro-batch's tokens and drops the "
        "rest; default: no token is dropped.",
    )


class EarlyStop(Section):
    patience: int = Field(3, ge=1, description="Stop after this many evaluations without improvement.")
    min_delta: float = Field(0.0, ge=0, description="Smaller improvements of eval_loss do not count.")


class TrainConfig(Section):
    steps: int | None = Field(None, ge=1, description="Optimizer steps. Give steps or epochs.")
    epochs: float | None = Field(None, gt=0, description="Passes over the training set, instead of steps.")
    global_batch_size: int = Field(
        8, ge=1, description="Packed sequences in one optimizer step, over all processes."
    )
    micro_batch_size: int = Field(1, ge=1, description="Packed sequences in one forward pass of one process.")
    seed: int = Field(0, ge=0, description="Decides data order, initial adapter weights and dropout.")
    z_loss: float = Field(
        0.0,
        ge=0,
        description="Adds this times the square of the log of the softmax's sum to each token's training loss, which "
        "keeps logits from drifting (arXiv:2204.02311); 0: off. eval_loss is without it.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the target that is spread evenly over the vocabulary (arXiv:1512.00567) in the training "
        "loss; eval_loss is without it.",
    )
    eval_every: int = Field(0, ge=0, description="Evaluate each N steps; 0: only before and after.")
    eval_first: bool = Field(True, description="Evaluate before the first step.")
    log_every: int = Field(1, ge=1, description="Steps between lines in metrics.jsonl.")
    early_stop: EarlyStop | None = Field(None, description="Stop when eval_loss no longer falls.")
    samples: int = Field(0, ge=0, description="Answer this many held-out prompts before and after training.")
    sample_tokens: int = Field(64, ge=1, description="New tokens in such an answer, at most.")
    deterministic: bool = Field(
        False, description="Deterministic kernels only: bitwise repeatable on GPUs, slower."
    )
    compile: bool = Field(False, description="torch.compile each decoder layer.")

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TrainConfig:
        if self.steps is None and self.epochs is None:
            self.epochs = 1.0
        elif self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class OptimConfig(Section):
    name: Literal["adamw", "adamw_8bit", "adamw_bf16", "lion", "muon"] = Field(
        "adamw",
        description="Optimizer: AdamW, AdamW with moments in 8 bits, AdamW on bf16 matrices with stochastic rounding "
        "and no fp32 masters, Lion, or Muon on the layers' matrices with AdamW on the rest.",
    )
    lr: float = Field(2.0e-5, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="Learning rate after the warm-up; wsd: constant, then linear decay in the last part.",
    )
    warmup: float = Field(
        0.03, ge=0, description="Warm-up: below 1 a share of all steps, from 1 on a number of steps."
    )
    decay: float = Field(0.2, gt=0, le=1, description="wsd: share of all steps that the final decay takes.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="The schedule ends at lr times this.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, on matrices only.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's and Lion's beta 1.")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's and Lion's beta 2 (for Lion 0.99 is usual).")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum.")
    clip: float = Field(1.0, ge=0, description="Clip the global gradient norm to this; 0: off.")

    @model_validator(mode="after")
    def _momentum_is_muons(self) -> OptimConfig:
        # A configuration that was written out names every key: the default does no harm.
        if self.name != "muon" and self.momentum != type(self).model_fields["momentum"].default:
            raise ValueError(
                f"momentum: {self.momentum} is for name: muon, and {self.name} has none: leave it out (its decay "
                "rates are beta1 and beta2), or set name to muon"
            )
        return self


class CheckpointConfig(Section):
    folder: str = Field(description="The run's folder: checkpoints, logs, metrics, exports.")
    every: int = Field(0, ge=0, description="Save each N steps; 0: only at the end and when stopped.")
    keep_last: int = Field(2, ge=1, description="Newest checkpoints to keep.")
    keep_every: int = Field(
        0, ge=0, description="Keep also each checkpoint whose step is a multiple of this; 0: none."
    )
    keep_best: int = Field(
        0,
        ge=0,
        description="Keep also that many with the lowest held-out loss; 0: none. Needs data.eval, and every to be a "
        "multiple of train.eval_every.",
    )
    export: list[Literal["adapter", "merged", "model"]] | None = Field(
        None,
        description="Written at the end: adapter (PEFT), merged (Hugging Face folder with the adapter merged), model "
        "(Hugging Face folder). Default: adapter and merged for lora, else model.",
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: go on from the newest valid checkpoint in the folder."
    )
    start: str | None = Field(
        None,
        description="Folder that a conversion to megatune wrote, with optimizer states: a run without checkpoints "
        "starts with its weights, moments and step, and not from those of model.path.",
    )


class TrackConfig(Section):
    tensorboard: bool = Field(False, description="TensorBoard event files in <folder>/tensorboard.")
    wandb: dict[str, Any] | None = Field(
        None, description="Arguments of wandb.init, for example {project: x}."
    )
    swanlab: dict[str, Any] | None = Field(None, description="Arguments of swanlab.init.")
    mlflow: dict[str, Any] | None = Field(
        None, description="{tracking_uri, experiment, run_name} for MLflow; any may be left out."
    )


class RayConfig(Section):
    address: str = Field(
        "auto",
        description="The cluster: auto (RAY_ADDRESS, or the one that runs on this machine, else a new one of this "
        "machine alone), local (a new one), HOST:PORT or ray://HOST:PORT.",
    )
    strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = Field(
        "PACK", description="Placement of the ranks: on few machines, on one, spread, each on its own."
    )


class LaunchConfig(Section):
    backend: Literal["local", "ray"] = Field(
        "local",
        description="Who starts the processes of `megatune train`: local (this machine) or ray (a Ray cluster; nproc "
        "counts all of them, auto: one a GPU of the cluster). Under torchrun, srun and mpirun: they do.",
    )
    nproc: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Local processes that `megatune train` starts. auto: one a GPU, else cpu_nproc."
    )
    cpu_nproc: int = Field(1, ge=1, description="Processes for nproc: auto on a machine without GPUs.")
    timeout: float = Field(
        1800, gt=0, description="Seconds after which a collective that hangs ends the run."
    )
    restarts: int = Field(
        3,
        ge=0,
        description="After a failure the run is started again from the newest valid checkpoint, at most so many times "
        "in a row without getting further; never after a mistake that only a person can mend.",
    )
    hang_timeout: float = Field(
        600,
        ge=0,
        description="Seconds without a sign of life within a step after which the stacks of all ranks are written to "
        "their logs and the run is started again; 5 times as long in the first step, for reading data, evaluating and "
        "saving. 0: off.",
    )
    join_timeout: float = Field(300, gt=0, description="Seconds that the nodes of a job wait for each other.")
    grace: float | None = Field(
        None,
        ge=0,
        description="Seconds that the scheduler gives between asking a run to stop and killing it; a warning is "
        "printed where saving takes longer.",
    )
    ray: RayConfig = Field(default_factory=RayConfig, description="With backend: ray.")


class OpsConfig(Section):
    backend: dict[str, str] = Field(
        default_factory=dict,
        description="Body to use for an op, for example {attention: reference, rms_norm: cpu}; default: automatic.",
    )


class Config(Section):
    """One run of megatune."""

    model: ModelConfig
    method: Method = Field(default_factory=FullMethod, description="What is trained.")
    data: DataConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    moe: MoEConfig = Field(default_factory=MoEConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig
    track: TrackConfig = Field(default_factory=TrackConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    ops: OpsConfig = Field(default_factory=OpsConfig)

    @model_validator(mode="after")
    def _sections_fit_each_other(self) -> Config:
        held_out = self.data.eval is not None or self.data.eval_fraction > 0
        if self.train.early_stop is not None and not (held_out and self.train.eval_every):
            raise ValueError("train.early_stop needs train.eval_every above 0 and held-out data (data.eval)")
        saves, evaluates = self.checkpoint.every, self.train.eval_every
        measured = held_out and saves and evaluates and saves % evaluates == 0
        if self.checkpoint.keep_best and not measured:
            raise ValueError(
                "checkpoint.keep_best needs held-out data (data.eval), and checkpoint.every to be a multiple of "
                "train.eval_every, so that each checkpoint is evaluated"
            )
        is_lora = self.method.type == "lora"
        if self.model.quantise and not is_lora:
            raise ValueError(
                f"model.quantise: {self.model.quantise} is for frozen weights; set method.type to lora, or leave it out"
            )
        if self.model.quantise and self.train.compile:
            raise ValueError(
                "train.compile: true does not go with model.quantise; set train.compile to false, or leave quantise out"
            )
        if self.checkpoint.export is None:
            self.checkpoint.export = ["adapter", "merged"] if is_lora else ["model"]
        for what in self.checkpoint.export:
            if (what == "model") == is_lora:
                raise ValueError(
                    f"checkpoint.export: {what} does not fit method.type: {self.method.type} "
                    f"(use {'adapter and merged' if is_lora else 'model'})"
                )
        return self
