"""The full workflow in two minutes, offline: fine-tune a tiny BERT, prune half its heads and neurons, condense, reload, compare.

The task is synthetic. A sentence such as "the young hen was chased by the quiet wolf in the night" either makes sense (the larger
animal chases the smaller one) or does not. Swapping the animals flips the label, so the words alone are not informative: a
bag-of-words classifier, printed for comparison, stays near 50 %; word order and the direction of the verb decide.

Training, pruning and condensing are `run_glue.py`'s, called with the arguments that its command line takes.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import rich
import run_glue
from datasets import disable_progress_bars
from rich.table import Table
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging

from hf_prune import PruningConfig, PruningRule
from hf_prune.measure.latency import benchmark

#: The output folder; each run recreates it.
HOME = Path(__file__).parents[1] / "runs" / "quickstart"

SEED = 0
TRAIN_ROWS, VALIDATION_ROWS = 4000, 1000

#: From small to large.
ANIMALS = ["ant", "bee", "moth", "frog", "mouse", "rat", "hen", "cat", "fox", "goat", "wolf", "lion", "bear", "whale"]
LARGE_TO_SMALL = ("chased", "caught", "scared", "carried")
SMALL_TO_LARGE = ("fled from", "hid from", "was chased by", "was carried by")
ADJECTIVES = ("", "", "young ", "old ", "brown ", "quiet ")
ENDINGS = ("", " yesterday", " in the night", " near the river", " after the rain", " they say")

Row = dict[str, str]


def make_rows(count: int, seed: int) -> list[Row]:
    """Sentences with the label "sense" or "nonsense", half of each. In 70 % the verb implies a larger subject."""
    choose = random.Random(seed)
    rows = []
    for index in range(count):
        small, large = sorted(choose.sample(ANIMALS, 2), key=ANIMALS.index)
        sense, down = index % 2 == 0, choose.random() < 0.7
        first, second = (large, small) if sense == down else (small, large)
        nouns = [f"the {choose.choice(ADJECTIVES)}{animal}" for animal in (first, second)]
        verb = choose.choice(LARGE_TO_SMALL if down else SMALL_TO_LARGE)
        sentence = f"{nouns[0]} {verb} {nouns[1]}{choose.choice(ENDINGS)}"
        rows.append({"sentence": sentence, "label": "sense" if sense else "nonsense"})
    return rows


def bag_of_words_accuracy(train: list[Row], validation: list[Row]) -> float:
    """Accuracy of logistic regression on word counts."""
    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000))
    model.fit([row["sentence"] for row in train], [row["label"] for row in train])
    return float(model.score([row["sentence"] for row in validation], [row["label"] for row in validation]))


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, trained on these texts."""
    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.train_from_iterator(sentences, WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]))
    special = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def make_start(folder: Path, sentences: list[str]) -> None:
    """Save a tiny BERT with random weights and its tokenizer, from which training starts."""
    tokenizer = make_tokenizer(sentences)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=8,
        intermediate_size=512,
        max_position_embeddings=64,
    )
    set_seed(SEED)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def halve_heads_and_neurons() -> PruningConfig:
    """Prune half of the heads and half of the neurons, wherever in the model they matter least."""
    return PruningConfig(
        warmup_epochs=0.5,
        cooldown_epochs=2,
        frequency=10,
        rules=[PruningRule(pattern=pattern, target_sparsity=0.5) for pattern in ("head", "neuron")],
    )


def run_jobs(home: Path) -> dict[str, dict[str, float]]:
    """Fine-tune, then prune and condense the result; return the metrics of both runs."""
    common = [
        f"--train_file={home / 'train.jsonl'}",
        f"--validation_file={home / 'validation.jsonl'}",
        "--do_train",
        "--do_eval",
        "--per_device_train_batch_size=32",
        "--per_device_eval_batch_size=100",
        "--warmup_steps=0.1",
        "--logging_steps=125",
        "--save_strategy=no",
        "--use_cpu",
        f"--seed={SEED}",
    ]
    start, dense, pruned, config = (home / name for name in ("start", "dense", "pruned", "pruning_config.json"))
    halve_heads_and_neurons().to_json_file(config)
    rich.print("\n[bold]1. Fine-tune[/bold]")
    fine_tuned = run_glue.main(
        [f"--model_name_or_path={start}", f"--output_dir={dense}", "--learning_rate=1e-3", "--num_train_epochs=4", *common]
    )
    rich.print("\n[bold]2. Prune half of the heads and neurons with distillation, condense, save, reload[/bold]")
    shrunk = run_glue.main(
        [
            f"--model_name_or_path={dense}",
            f"--output_dir={pruned}",
            "--do_prune",
            f"--pruning_config={config}",
            "--distill_alpha_logits=0.9",
            "--learning_rate=1e-3",
            "--num_train_epochs=5",
            *common,
        ]
    )
    return {"dense": fine_tuned, "pruned": shrunk}


def size_on_disk(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def compare(home: Path, metrics: dict[str, dict[str, float]]) -> Table:
    """The closing table: dense, masked and condensed, each as loaded from disk."""
    folders = {"dense": home / "dense", "masked": home / "pruned", "condensed": home / "pruned" / "condensed"}
    accuracy = {
        "dense": metrics["dense"]["eval_accuracy"],
        "masked": metrics["pruned"]["eval_accuracy"],
        "condensed": metrics["pruned"]["reloaded_accuracy"],
    }
    models = {name: AutoModelForSequenceClassification.from_pretrained(folder) for name, folder in folders.items()}
    sentences = [row["sentence"] for row in make_rows(32, SEED)]
    batch = AutoTokenizer.from_pretrained(home / "dense")(sentences, padding=True, return_tensors="pt")
    milliseconds = benchmark(models, dict(batch))
    table = Table(
        title=f"Half of the heads and neurons, each model as loaded from disk; batches of {len(sentences)} rows, one thread"
    )
    for column in ("", "accuracy", "parameters", "weights on disk", "CPU ms per batch"):
        table.add_column(column, justify="right" if column else "left")
    for name, model in models.items():
        table.add_row(
            name,
            f"{accuracy[name]:.3f}",
            f"{model.num_parameters():,}",
            f"{size_on_disk(folders[name]) / 1e6:.2f} MB",
            f"{milliseconds[name]:.2f}",
        )
    return table


def main() -> None:
    disable_progress_bars()
    logging.disable_progress_bar()  # of files; that of the training stays
    train, validation = make_rows(TRAIN_ROWS, SEED), make_rows(VALIDATION_ROWS, SEED + 1)
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    write_rows(HOME / "train.jsonl", train)
    write_rows(HOME / "validation.jsonl", validation)
    make_start(HOME / "start", [row["sentence"] for row in train])

    metrics = run_jobs(HOME)
    condensed = HOME / "pruned" / "condensed"
    rich.print("", compare(HOME, metrics))
    rich.print(f"A bag of words reaches {bag_of_words_accuracy(train, validation):.3f}.")
    rich.print(f"The condensed model and its card are in {condensed}")


if __name__ == "__main__":
    main()
