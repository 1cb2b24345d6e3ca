"""How a condensed checkpoint turns away code that would load it wrongly, and lets in the code that can.

Stock transformers makes every layer as the config says. It then finds tensors of other shapes and gives up; but what only has a
bias more, or is loaded with `ignore_mismatched_sizes=True`, it would load with a warning, and compute something else. So the
config of such a model names, as `transformers_weights` (the file that `from_pretrained` is to read), no file but what the model
needs. transformers refuses that before it looks at any tensor, and its error quotes the field. The config itself, and with it the
tokenizer, loads everywhere.

All of this is copied into the modelling file that a checkpoint carries.
"""

from __future__ import annotations

import json
import os
from typing import Any

#: What transformers quotes.
NEEDED = "none, because this model was condensed with hf_prune and loads only after `pip install hf-prune` and `import hf_prune`"
NEEDED_OR_REMOTE = f"{NEEDED}, or with `trust_remote_code=True`"


def needs_hf_prune(config: Any) -> bool:
    """Whether a model of this config has sizes that only hf_prune, or the modelling file, can give it."""
    entry = getattr(config, "hf_prune", None)
    return entry is not None and not (isinstance(entry, dict) and entry.get("layers") == {})


def refuse_stock_code(file: str | os.PathLike[str], needed: str) -> None:
    """Make a `config.json` turn away code that knows neither hf_prune nor the modelling file; doing so again changes nothing."""
    with open(file, encoding="utf-8") as reader:
        config = json.load(reader)
    config["transformers_weights"] = needed
    with open(f"{os.fspath(file)}.part", "w", encoding="utf-8") as writer:
        writer.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(writer.name, file)


def accept(config: dict[str, Any]) -> None:
    """Take the refusal out of the fields of a config, for code that can load the model; other fields stay."""
    if str(config.get("transformers_weights", "")).startswith(NEEDED):
        del config["transformers_weights"]
