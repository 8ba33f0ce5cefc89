"""A latent prefix, a deep one too, LoRA and offsets trained by `swift sft`: steps, files, resuming, the best."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.latents import asked_scenes
from support.processes import PLUGIN, free_port, run_swift, sft_flags
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from coordexp.config.schema.prompt import Prompt
from coordexp.data.dataset import read_training_rows
from coordexp.data.shown import ShownRows
from coordexp.models.checkpoints import missing_files
from coordexp.models.coord_offset import OFFSET_FILE
from coordexp.models.latent_prefix.folder import PREFIX_FILE, PREFIX_WEIGHTS, read_prefix
from coordexp.models.latent_prefix.vocabulary import add_latent_tokens
from coordexp.stages.verify import verify_best

pytestmark = pytest.mark.slow

PROMPT = "Detect all objects in the image."
ONCE = ("eval_latent/none", "eval_latent/cut")
DEEPSPEED_ON_CPU = Path(__file__).with_name("deepspeed_on_cpu_plugin.py")
ZERO2 = {"deepspeed": "zero2", "use_cpu": None, "external_plugins": [DEEPSPEED_ON_CPU, PLUGIN]}
M = 7
"""Tokens of the prompt: the vectors of a new encoder are its embeddings."""
PREFIX: dict[str, Any] = {
    "num_latents": M,
    "encoder": {"width": 16, "heads": 2, "layers": 1, "mlp_width": 16},
    "deep": {"num": 3, "learning_rate": 0.005},
    "language_model": "tuned",
    "learning_rate": 0.01,
    "text_share": 0.5,
    "keep": {"prob": [[0, 0.8], [4, 1.0]]},
    "objective": [
        {"name": "stage1", "weight": 1.0, "steps": ["T", "L"]},
        {"name": "latent_first_token_ce", "weight": [[0, 2.0], [4, 1.0]]},
        {"name": "latent_k_ce", "weight": 0.5, "config": {"num_tokens": 4}},
        {"name": "latent_kd", "weight": 1.0, "config": {"temperature": 2.0, "top_k": 16, "chunk_rows": 50}},
        {"name": "latent_state_kd", "weight": 0.5, "config": {"layers": [1]}},
        {"name": "latent_align", "weight": 0.5},
    ],
}


def train(model: Path, scenes: Path, output: Path, **more: Any) -> None:
    """LoRA and offsets beside the prefix."""
    custom = {
        "latent_prefix": PREFIX,
        "coord_offset": {"enabled": True, "embed_lr": 0.01},
        "rollout_eval": {"enabled": True, "max_new_tokens": 150},
    }
    sections = {
        "custom": custom,
        "debug": {"enabled": True},
        "telemetry": {"gradient_probe": {"every_steps": 1}},
    }
    settings: dict[str, Any] = {
        "max_steps": 5, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-4, "tuner_type": "lora", "lora_rank": 4,
        "lora_dropout": 0, "target_modules": "all-linear", "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
        **more,
    }  # fmt: skip
    sft(model, scenes, output, sections, **settings)


def sft(model: Path, scenes: Path, output: Path, sections: dict[str, Any], **more: Any) -> None:
    environment = more.pop("environment", {})
    settings = {"eval_strategy": "steps", "eval_steps": 2, "gradient_checkpointing": True, **more}
    flags = sft_flags(
        model,
        scenes,
        output,
        custom_trainer_variant="latent_prefix",
        coordexp=json.dumps(sections),
        **settings,
    )
    done = run_swift("sft", *flags, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def records(run: Path, mode: str) -> dict[int, dict[str, Any]]:
    """Payloads of a run by step, those of its end left out."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[1:]]
    return {r["global_step"]: r for r in found if r["mode"] == mode and "train_runtime" not in r["metrics"]}


