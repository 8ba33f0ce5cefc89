"""A nano model that holds a latent prefix, as a checkpoint of training does."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from coordexp.config.prompt import write_prompt
from coordexp.config.schema.prompt import Prompt
from coordexp.models.latent_prefix.deep import DeepSettings
from coordexp.models.latent_prefix.folder import base_hash, trained_state, write_prefix
from coordexp.models.latent_prefix.prefix import LatentPrefix, PrefixSettings
from coordexp.models.latent_prefix.vocabulary import add_latent_tokens


def latent_checkpoint(
    model: Path,
    folder: Path,
    prompt: str,
    num_latents: int,
    *,
    trained: bool = True,
    keep_prob: float = 1.0,
    num_deep: int | None = None,
) -> Path:
    """`model` with latent tokens and an encoder.

    trained: whose vectors are no longer the means of the text, and a deep prefix, if any, no longer without effect.
    """
    add_latent_tokens(model, folder, num_latents)
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    torch.manual_seed(1)
    text = loaded.config.get_text_config()
    deep = None if num_deep is None else DeepSettings.of(num_deep, text)
    encoder = {"width": 16, "heads": 2, "layers": 1, "mlp_width": 16}
    prefix = LatentPrefix(PrefixSettings(num_latents, text.hidden_size, **encoder, deep=deep))
    assert prefix.resampler is not None
    if trained:
        torch.nn.init.normal_(prefix.resampler.write.weight, std=0.5)
        if prefix.deep is not None:
            torch.nn.init.normal_(prefix.deep.values_LKDE)
    base = base_hash(loaded, AutoTokenizer.from_pretrained(folder))
    write_prefix(folder, trained_state(prefix, keep_prob=keep_prob, base=base))
    write_prompt(folder, Prompt(user=prompt))
    return folder


def asked_scenes(scenes: Path, folder: Path, lists: list[list[str]]) -> Path:
    """The validation scenes, asked in turn for these classes, with the objects of them alone."""
    lines = [json.loads(line) for line in (scenes / "val.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        line["images"] = [str(scenes / name) for name in line["images"]]
        line["classes"] = lists[index % len(lists)]
        line["objects"] = [obj for obj in line["objects"] if obj["desc"] in line["classes"]]
    folder.mkdir(exist_ok=True)
    (folder / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "asked.jsonl"
