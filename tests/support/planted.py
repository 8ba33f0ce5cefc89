"""A model folder with Python code of its own, which writes a file when it is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

MARKER = "it_ran"
PLACES = {
    "config.json": {"AutoConfig": "planted_config.PlantedConfig"},
    "tokenizer_config.json": {"AutoTokenizer": [None, "planted_tokenizer.PlantedTokenizer"]},
    "processor_config.json": {"AutoProcessor": "planted_processor.PlantedProcessor"},
}
"""File of a Qwen3-VL folder -> the `auto_map` that is planted in it."""
BASES = {
    "PlantedConfig": "transformers.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLConfig",
    "PlantedTokenizer": "transformers.PreTrainedTokenizerFast",
    "PlantedProcessor": "transformers.models.qwen3_vl.processing_qwen3_vl.Qwen3VLProcessor",
}


def plant(model: Path, folder: Path, *files: str) -> Path:
    """A copy of a model in `folder` with code in its `files` (keys of `PLACES`); what runs writes `folder/it_ran`."""
    shutil.copytree(model, folder)
    for name in files:
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        content["auto_map"] = PLACES[name]
        path.write_text(json.dumps(content))
        [target] = [value if isinstance(value, str) else value[1] for value in PLACES[name].values()]
        module, cls = target.split(".")
        base_module, base = BASES[cls].rsplit(".", 1)
        (folder / f"{module}.py").write_text(
            f"from {base_module} import {base}\n"
            f"open({str(folder / MARKER)!r}, 'a').write('{module}')\n"
            f"class {cls}({base}):\n    pass\n"
        )
    return folder
