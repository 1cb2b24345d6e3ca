"""How a condensed checkpoint makes code that would load it incorrectly fail, and lets code load it that can.

Stock transformers builds every layer by the config. It then finds tensors of different shapes and raises an error; but a model that
only has an additional bias, or is loaded with `ignore_mismatched_sizes=True`, would load with a warning and compute something else.
So in the config of such a model `transformers_weights` (the file that `from_pretrained` should read) is not a file name but a
message about what the model needs. transformers refuses it before it reads any tensor, and its error quotes the field. The config
itself, and with it the tokenizer, loads everywhere.

All of this module is copied into the modelling file of a checkpoint.
"""

from __future__ import annotations

import json
import os
from typing import Any

#: The message that the error of transformers quotes.
NEEDED = "none, because this model was condensed with hf_prune and loads only after `pip install hf-prune` and `import hf_prune`"
NEEDED_OR_REMOTE = f"{NEEDED}, or with `trust_remote_code=True`"


def needs_hf_prune(config: Any) -> bool:
    """Whether a model of this config can only be built by hf_prune or by the modelling file."""
    entry = getattr(config, "hf_prune", None)
    return entry is not None and not (isinstance(entry, dict) and entry.get("layers") == {})


def refuse_stock_code(file: str | os.PathLike[str], needed: str) -> None:
    """Make code without hf_prune and the modelling file refuse a `config.json`; idempotent."""
    with open(file, encoding="utf-8") as reader:
        config = json.load(reader)
    config["transformers_weights"] = needed
    with open(f"{os.fspath(file)}.part", "w", encoding="utf-8") as writer:
        writer.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(writer.name, file)


def accept(config: dict[str, Any]) -> None:
    """Remove the refusal from the fields of a config, for code that can load the model; other fields are unchanged."""
    if str(config.get("transformers_weights", "")).startswith(NEEDED):
        del config["transformers_weights"]
