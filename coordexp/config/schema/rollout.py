"""The `rollout_matching` section: generation, parsing, matching and monitoring of rollouts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from coordexp.config.schema.pipeline import Pipeline
from coordexp.config.schema.section import Section

Readout = Literal["argmax", "median", "expectation"]
"""How a coordinate is read from its distribution over the bins."""


class Decoding(Section):
    """Sampling of rollouts."""

    temperature: float = Field(default=0.0, ge=0, description="0: greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus mass.")
    top_k: int = Field(default=-1, ge=-1, description="Most likely tokens kept; -1: all.")
    coord: Readout = Field(
        default="argmax",
        description="The bin written where the coordinate tokens hold most of the probability: as every other token "
        "is chosen (argmax), or the median or mean of their distribution, also when sampling.",
    )
    guided: bool = Field(
        default=False,
        description="Only whole answers in the form of custom.answer_format can be written, with the corners of a box "
        "in their order; one that would run into max_new_tokens or repeat itself is brought to its end.",
    )
    guided_max_objects: int | None = Field(
        default=None,
        gt=0,
        description="Objects that a guided answer holds at most; null: repeat_terminate.max_object_keys where "
        "repeat_terminate is enabled, else any number.",
    )

    @model_validator(mode="after")
    def _a_limit_needs_guidance(self) -> Decoding:
        if self.guided_max_objects is not None and not self.guided:
            raise ValueError(
                "guided_max_objects has no effect without guided: true; set it, or remove the limit"
            )
        return self


class RepeatTerminate(Section):
    """End a rollout that repeats itself."""

    enabled: bool = Field(default=False, description="Use it.")
    min_new_tokens: int = Field(default=64, ge=0, description="Never end a rollout earlier than this.")
    max_consecutive_token_repeats: int = Field(
        default=32, gt=0, description="Same token this often in a row."
    )
    ngram_size: int = Field(default=32, gt=0, description="Length of a repeated piece, in tokens.")
    ngram_repeats: int = Field(default=4, gt=1, description="Repeats of such a piece.")
    max_object_keys: int | None = Field(
        default=None, gt=0, description="Objects after which a rollout ends; null: no limit."
    )


class VllmServer(Section):
    """One rollout server."""

    base_url: str = Field(min_length=1, description="Such as http://127.0.0.1:8000.")
    group_port: int = Field(default=51216, gt=0, lt=65536, description="Port of the weight-sync group.")


class VllmServers(Section):
    """Rollout servers and how long they may take."""

    servers: list[VllmServer] = Field(min_length=1, description="At least one.")
    timeout_s: float = Field(default=240.0, gt=0, description="For the server to answer at start.")
    infer_timeout_s: float | None = Field(
        default=None, gt=0, description="For one generation request; null: no limit."
    )
    api_key_env: str | None = Field(default=None, description="Environment variable that holds the API key.")


def _refuse_adapter(value: object) -> object:
    if value == "adapter":
        raise ValueError("adapters are merged and pushed as whole weights, never alone; use full")
    return value


class VllmSync(Section):
    """How the policy reaches the engine."""

    mode: Annotated[Literal["full", "auto"], BeforeValidator(_refuse_adapter)] = Field(
        default="full", description="Push whole weights, adapters merged into them. auto: the same."
    )


OUR_ENGINE_ARGS: dict[str, str] = {
    "gpu_memory_utilization": "write vllm.gpu_memory_utilization",
    "tensor_parallel_size": "write vllm.tensor_parallel_size",
    "max_model_len": "write vllm.max_model_len",
    "max_num_seqs": "write vllm.max_num_seqs",
    "enforce_eager": "write vllm.enforce_eager",
    "enable_prefix_caching": "write vllm.enable_prefix_caching",
    "enable_sleep_mode": "write vllm.sleep_level",
    "dtype": "the engine has the torch_dtype of training",
    "seed": "the run's seed is used",
    "enable_lora": "merged weights are pushed",
    **dict.fromkeys(
        (
            "model",
            "tokenizer",
            "tokenizer_mode",
            "skip_tokenizer_init",
            "trust_remote_code",
            "runner",
            "hf_overrides",
        ),
        "the engine serves the model in training",
    ),
    **dict.fromkeys(
        ("distributed_executor_backend", "pipeline_parallel_size", "data_parallel_size", "worker_cls"),
        "the engine runs inside the training processes",
    ),
    "logits_processors": "write repeat_terminate, decoding.coord or decoding.guided",
}
"""Engine arguments that another setting decides, and which."""


class Vllm(Section):
    """The vLLM engine."""

    mode: Literal["colocate", "server"] = Field(
        default="colocate", description="In the training process, or elsewhere."
    )
    gpu_memory_utilization: float = Field(
        default=0.45, gt=0, le=1, description="Share of device memory for the engine."
    )
    tensor_parallel_size: int = Field(default=1, ge=1, description="Devices per engine.")
    max_model_len: int | None = Field(
        default=None, gt=0, description="Longest prompt plus rollout; null: the model's."
    )
    max_num_seqs: int | None = Field(
        default=None, gt=0, description="Sequences decoded at once; null: vLLM's default."
    )
    enforce_eager: bool = Field(default=False, description="Without CUDA graphs.")
    enable_prefix_caching: bool = Field(default=False, description="Reuse cached prompt prefixes.")
    sleep_level: Literal[0, 1, 2] = Field(default=0, description="What the engine frees while training.")
    engine_args: dict[str, Any] = Field(
        default={},
        description="Further arguments of the engine by vLLM's names (max_num_batched_tokens, limit_mm_per_prompt, "
        "...), checked against the installed vLLM.",
    )
    server: VllmServers | None = Field(default=None, description="Needed with mode: server.")
    sync: VllmSync = VllmSync()

    @model_validator(mode="after")
    def _engine_args_are_nobody_elses(self) -> Vllm:
        for name, instead in OUR_ENGINE_ARGS.items():
            if name in self.engine_args:
                raise ValueError(f"engine_args.{name} cannot be set here: {instead}")
        if self.mode == "server" and self.engine_args:
            raise ValueError(
                "engine_args has no effect with mode: server; give them to `coordexp rollout-server --engine-args`"
            )
        return self

    @model_validator(mode="after")
    def _server_mode(self) -> Vllm:
        if self.mode == "server" and self.server is None:
            raise ValueError("mode is server, but server.servers is missing")
        if self.mode == "colocate" and self.server is not None:
            raise ValueError("server is given, but mode is colocate; set mode: server or remove it")
        return self


class Offload(Section):
    """Move training state off the device during generation."""

    enabled: bool = Field(default=False, description="Use it.")
    offload_model: bool = Field(default=False, description="Parameters.")
    offload_optimizer: bool = Field(default=False, description="Optimizer state.")


class Matching(Section):
    """Assignment of predicted to true objects."""

    candidate_top_k: int = Field(default=10, ge=1, description="Ground-truth candidates of a prediction.")
    maskiou_gate: float = Field(default=0.3, ge=0, le=1, description="Pairs under this maskIoU never match.")
    maskiou_resolution: int = Field(
        default=256, ge=16, description="Side of the canvas maskIoU is computed on."
    )
    fp_cost: float = Field(default=1.0, ge=0, description="Cost of leaving a prediction unmatched.")
    fn_cost: float = Field(default=1.0, ge=0, description="Cost of leaving a true object unmatched.")
    ot_cost: Literal["l1", "l2"] = Field(
        default="l2",
        description="Distance between vertices in the transport from a matched polygon to its ground truth.",
    )
    ot_epsilon: float = Field(
        default=10.0,
        gt=0,
        description="Entropic regularisation of the transport, in bins; smaller: nearer to one true vertex each.",
    )
    ot_iters: int = Field(default=30, ge=1, description="Sinkhorn iterations of the transport.")


class RolloutTargets(Section):
    """What is changed in an answer before it is taught. By default nothing: missed objects are appended to it."""

    answers: Literal["all", "best"] = Field(
        default="all",
        description="Of the num_return_sequences answers to a question all are taught, or the one with most matched "
        "objects.",
    )
    drop_duplicates_above_iou: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="A prediction without a partner whose box has this IoU with that of a matched or an earlier one "
        "leaves the answer; null: it stays.",
    )
    replace_above_iou: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="A prediction without a partner whose box has this IoU with a missed object is replaced by it, "
        "where it stands; below matching.maskiou_gate, null: it stays and the object is appended.",
    )
    drop_unmatched: bool = Field(
        default=False,
        description="Every prediction without a partner leaves the answer, and every invalid one.",
    )
    missed: Literal["append", "in_order"] = Field(
        default="append",
        description="Missed objects stand behind the answer, or among its objects in the order of the ground truth.",
    )


class MonitorDump(Section):
    """Samples written for people to look at."""

    enabled: bool = Field(default=False, description="Write them.")
    every_steps: int | None = Field(
        default=100, gt=0, description="Optimizer steps between dumps; null: ms-swift's logging_steps."
    )
    max_events: int = Field(default=20, ge=0, description="Dumps of a run at most; 0: none.")
    max_samples: int = Field(default=1, gt=0, description="Samples of a dump.")
    max_text_chars: int = Field(
        default=4000, ge=0, description="Text is cut after this many characters; 0: never."
    )
    min_free_gb: float = Field(default=2.0, ge=0, description="Skip the dump when the disk has less.")
    out_dir: str | None = Field(default=None, description="null: monitor_dumps in the run directory.")


class DescMonitorSettings(Section):
    """Compare descriptions of matched pairs; metrics only."""

    enabled: bool = Field(default=False, description="Use it.")
    mode: Literal["exact", "semantic"] = Field(
        default="exact", description="Equal text, or also sentence similarity."
    )
    every_steps: int = Field(default=1, gt=0, description="Optimizer steps between comparisons.")
    semantic_model: str = Field(
        default="sentence-transformers/all-MiniLM-L6-v2", description="Sentence-embedding model."
    )
    semantic_threshold: float = Field(
        default=0.6, ge=-1, le=1, description="Cosine similarity that counts as the same."
    )
    semantic_device: str = Field(
        default="auto",
        min_length=1,
        description="Device of the sentence-embedding model, such as cpu or cuda:0; auto: that of training.",
    )
    batch_size: int = Field(default=64, gt=0, description="Descriptions embedded at once.")
    max_length: int | None = Field(
        default=None,
        gt=0,
        description="Tokens of a description that are embedded; null: the model's own limit.",
    )
    max_pairs: int = Field(default=64, gt=0, description="Pairs compared at most, per step.")


class EvalDetection(Section):
    """Detection metrics of evaluation rollouts."""

    enabled: bool = Field(default=False, description="Compute them.")
    metrics: Literal["coco", "f1", "both"] = Field(
        default="coco",
        description="coco: average precision (eval_rollout/mAP). f1: F1 over the same IoU thresholds, which needs no "
        "scores (eval_rollout/f1_50_95).",
    )
    iou_type: Literal["bbox", "segm"] = Field(
        default="bbox", description="Boxes or masks, for average precision."
    )
    score_mode: Literal["logprob", "constant"] = Field(
        default="logprob",
        description="Score of a prediction: exp of the mean log-probability of its coordinate tokens, or 1.",
    )
    strict_parse: bool = Field(
        default=False,
        description="true: an answer that is cut off, is no container or holds a broken object counts as empty in "
        "these metrics; false: its valid objects count. Answers are never repaired.",
    )


class RolloutMatching(Section):
    """Rollouts: how they are generated, matched and watched."""

    where: ClassVar[str] = "rollout_matching"
    """What a run file calls this section."""

    backend: Literal["hf", "vllm"] = Field(default="vllm", description="What generates.")
    decode_mode: Literal["greedy", "beam"] = Field(
        default="greedy",
        description="beam: beam search (hf only); greedy: no beams, sampled if decoding.temperature > 0.",
    )
    num_beams: int = Field(default=1, ge=1, description="Beams of decode_mode: beam.")
    decode_batch_size: int = Field(
        default=4, ge=1, description="Rollouts generated at once: the only chunking knob."
    )
    num_return_sequences: int = Field(
        default=1,
        ge=1,
        description="Answers to each question of a training step, each taught on as a sample of its own (but see "
        "targets.answers); more than 1 needs decoding.temperature above 0. Evaluation asks once.",
    )
    max_new_tokens: int = Field(default=1024, gt=0, description="Longest rollout.")
    generate_timeout_s: float | None = Field(
        default=1800.0, gt=0, description="Longest wait for decode_batch_size rollouts; null: no limit."
    )
    preflight_timeout_s: float = Field(
        default=300.0, gt=0, description="Longest wait for the tiny rollout before step 1."
    )
    packing: bool = Field(
        default=True,
        description="Train on several samples in one sequence, kept apart by their position ids. false: padded batches "
        "of per_device_train_batch_size samples.",
    )
    packing_length: int | None = Field(
        default=None, gt=0, description="Tokens of a packed sequence; null: ms-swift's max_length."
    )
    repetition_penalty: float = Field(default=1.0, gt=0, description="1: none.")
    decoding: Decoding = Decoding()
    repeat_terminate: RepeatTerminate = RepeatTerminate()
    vllm: Vllm = Vllm()
    offload: Offload = Offload()
    matching: Matching = Matching()
    targets: RolloutTargets = RolloutTargets()
    eval_maskiou_gate: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="As matching.maskiou_gate, for evaluation: which answers count in eval_rollout/f1. null: the same.",
    )
    eval_prompt_variant: str | None = Field(
        default=None,
        description="Evaluation asks with this message of custom.prompt_variants; training goes on with custom.prompt. "
        "null: evaluation asks as training does.",
    )
    coord_decode_mode: Literal["exp", "st"] = Field(
        default="exp",
        description="How boxes are decoded for bbox_geo: expectation or straight-through argmax.",
    )
    monitor_dump: MonitorDump = MonitorDump()
    desc_monitor: DescMonitorSettings = DescMonitorSettings()
    eval_detection: EvalDetection = EvalDetection()
    pipeline: Pipeline | None = Field(default=None, description="Module lists of stage2_rollout_aligned.")

    @model_validator(mode="after")
    def _decoding_fits_the_backend(self) -> RolloutMatching:
        if self.decode_mode == "beam" and self.backend != "hf":
            raise ValueError("decode_mode is beam, which only backend: hf has; use decode_mode: greedy")
        if self.num_beams > 1 and self.decode_mode != "beam":
            raise ValueError("num_beams has no effect without decode_mode: beam")
        if self.decode_mode == "beam" and self.decoding.temperature > 0:
            raise ValueError("decode_mode is beam, but decoding.temperature asks for sampling; set it to 0")
        if self.decode_mode == "beam" and self.decoding.coord != "argmax":
            raise ValueError(
                f"decode_mode is beam, which scores no answer of decoding.coord: {self.decoding.coord}"
            )
        if self.decode_mode == "beam" and self.decoding.guided:
            raise ValueError("decode_mode is beam, whose beams change places, so none can be guided")
        if self.num_return_sequences > 1 and self.decoding.temperature == 0:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}, but decoding.temperature is 0, which gives the "
                "same answer every time; set it above 0, or num_return_sequences: 1"
            )
        return self
