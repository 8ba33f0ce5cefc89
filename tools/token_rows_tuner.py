"""Tuner type `lora_token_rows`: LoRA, and PEFT's `trainable_token_indices` for the coordinate tokens.

    coordexp train FILE --tuner_type lora_token_rows --external_plugins coordexp/plugin.py tools/token_rows_tuner.py

For comparisons (tools/compare_lora_rows.py). ms-swift passes no such argument on, but takes tuners from plugins.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map
from swift.utils import get_multimodal_target_regex
from transformers import AutoTokenizer

from coordexp.codec.coord_vocab import CoordVocab


class TokenRowsTuner(PeftTuner):
    """Both ends of a tied model use the trained rows; PEFT sees to that."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        targets = get_multimodal_target_regex(
            model, freeze_llm=args.freeze_llm, freeze_vit=args.freeze_vit, freeze_aligner=args.freeze_aligner
        )
        vocab = CoordVocab.from_tokenizer(AutoTokenizer.from_pretrained(args.model))
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=targets,
            trainable_token_indices={"embed_tokens": list(vocab.ids)},
        )
        return get_peft_model(model, config)


tuners_map["lora_token_rows"] = TokenRowsTuner
