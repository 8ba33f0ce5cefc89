"""The gradient of an optimizer step does not depend on how the step is cut into micro-batches and ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.processes import PLUGIN, free_port, run_swift, sft_flags
from torch import Tensor
from transformers import AutoTokenizer

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.metrics.keys_run import TIME_SHARES
from coordexp.metrics.sinks import read_payloads

pytestmark = pytest.mark.slow

WEIGHTS = {
    "soft_ce_weight": 1.0, "w1_weight": 0.7, "ce_weight": 0.5, "gate_weight": 0.3,
    "temperature": 1.0, "target_sigma": 4.0,
}  # fmt: skip
# name -> (samples per device, accumulation steps, ranks); 8 samples in all
CUTS = {"1x8": (8, 1, 1), "2x4": (4, 2, 1), "2 ranks x 2x2": (2, 2, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuts")


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Path]:
    """Run folders of the cuts."""
    return [folder / f"run{number}" for number in range(len(CUTS))]


@pytest.fixture(scope="module")
def dumps(nano_model: Path, scenes: Path, folder: Path) -> dict[str, list[dict]]:
    found = {}
    for number, (name, (batch, accumulation, ranks)) in enumerate(CUTS.items()):
        file = folder / f"gradients{number}"
        flags = sft_flags(
            nano_model, scenes, folder / f"run{number}",
            external_plugins=[PLUGIN, Path(__file__).parent / "dump_gradients_plugin.py"],
            callbacks="dump_gradients", train_dataloader_shuffle=False, max_grad_norm=1e9, val_dataset=None,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            coordexp=json.dumps({"custom": {"coord_soft_ce_w1": WEIGHTS}}),
        )  # fmt: skip
        environment = {"NPROC_PER_NODE": str(ranks), "MASTER_PORT": free_port()} if ranks > 1 else {}
        done = run_swift("sft", *flags, DUMP_GRADIENTS=str(file), **environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found[name] = [torch.load(f"{file}.rank{rank}", weights_only=True) for rank in range(ranks)]
    return found


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest entry of the difference of two gradients, relative to the largest entry of the first."""
    assert left.keys() == right.keys()
    scale = max(g.abs().max() for g in left.values())
    return float(max((left[name].double() - right[name].double()).abs().max() for name in left) / scale)


def test_all_ranks_took_part(dumps):
    assert [len(found) for found in dumps.values()] == [1, 1, 2]
    assert [found[0]["num_processes"] for found in dumps.values()] == [1, 1, 2]
    first, second = dumps["2 ranks x 2x2"]
    assert largest_difference(first["gradients"], second["gradients"]) == 0.0


@pytest.mark.parametrize("cut", ["2x4", "2 ranks x 2x2"])
def test_gradient_is_the_same_for_every_cut(dumps, cut):
    assert largest_difference(dumps["1x8"][0]["gradients"], dumps[cut][0]["gradients"]) < 1e-6


def test_what_was_seen_is_the_same_for_every_cut(dumps, runs, nano_model, scenes):
    """Tokens with a loss are those of the answers; every picture is seen once."""
    tokenizer = AutoTokenizer.from_pretrained(nano_model)
    answers = [answer_of(json.loads(line)) for line in (scenes / "train.jsonl").read_text().splitlines()]
    num_tokens = sum(len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers)
    for run in runs:
        [record] = [p["metrics"] for p in read_payloads(run / "metrics.jsonl") if "loss" in p["metrics"]]
        assert record["train/tokens_seen"] == record["train/tokens_total"] == num_tokens
        assert record["train/images_seen"] == record["train/samples_seen"] == len(answers) == 8
        assert record["train/tokens_per_s"] == pytest.approx(num_tokens / record["time/step_s"])
        assert sum(record[key] for key in TIME_SHARES.values()) == pytest.approx(1)
        assert min(record[TIME_SHARES[phase]] for phase in ("data", "forward", "backward", "optimizer")) > 0
        assert record["time/share_generation"] == record["time/share_push"] == 0
        assert 0.1 < record["memory/peak_gb"] < 8


def test_gradient_equals_a_float64_reference(dumps, nano_model, scenes):
    reference = reference_gradient(nano_model, scenes)
    assert largest_difference(reference, dumps["1x8"][0]["gradients"]) < 2e-6


def answer_of(record: dict) -> str:
    objects = ", ".join(
        f'{{"desc": "{o["desc"]}", "bbox_2d": [' + ", ".join(f"<|coord_{k}|>" for k in o["bbox_2d"]) + "]}"
        for o in record["objects"]
    )
    return '{"objects": [' + objects + "]}<|im_end|>"


def reference_gradient(model_dir: Path, data: Path) -> dict[str, Tensor]:
    """The stage-1 loss of the 8 samples written from its formulas, one sample at a time, in float64."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from coordexp.config import DEFAULT_PROMPT

    model = AutoModelForImageTextToText.from_pretrained(model_dir).double()
    processor = AutoProcessor.from_pretrained(model_dir)
    tokenizer = processor.tokenizer
    coord_ids = torch.tensor(CoordVocab.from_tokenizer(tokenizer).ids)
    text_sum, coord_sum, num_text, num_coord = 0.0, 0.0, 0, 0
    for line in (data / "train.jsonl").read_text().splitlines():
        record = json.loads(line)
        answer = tokenizer(answer_of(record), add_special_tokens=False).input_ids
        question = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DEFAULT_PROMPT}]}
        ]
        prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        inputs = processor(
            text=[prompt], images=[Image.open(data / record["images"][0])], return_tensors="pt"
        )  # fmt: skip
        num_prompt = inputs["input_ids"].shape[1]
        ids = torch.cat([inputs.pop("input_ids"), torch.tensor([answer])], dim=1)
        inputs.pop("attention_mask")
        types = (ids == model.config.image_token_id).int()
        logits = model(
            input_ids=ids,
            pixel_values=inputs["pixel_values"].double(),
            image_grid_thw=inputs["image_grid_thw"],
            mm_token_type_ids=types,
        ).logits[0]
        rows, targets = logits[num_prompt - 1 : -1], ids[0, num_prompt:]
        is_coord = torch.isin(targets, coord_ids)
        log_probs = rows.log_softmax(-1)
        text_sum = text_sum - log_probs[~is_coord].gather(1, targets[~is_coord, None]).sum()
        num_text += int((~is_coord).sum())
        num_coord += int(is_coord.sum())
        z = rows[is_coord]
        bins = targets[is_coord] - coord_ids[0]
        k = torch.arange(1000, dtype=torch.float64)
        q = torch.softmax(-((k - bins[:, None]) ** 2) / (2 * WEIGHTS["target_sigma"] ** 2), -1)
        log_p = z[:, coord_ids].log_softmax(-1)
        soft_ce = -(q * log_p).sum(-1)
        w1 = (log_p.exp().cumsum(-1) - q.cumsum(-1)).abs().sum(-1) / 999
        ce = -log_p.gather(1, bins[:, None])[:, 0]
        gate = z.logsumexp(-1) - z[:, coord_ids].logsumexp(-1)
        terms = {"soft_ce": soft_ce, "w1": w1, "ce": ce, "gate": gate}
        coord_sum = coord_sum + sum(
            WEIGHTS[f"{name}_weight"] * values.sum() for name, values in terms.items()
        )
    (text_sum / num_text + coord_sum / num_coord).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
