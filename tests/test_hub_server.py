"""Push with the real huggingface_hub client to a Hub on loopback, and load back by id: by import, and by trust_remote_code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from card_cases import FACTS, HALF, halved
from hub_server import Hub, metadata_errors, run_with_hub, serving
from huggingface_hub import ModelCard
from reloading import save_tokenizer
from safetensors.torch import save_file

from hf_prune import condense
from hf_prune.hub import write_card

ROOT = Path(__file__).parents[1]

#: What a pruned model's repository holds, besides `.gitattributes`.
WHOLE = {
    "config.json",
    "model.safetensors",
    "pruning_config.json",
    "pruning_facts.json",
    "README.md",
    "pictures/kept.png",
    "pictures/history.png",
}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}

#: One process pushes: a masked model by the function, a condensed one by its folder, and a Trainer's run.
PUSH = """
import sys
from pathlib import Path
from card_cases import FACTS, HALF, accuracy, halved, rows
from helpers import arguments, tiny_bert
from transformers import AutoTokenizer, Trainer
from hf_prune import ModelCardCallback, PruningCallback, push_to_hub

folder = Path(sys.argv[1])
commit = push_to_hub(
    halved(how="out"), "me/masked", config=HALF, facts=FACTS, processing_class=AutoTokenizer.from_pretrained(folder), private=True
)
assert commit.oid in commit.commit_url
push_to_hub(folder, "me/condensed")
push_to_hub(folder, "me/condensed", revision="v2", commit_message="again")
try:
    push_to_hub(folder, "me/condensed", private=True)
except ValueError as error:
    assert "me/condensed exists already and is public" in str(error)
else:
    raise AssertionError("a private model was published")

args = arguments(folder.parent / "run", max_steps=3, hub_model_id="me/trained", push_to_hub=True)
callbacks = [PruningCallback(HALF), ModelCardCallback(dataset="glue", license="apache-2.0")]
settings = {"train_dataset": rows(24), "eval_dataset": rows(16), "compute_metrics": accuracy, "callbacks": callbacks}
trainer = Trainer(tiny_bert(), args, **settings)
trainer.evaluate()
trainer.train()
trainer.evaluate()
trainer.push_to_hub()
"""

#: One process loads everything, knowing the ids alone.
LOAD = """
import json, sys
import torch, transformers
from safetensors.torch import load_file
way, expected = sys.argv[1:]
if way == "import":
    import hf_prune
else:
    sys.modules["hf_prune"] = None  # importing it fails, as where it is not installed
remote = {"trust_remote_code": True} if way == "remote" else {}
report = {}
tensors = load_file(expected)
inputs = {name.removeprefix("input."): value for name, value in tensors.items() if name.startswith("input.")}
for repo in ("me/masked", "me/condensed"):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(repo, **remote)
    with torch.no_grad():
        report[repo] = float((model(**inputs).logits - tensors[repo]).abs().max())
report["parameters"] = model.num_parameters()
pipe = transformers.pipeline("text-classification", "me/condensed", **remote)
report["pipeline"] = pipe("two three five")[0]["score"]
again = transformers.AutoModelForSequenceClassification.from_pretrained("me/condensed", revision="v2", **remote)
report["v2"] = again.num_parameters()
report["trained"] = transformers.AutoModelForSequenceClassification.from_pretrained("me/trained").num_parameters()
if way == "remote":
    try:
        transformers.AutoModelForSequenceClassification.from_pretrained("me/condensed", trust_remote_code=False)
    except Exception as error:
        report["stock"] = str(error)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[Hub, str]]:
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def pushed(hub: tuple[Hub, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder with what the pushed models say, and the size of the condensed one; they are on the Hub afterwards."""
    folder = tmp_path_factory.mktemp("hub") / "condensed"
    masked, small = halved(how="out"), condense(halved(how="out"))
    batch = models.ragged_batch(masked)
    batch["input_ids"] %= 7  # the tokenizer's words
    with torch.no_grad():
        logits = {"me/masked": masked(**batch).logits, "me/condensed": small(**batch).logits}
    small.save_pretrained(folder)
    save_tokenizer(folder)
    write_card(folder, small, HALF, FACTS, "me/condensed")
    for name in ("optimizer.pt", ".env", "id_rsa", "token", "data.csv", "wandb/run", "checkpoint-2/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be published")
    (folder / "stray.json").symlink_to(folder.parent / "expected.safetensors")
    save_file({**{f"input.{name}": value for name, value in batch.items()}, **logits}, folder.parent / "expected.safetensors")
    result = run_with_hub(
        PUSH, folder, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]), endpoint=hub[1], home=folder.parent / "home"
    )
    assert result.returncode == 0, result.stderr
    return folder, small.num_parameters()


def test_everything_that_belongs_to_a_model_is_there(hub: tuple[Hub, str], pushed: tuple[Path, int]) -> None:
    files = {repo: set(branches["main"]) - {".gitattributes"} for repo, branches in hub[0].branches.items()}
    assert files["me/masked"] == WHOLE | TOKENIZER
    assert files["me/condensed"] == WHOLE | TOKENIZER | {"modeling_hf_prune.py"}
    assert files["me/trained"] >= WHOLE
    assert hub[0].private == {"me/masked": True, "me/condensed": False, "me/trained": False}
    assert hub[0].branches["me/condensed"]["v2"] == hub[0].branches["me/condensed"]["main"]
    assert {"model.safetensors", "pictures/kept.png"} <= hub[0].by_lfs
    folder = pushed[0]
    for name in WHOLE | TOKENIZER:
        assert hub[0].branches["me/condensed"]["main"][name] == (folder / name).read_bytes()


def test_the_card_of_a_trainer_is_ours(hub: tuple[Hub, str], pushed: tuple[Path, int]) -> None:
    files = hub[0].branches["me/trained"]["main"]
    card = files["README.md"].decode()
    assert 'from_pretrained("me/trained")' in card
    assert "license: apache-2.0" in card
    assert "model-index" in card
    assert "generated_from_trainer" not in card
    assert json.loads(files["pruning_config.json"])["target_sparsity"] == 0.5
    assert metadata_errors(card) == []


@pytest.mark.parametrize("way", ["import", "remote"])
def test_models_load_by_id(way: str, hub: tuple[Hub, str], pushed: tuple[Path, int], tmp_path: Path) -> None:
    folder, parameters = pushed
    (tmp_path / "here").mkdir()
    path = {} if way == "import" else {"PYTHONPATH": ""}
    expected = folder.parent / "expected.safetensors"
    result = run_with_hub(LOAD, way, expected, endpoint=hub[1], home=tmp_path / "here" / "home", **path)
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert report["me/masked"] <= 1e-6
    assert report["me/condensed"] <= 1e-6
    assert report["parameters"] == report["v2"] == parameters < report["trained"]
    assert 0 < report["pipeline"] < 1
    assert way == "import" or "pip install hf-prune" in report["stock"]


def test_the_hub_refuses_bad_metadata() -> None:
    card = ModelCard("---\nlicense: Not A License\nmodel-index:\n- name: x\n  results:\n  - task: {}\n---\n# x\n", True)
    assert metadata_errors(str(card.content)) == ['"license" is not valid']
    broken = "---\nmodel-index:\n- name: x\n  results:\n  - task:\n      type: y\n---\n"
    assert metadata_errors(broken) == ['"model-index" is not valid']
    assert metadata_errors("---\ntags: x\n---\n") == ['"tags" is not valid']
