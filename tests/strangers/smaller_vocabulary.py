"""transformers alone, without hf_prune: loads every model below a folder and its tokenizer, and uses them. Argument: the folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


class Absent:
    """Whatever is installed, hf_prune is not here."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "hf_prune":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Absent())  # type: ignore[arg-type]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
report: dict[str, dict[str, Any]] = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    texts, auto, task, rows = (json.loads((folder / "expected.json").read_text())[key] for key in ("texts", "auto", "task", "ids"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, auto).from_pretrained(folder)
    expected = load_file(folder / "expected.safetensors")
    inputs = {name.removeprefix("input."): value for name, value in expected.items() if name.startswith("input.")}
    row = report[folder.name] = {"class": type(tokenizer).__name__, "module": type(model).__module__.partition(".")[0]}
    row["same tokens"] = tokenizer(texts)["input_ids"] == rows
    row["gap"] = float((model(**inputs).logits - expected["logits"]).abs().max())
    if "generated" in expected:
        start = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
        made = model.generate(**start, max_new_tokens=5, do_sample=False)
        row["generates the same"] = torch.equal(made, expected["generated"])
    if task is not None:
        text = texts[0] if task != "fill-mask" else f"{texts[0]} {tokenizer.mask_token}"
        settings = {"max_new_tokens": 3} if task == "text-generation" else {}
        found = transformers.pipeline(task, str(folder))(text, **settings)
        row["pipeline"] = bool(found)
assert "hf_prune" not in sys.modules
print(json.dumps(report))