@pytest.fixture(scope="module")
def model(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latent") / "model"
    add_latent_tokens(taught_model, path, M)
    return path


@pytest.fixture(scope="module")
def run(model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("latent") / "run"
    train(model, scenes, output)
    return output


def test_steps_say_how_they_were_prompted_and_what_they_taught(run: Path):
    steps = records(run, "train")
    assert [steps[n]["tags"]["latent/text_steps"] for n in range(1, 6)] == ["L", "T", "L", "T", "L"]
    for number, payload in steps.items():
        metrics = payload["metrics"]
        shares = {
            key.removeprefix("loss/latent/"): value
            for key, value in metrics.items()
            if key.startswith("loss/latent/")
        }
        wanted = {"stage1", "latent_align"} if number % 2 == 0 else {e["name"] for e in PREFIX["objective"]}
        assert shares.keys() == wanted
        assert sum(shares.values()) == pytest.approx(metrics["loss"], rel=1e-5)
        assert metrics["latent/keep_prob"] == pytest.approx(0.8 + 0.05 * min(number - 1, 4))
        assert ("latent/nll_per_token" in metrics) == (number % 2 == 1)
        assert ("latent/text_nll_per_token" in metrics) == (number % 2 == 0)
        assert (metrics["latent/deep_rms"] == 0) == (number == 1)  # it adds nothing before it has learned
        norms = {name: metrics[f"latent/grad_norm/{name}"] for name in wanted}
        assert (norms["latent_align"] > 0) == (number > 1)  # at first the vectors are the text's
        # stage 1 on a text-prompted step does not reach the vectors
        assert (norms["stage1"] > 0) == (number % 2 == 1)
    assert steps[3]["metrics"]["latent/weight/latent_first_token_ce"] == pytest.approx(1.5)
    assert steps[1]["metrics"]["latent/align"] == pytest.approx(0, abs=1e-9)
    assert all(steps[number]["metrics"]["latent/kd"] > 0 for number in (1, 3, 5))


def test_evaluation_reads_the_vectors_and_the_text(run: Path):
    evaluations = records(run, "eval")
    assert evaluations.keys() == {2, 4, 5}
    for payload in evaluations.values():
        metrics = payload["metrics"]
        assert {
            "eval_latent/nll_per_token", "eval_latent/text_nll_per_token", "eval_latent/first_token_acc",
            "eval_latent/first_token_acc_top5", "eval_latent/majority_first_token", "eval_rollout/f1",
        } <= metrics.keys()  # fmt: skip
        num_text, num_coord = (
            metrics["eval_base_ce/noncoord_tokens"],
            metrics["eval_coord_diag/coord_tokens"],
        )
        assert num_text > 0
        assert num_coord > 0
        assert 0 < metrics["eval_latent/majority_first_token"] <= 1
        assert 0 <= metrics["eval_latent/text_first_token_acc"] <= 1


def test_other_prompts_are_measured_once_on_the_model_as_it_came(run: Path, model: Path, scenes: Path):
    evaluations = records(run, "eval")
    found = {key: value for key, value in evaluations[2]["metrics"].items() if key.startswith(ONCE)}
    wanted: dict[str, float] = {}
    for name, text in (
        ("cut", PROMPT),
        ("none", ""),
    ):  # the prompt has as many tokens as there are latents, and no list
        wanted |= read_after(text, model, scenes, name)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert found["eval_latent/none_nll_per_token"] > found["eval_latent/cut_nll_per_token"]
    assert not any(key.startswith(ONCE) for step in (4, 5) for key in evaluations[step]["metrics"])
    for step in (2, 4):
        state = json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["stateful_callbacks"]["LatentBaselines"]["attributes"] == {"pending": {}}


def read_after(text: str, folder: Path, scenes: Path, name: str) -> dict[str, float]:
    """Numbers of the validation answers, read one by one after `text` by the model of a folder, without our batches."""
    tok, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForImageTextToText.from_pretrained(folder).eval(),
    )
    processor = AutoProcessor.from_pretrained(folder)
    start = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    opening = len(tok.encode('{"objects": [{"desc": "'))
    nll, right, num_tokens = 0.0, 0, 0
    shown = ShownRows(read_training_rows(scenes / "val.jsonl", Prompt(user=PROMPT)))
    for index in range(len(shown)):
        row = shown[index].row
        image = Image.open(
            scenes / json.loads((scenes / "val.jsonl").read_text().splitlines()[index])["images"][0]
        )
        given = processor(text=[start], images=[image], return_tensors="pt")
        answer = torch.tensor([tok.encode(row["messages"][-1]["content"] + "<|im_end|>")])
        ids = torch.cat([given.pop("input_ids"), answer], dim=1)
        rest = {"pixel_values": given["pixel_values"], "image_grid_thw": given["image_grid_thw"]}
        kinds = given.get("mm_token_type_ids")
        if kinds is not None:
            rest["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(answer)], dim=1)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **rest).logits[
                0, -answer.shape[1] - 1 : -1
            ]
        nll += float(torch.nn.functional.cross_entropy(logits.double(), answer[0], reduction="sum"))
        num_tokens += answer.shape[1]
        right += int(logits[opening].argmax() == answer[0, opening])
    return {
        f"eval_latent/{name}_nll_per_token": nll / num_tokens,
        f"eval_latent/{name}_first_token_acc": right / len(shown),
    }


def test_a_checkpoint_holds_everything_that_was_trained(run: Path, model: Path):
    resolved = json.loads((run / "resolved_config.json").read_text())
    for step in (2, 4):
        checkpoint = run / f"checkpoint-{step}"
        assert missing_files(checkpoint, resolved) == []
        saved = read_prefix(checkpoint)
        assert saved is not None
        assert saved.keep_prob == pytest.approx(0.8 + 0.05 * step)
        assert saved.settings.num_latents == M
        assert any(
            tensor.abs().max() > 0.01 for name, tensor in saved.weights.items() if "write.weight" in name
        )
        assert saved.deep_weights.keys() == {"deep.keys_LKDE", "deep.values_LKDE"}
        assert (saved.weights["deep.values_LKDE"].flatten(1).abs().amax(1) > 0.005).all()  # of every layer
        assert load_file(checkpoint / OFFSET_FILE)["embed"].abs().max() > 0
        lora = load_file(checkpoint / "adapter_model.safetensors")
        assert not any("latent_prefix" in name for name in lora)  # all-linear leaves the encoder alone
        assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
        groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
        rates = [(group["lr"], len(group["params"])) for group in groups[-2:]]
        assert rates == [(0.01, len(saved.weights) - 2), (0.005, 2)]
    lacking = run.parent / "lacking"
    lacking.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file() and path.name not in (PREFIX_FILE, PREFIX_WEIGHTS):
            (lacking / path.name).symlink_to(path)
    assert any("latent prefix" in what for what in missing_files(lacking, resolved))


def test_a_run_resumed_in_the_middle_of_the_mix_goes_on_with_the_same_curve(
    run: Path, model: Path, scenes: Path, tmp_path: Path
):
    again, start = tmp_path / "again", tmp_path / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", start)
    state = json.loads((start / "trainer_state.json").read_text())
    # as of a run that was cut before its first evaluation, with other numbers than it would measure now
    kept = {"latent/none_nll_per_token": 1.5, "latent/none_first_token_acc": 0.75}
    state["stateful_callbacks"]["LatentBaselines"]["attributes"]["pending"] = kept
    (start / "trainer_state.json").write_text(json.dumps(state))
    train(model, scenes, again, resume_from_checkpoint=start, ignore_data_skip=False)
    logged = [
        {key: value for key, value in payload["metrics"].items() if key.startswith(ONCE)}
        for payload in records(again, "eval").values()
    ]
    assert logged == [{f"eval_{key}": value for key, value in kept.items()}, {}]
    ours, theirs = records(again, "train"), records(run, "train")
    assert ours.keys() == {3, 4, 5}
    for step, payload in ours.items():
        wanted = theirs[step]["metrics"]
        assert payload["tags"]["latent/text_steps"] == theirs[step]["tags"]["latent/text_steps"]
        same = [key for key in wanted if key == "loss" or key.startswith(("latent/", "loss/latent/"))]
        assert {key: payload["metrics"][key] for key in same} == pytest.approx(
            {key: wanted[key] for key in same}, rel=1e-6
        )
    last, wanted_last = read_prefix(again / "checkpoint-4"), read_prefix(run / "checkpoint-4")
    assert last is not None
    assert wanted_last is not None
    for name, tensor in wanted_last.weights.items():
        torch.testing.assert_close(last.weights[name], tensor, rtol=1e-5, atol=1e-7)


def test_two_ranks_find_what_one_finds(run: Path, model: Path, scenes: Path, tmp_path: Path):
    """Two steps of the same samples. The second rank fills its batch with two of the four validation samples again."""
    ranks = {"NPROC_PER_NODE": "2", "MASTER_PORT": free_port()}
    more = {"max_steps": 2, "gradient_accumulation_steps": 1, "ddp_backend": "gloo", "save_strategy": "no"}
    train(model, scenes, tmp_path / "two", environment=ranks, **more)
    one, two = (records(path, "eval")[2]["metrics"] for path in (run, tmp_path / "two"))
    keys = [
        key
        for key in one
        if key.startswith(("eval_latent/", "eval_base_ce/", "eval_coord_diag/", "eval_loss"))
    ]
    assert {"eval_latent/nll_per_token", "eval_latent/none_nll_per_token", "eval_latent/kd"} <= set(keys)
    assert {key: two[key] for key in keys} == pytest.approx({key: one[key] for key in keys}, rel=1e-4)


def test_ranks_learn_one_prefix_where_a_step_has_no_forward(model: Path, scenes: Path, tmp_path: Path):
    """In text-prompted steps of a frozen model only the alignment teaches, and nothing reads the prompt."""
    lists = [["red box"], ["blue circle", "green box"], ["red circle", "blue box"], ["green circle"]]
    data = asked_scenes(scenes, tmp_path / "data", lists)
    objective = [{"name": "stage1", "weight": 1.0}, {"name": "latent_align", "weight": 1.0, "steps": ["T"]}]
    prefix = PREFIX | {"language_model": "frozen", "objective": objective, "keep": {"prob": 1.0}}
    prefix |= {"learning_rate": 0.5}
    sections = {"custom": {"prompt": "Detect: {classes}.", "latent_prefix": prefix}}
    learnt, no_ranks = {}, dict[str, str]()
    for name, accumulation, ranks, more in (
        ("alone", 2, no_ranks, {}),
        ("ddp", 1, {"NPROC_PER_NODE": "2"}, {"ddp_backend": "gloo"}),
        ("zero2", 1, {"NPROC_PER_NODE": "2", "ACCELERATE_USE_CPU": "false"}, ZERO2),
    ):
        output = tmp_path / name
        settings: dict[str, Any] = {
            "environment": {**ranks, "MASTER_PORT": free_port()} if ranks else {}, "dataset": data, "val_dataset": None,
            "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2, "max_steps": 4,
            "train_dataloader_shuffle": False, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "no",
            "learning_rate": 1e-4, "optim": "sgd", "max_grad_norm": 0, "gradient_checkpointing": False, **more,
        }  # fmt: skip
        sft(model, scenes, output, sections, **settings)
        assert [r["tags"]["latent/text_steps"] for r in records(output, "train").values()] == [
            "L",
            "T",
            "L",
            "T",
        ]
        saved = read_prefix(output / "checkpoint-4")
        assert saved is not None
        learnt[name] = saved.weights
    for key, tensor in learnt["alone"].items():
        for name in ("ddp", "zero2"):
            torch.testing.assert_close(learnt[name][key], tensor, rtol=1e-4, atol=1e-6)


def test_the_best_checkpoint_scores_the_same_in_a_fresh_process(run: Path):
    verdict = verify_best(run)
    assert verdict.passed, verdict.faults
    assert verdict.metric == "eval_rollout/f1"
    assert verdict.logged is not None
    assert verdict.logged > 0
    assert verdict.scored["hf"] == verdict.logged


def test_a_frozen_model_reads_text_as_before_and_vectors_better(model: Path, scenes: Path, tmp_path: Path):
    """With a deep prefix, two text-prompted steps among six, under reentrant gradient checkpointing."""
    objective = [{"name": "stage1", "weight": 1.0}, {"name": "latent_align", "weight": 0.1, "steps": ["T"]}]
    prefix = {
        **{key: PREFIX[key] for key in ("num_latents", "encoder", "deep", "learning_rate")},
        "text_share": 0.34,
        "objective": objective,
    }
    run = tmp_path / "run"
    sft(
        model, scenes, run, {"custom": {"latent_prefix": prefix}}, max_steps=6, save_strategy="steps", save_steps=6,
        gradient_checkpointing_kwargs='{"use_reentrant": true}',
    )  # fmt: skip
    kinds = [payload["tags"]["latent/text_steps"] for payload in records(run, "train").values()]
    assert (kinds.count("T"), kinds.count("L")) == (2, 4)
    first, *_, last = records(run, "eval").values()
    text, latent = "eval_latent/text_nll_per_token", "eval_latent/nll_per_token"
    assert last["metrics"][text] == first["metrics"][text]
    assert last["metrics"][latent] < first["metrics"][latent]
    before, after = (load_file(path / "model.safetensors") for path in (model, run / "checkpoint-6"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    saved = read_prefix(run / "checkpoint-6")
    assert saved is not None
    assert (saved.weights["deep.values_LKDE"].flatten(1).abs().amax(1) > 0.005).all()
