"""The command lines of Intel Neural Compressor's walkthrough for Hugging Face models, with nothing changed but paths and data."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path

import pytest
import quickstart
import run_glue_no_trainer
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

from hf_prune import PruningConfig, sparsity_report

SCRIPTS = Path(__file__).parents[1] / "scripts"

MRPC = """run_glue_no_trainer.py --model_name_or_path MODEL --task_name "mrpc" --max_length 128
    --per_device_train_batch_size 16
    --learning_rate 1e-3 --num_train_epochs 15 --weight_decay 1e-3 --do_prune --output_dir OUT --cooldown_epochs 5
    --sparsity_warm_epochs 1 --target_sparsity {target} --pruning_pattern "{pattern}" --pruning_frequency 50
    --lr_scheduler_type "constant" --distill_loss_weight 5"""
SST2 = """run_glue_no_trainer.py --model_name_or_path MODEL --task_name "sst2" --max_length 128
    --per_device_train_batch_size 16
    --learning_rate 5e-5 --distill_loss_weight 2.0 --num_train_epochs 15 --weight_decay 5e-5 --cooldown_epochs 5
    --sparsity_warm_epochs 0 --lr_scheduler_type "constant" --do_prune --output_dir OUT --target_sparsity {target}
    --pruning_pattern "{pattern}" --pruning_frequency 500"""
MIXED = """run_glue_no_trainer_mixed.py --model_name_or_path MODEL --task_name "mrpc" --max_length 128
    --per_device_train_batch_size 16
    --learning_rate 1e-3 --num_train_epochs 15 --weight_decay 1e-3 --do_prune --output_dir OUT --cooldown_epochs 5
    --sparsity_warm_epochs 1 --target_sparsity 0.9 --lr_scheduler_type "constant" --distill_loss_weight 5"""
#: Command line and the share of zeros it asks for.
PRUNING = {
    "2:4 on MRPC": (MRPC.format(target=0.5, pattern="2:4"), 0.5),
    "2:4 on SST-2": (SST2.format(target=0.5, pattern="2:4"), 0.5),
    "4x1 on MRPC": (MRPC.format(target=0.9, pattern="4x1"), 0.9),
    "4x1 on SST-2": (SST2.format(target=0.9, pattern="4x1"), 0.9),
    "1xchannel on MRPC": (MRPC.format(target=0.9, pattern="1xchannel"), 0.9),
    "1xchannel on SST-2": (SST2.format(target=0.9, pattern="1xchannel"), 0.9),
    "DistilBERT": (
        """run_glue_no_trainer.py --model_name_or_path DISTILBERT --task_name "mrpc" --max_length 256
    --per_device_train_batch_size 16 --learning_rate 1e-4 --num_train_epochs 120 --weight_decay 0 --cooldown_epochs 40
    --sparsity_warm_epochs 0 --lr_scheduler_type "constant" --distill_loss_weight 2 --do_prune --output_dir OUT
    --target_sparsity 0.9 --pruning_pattern "4x1" --pruning_frequency 50""",
        0.9,
    ),
}
DENSE = {
    "MRPC": """run_glue_no_trainer.py --model_name_or_path MODEL --task_name "mrpc" --max_length 128
    --per_device_train_batch_size 16
    --learning_rate 5e-5 --num_train_epoch 5 --weight_decay 5e-5 --output_dir OUT""",
    "SST-2": """run_glue_no_trainer.py --model_name_or_path MODEL --task_name "sst2" --max_length 128
    --per_device_train_batch_size 32 --learning_rate 5e-5 --num_train_epochs 10 --output_dir OUT""",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, and GLUE as a folder of tiny files."""
    folder = tmp_path_factory.mktemp("walkthrough")
    rows = [{**row, "label": int(row["label"] == "sense")} for row in quickstart.make_rows(32, seed=3)]
    quickstart.make_start(folder / "bert", [str(row["sentence"]) for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}
    DistilBertForSequenceClassification(DistilBertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "distilbert")
    tokenizer.save_pretrained(folder / "distilbert")
    for task in ("mrpc", "sst2"):
        (folder / "glue" / task).mkdir(parents=True)
        quickstart.write_rows(folder / "glue" / task / "train.jsonl", rows[:24])
        quickstart.write_rows(folder / "glue" / task / "validation.jsonl", rows[24:])
    return folder


def run(command: str, home: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, float]:
    """Run a command line of the walkthrough with these paths, on the CPU."""
    monkeypatch.setenv("HF_PRUNE_GLUE_DIR", str(home / "glue"))
    paths = {"MODEL": home / "bert", "DISTILBERT": home / "distilbert", "OUT": out}
    script, *flags = [str(paths.get(word, word)) for word in shlex.split(command)]
    metrics = importlib.import_module(Path(script).stem).main([*flags, "--use_cpu", *more])
    assert json.loads((out / "all_results.json").read_text()) == metrics
    return metrics


@pytest.mark.parametrize("name", PRUNING)
def test_pruning(name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, target = PRUNING[name]
    metrics = run(command, home, tmp_path / "out", monkeypatch)
    assert "eval_accuracy" in metrics
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert sparsity_report(model).sparsity == pytest.approx(target, abs=5e-3)
    config = PruningConfig.from_pretrained(tmp_path / "out")
    assert config.target_sparsity == target
    assert config.pattern is not None
    assert config.pattern in command


def test_mixed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of a rule win over those of the command line, which win over the file's global ones."""
    run(MIXED, home, tmp_path / "out", monkeypatch)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    zeros = {module.name: module.sparsity for module in sparsity_report(model).modules}
    single = {name: share for name, share in zeros.items() if name.endswith(("output.dense", "intermediate.dense"))}
    blocks = {name: share for name, share in zeros.items() if name.endswith(("query", "key", "value"))}
    assert all(share == pytest.approx(0.9, abs=1e-3) for share in single.values())
    assert all(0.5 <= share <= 0.98 for share in blocks.values())
    assert sum(blocks.values()) / len(blocks) == pytest.approx(0.9, abs=1e-3)
    query = model.bert.encoder.layer[0].attention.self.query.weight.view(-1, 4, 128)
    assert ((query == 0).all(dim=1) == (query == 0).any(dim=1)).all()
    assert PruningConfig.from_pretrained(tmp_path / "out").cooldown_epochs == 5


@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = run(DENSE[name], home, tmp_path / "out", monkeypatch)
    assert ("eval_f1" in metrics) == (name == "MRPC")
    trained, start = (AutoModelForSequenceClassification.from_pretrained(path) for path in (tmp_path / "out", home / "bert"))
    assert sparsity_report(trained).sparsity == 0
    assert not torch.equal(trained.classifier.weight, start.classifier.weight)
    assert not (tmp_path / "out" / "condensed").exists()


HALVED = """run_glue_no_trainer.py --model_name_or_path MODEL --task_name mrpc --output_dir OUT --per_device_train_batch_size 4
    --num_train_epochs 2 --gradient_accumulation_steps 2 --seed 3 --do_prune --pruning_pattern neuron --target_sparsity 0.5
    --pruning_frequency 1 --pruning_cooldown_steps 1 --learning_rate 1e-3 --distill_alpha_hidden 1"""


@pytest.mark.parametrize(("every", "checkpoint"), [("2", "step_2"), ("epoch", "epoch_0")])
def test_resumed_is_uninterrupted(every: str, checkpoint: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on from within an epoch, or from its end, ends with the same model, masks and card."""
    whole = run(HALVED, home, tmp_path / "out", monkeypatch, "--checkpointing_steps", every, "--dropout", "0.1")
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    facts = json.loads((tmp_path / "out" / "pruning_facts.json").read_text())
    go_on = ("--dropout", "0.1", "--resume_from_checkpoint", str(tmp_path / "out" / checkpoint))
    assert run(HALVED, home, tmp_path / "out", monkeypatch, *go_on) == whole
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    assert json.loads((tmp_path / "out" / "pruning_facts.json").read_text()) == facts
    assert whole["eval_accuracy"] == whole["condensed_accuracy"] == whole["reloaded_accuracy"]
    models = [AutoModelForSequenceClassification.from_pretrained(tmp_path / path) for path in ("out", "out/condensed")]
    assert models[1].num_parameters() < models[0].num_parameters()
    assert "accuracy" in (tmp_path / "out" / "condensed" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distill_loss_weight", "1", "--distill_alpha_task", "1"], "distill_loss_weight=1.0: .*distill_alpha_task"),
        (["--checkpointing_steps", "now"], "checkpointing_steps='now'"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint='nowhere'"),
        (["--mixed_precision", "int8"], "mixed_precision='int8'"),
        (
            ["--do_prune", "--pruning_pattern", "head", "--target_speedup", "2", "3"],
            r"target_speedup=\[2\.0, 3\.0\]: is a family, which run_glue",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors_say_which_argument(flags: list[str], message: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run_glue_no_trainer.main(["--model_name_or_path", str(home / "bert"), "--output_dir", str(tmp_path), "--use_cpu", *flags])
