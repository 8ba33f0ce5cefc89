"""Ways to train the rows of the coordinate tokens beside LoRA, compared on the demo's model and scenes.

    coordexp demo --assets-only
    PYTHONPATH=. python tools/compare_lora_rows.py
    PYTHONPATH=. python tools/compare_lora_rows.py --memory runs/models/real_vocab     # of a step at Qwen's vocabulary

First the demo's model is trained as a whole, then its 1000 coordinate rows are set back to what
`coordexp model add-coord-tokens` makes of new ones: a model that knows the scenes and no coordinate. From there each
way trains with the same data, steps, batch and learning rate. ms-swift has no argument for PEFT's
`trainable_token_indices`: tools/token_rows_tuner.py adds it as a tuner type. Runs that are there already are not
repeated.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from training_run import run_training

from coordexp.files import read_json, write_json

RECIPE = Path("configs/demo/stage1.yaml")
TUNER = Path("tools/token_rows_tuner.py")
LORA = [
    "--tuner_type", "lora", "--lora_rank", "16", "--lora_alpha", "32", "--target_modules", "all-linear",
    "--freeze_vit", "true", "--freeze_aligner", "false",
]  # fmt: skip


def ways(rate: float) -> dict[str, list[str]]:
    """Flags of each way; all rows have the run's learning rate and no weight decay of their own."""
    return {
        "LoRA alone": LORA,
        "coord offsets": [
            *LORA, "--custom.coord_offset.enabled", "true", "--custom.coord_offset.embed_lr", str(rate),
        ],
        "trainable_token_indices": [
            *LORA, "--tuner_type", "lora_token_rows", "--external_plugins", "coordexp/plugin.py", str(TUNER),
            "--custom.head", "plain",
        ],
        "modules_to_save": [*LORA, "--modules_to_save", "embed_tokens", "lm_head"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"))
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/compare_lora_rows"))
    parser.add_argument("--first-steps", type=int, default=600, help="of the whole model (default 600)")
    parser.add_argument("--first-batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60, help="of each way (default 60)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate of each way (default 0.005)")
    parser.add_argument(
        "--memory", type=Path, metavar="MODEL", help="only measure the memory of a step of this model"
    )
    args = parser.parse_args()
    if args.memory is not None:
        show_memory(args.memory)
        return 0
    data = ["--dataset", str(args.data / "train.jsonl"), "--val_dataset", str(args.data / "val.jsonl")]
    batch = [*data, "--per_device_train_batch_size", str(args.batch)]
    first = [*data, "--per_device_train_batch_size", str(args.first_batch)]
    whole = train(args.output / "whole", args.first_steps, ["--model", str(args.model), *first])
    start = forgetful(whole["checkpoint"], args.output / "start")
    results = {}
    for name, flags in ways(args.rate).items():
        rate = ["--model", str(start), "--learning_rate", str(args.rate)]
        run = train(args.output / name.replace(" ", "_"), args.steps, [*rate, *batch, *flags])
        results[name] = {**run, **numbers_of(run["checkpoint"], args.data)}
    write_json(args.output / "results.json", results, default=str)
    show(results)
    return 0


def train(folder: Path, steps: int, flags: list[str]) -> dict[str, Any]:
    """What the run left, trained now unless it is there: its checkpoint and what it cost."""
    checkpoint, facts = folder / f"checkpoint-{steps}", folder / "facts.json"
    if not facts.is_file():
        length = [flag for name in ("max", "eval", "save") for flag in (f"--{name}_steps", str(steps))]
        cost = run_training(RECIPE, folder, [*length, "--report_to", "none", *flags])
        write_json(facts, cost._asdict())
    return {**read_json(facts), "checkpoint": checkpoint}


def forgetful(model_dir: Path, output: Path) -> Path:
    """A copy whose coordinate rows are as new; made now unless it is there."""
    if (output / "config.json").is_file():
        return output
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from coordexp.codec.coord_vocab import CoordVocab
    from coordexp.models.coord_tokens import expand_embeddings

    processor = AutoProcessor.from_pretrained(model_dir)
    model = AutoModelForImageTextToText.from_pretrained(model_dir)
    coords = list(CoordVocab.from_tokenizer(processor.tokenizer).ids)
    others = sorted(set(processor.tokenizer.get_vocab().values()) - set(coords))
    expand_embeddings(model, processor.tokenizer, others, coords, seed=0, pad_to_multiple_of=1)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    return output


def numbers_of(checkpoint: Path, data: Path) -> dict[str, Any]:
    """Losses of the last evaluation, answers to the validation images, and sizes."""
    import torch
    from safetensors import safe_open

    from coordexp.cli.demo.demo_cmd import BATCH_SIZE, MAX_NEW_TOKENS
    from coordexp.eval.on_policy import on_policy_numbers
    from coordexp.inference.infer import infer_file
    from coordexp.metrics.sinks import read_payloads

    payloads = list(read_payloads(checkpoint.parent / "metrics.jsonl"))
    last = next(p["metrics"] for p in reversed(payloads) if p["mode"] == "eval")
    images = infer_file(
        checkpoint, data / "val.jsonl", checkpoint.parent / "answers", batch_size=BATCH_SIZE,
        max_new_tokens=MAX_NEW_TOKENS,
    )  # fmt: skip
    weights = [checkpoint / "adapter_model.safetensors", checkpoint / "coord_offset.safetensors"]
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    trained = sum(entry["exp_avg"].numel() for entry in state.values())
    saved = 0
    for path in weights:
        if path.is_file():
            with safe_open(path, framework="pt") as tensors:
                saved += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return {
        "loss": last["eval_loss"], "coord": last.get("eval_coord_diag/loss"), "metrics": last,
        "f1": on_policy_numbers(images, gate=0.5)["rollout_f1"], "trained": trained, "saved_mib": saved / 2**20,
        "optimizer_mib": (checkpoint / "optimizer.pt").stat().st_size / 2**20,
    }  # fmt: skip


def show_memory(model_dir: Path) -> None:
    """What a forward and backward pass of 32 tokens takes beyond what was there before it (Linux)."""
    import torch

    torch.set_num_threads(1)
    for way in ("LoRA alone", "coord offsets", "trainable_token_indices", "modules_to_save"):
        sys.stdout.flush()
        if os.fork() == 0:
            print(f"{way}: {memory_of_step(model_dir, way):.0f} MiB", flush=True)
            os._exit(0)
        os.wait()


def memory_of_step(model_dir: Path, way: str) -> float:
    """MiB, in a process of its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from coordexp.codec.coord_vocab import CoordVocab
    from coordexp.models.coord_offset import attach_coord_offset

    model = AutoModelForImageTextToText.from_pretrained(model_dir)
    ids = list(CoordVocab.from_tokenizer(AutoTokenizer.from_pretrained(model_dir)).ids)
    offset = attach_coord_offset(model, ids, tie_head=True) if way == "coord offsets" else None
    more: dict[str, Any] = {
        "trainable_token_indices": {"trainable_token_indices": {"embed_tokens": ids}},
        "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    }.get(way, {})
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **more))
    if offset is not None:
        offset.embedding.coord_offset_KH.requires_grad_(True)
    tokens = torch.tensor([[7, ids[500]] * 16])

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that it counts when it is needed again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_mib()
    step()
    return peak_mib() - before


def peak_mib() -> float:
    """The largest resident size so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def show(results: dict[str, dict[str, Any]]) -> None:
    table = Table(
        "",
        "loss",
        "coordinate loss",
        "F1 at 0.5",
        "trained",
        "weights MiB",
        "optimizer MiB",
        "peak MiB",
        "CPU s",
    )
    for name, run in results.items():
        table.add_row(
            name, f"{run['loss']:.3f}", f"{run['coord']:.3f}", f"{run['f1']:.3f}", f"{run['trained']:,}",
            f"{run['saved_mib']:.2f}", f"{run['optimizer_mib']:.2f}", f"{run['peak_mib']:.0f}", f"{run['cpu_s']:.0f}",
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
