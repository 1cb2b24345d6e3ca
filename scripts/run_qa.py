"""Fine-tune, prune and condense an extractive question-answering model on data in SQuAD's format.

An example has `id`, `question`, `context` and `answers` with lists `text` and `answer_start`; both are empty if the context has no
answer (SQuAD 2). Files hold a list of examples, or SQuAD's own nesting of articles and paragraphs.

Arguments for pruning and distillation, and output files, are those of `run_glue.py`; in addition, `predict_predictions.json` has
the answers for the test file. The script is self-contained: copy it and change it.
"""

from __future__ import annotations

import json
import logging
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub.constants import HF_HUB_OFFLINE
from numpy.typing import NDArray
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_prune.training.arguments import DataArguments, ModelArguments, needed_splits, parse_arguments
from hf_prune.training.stage import Task, load_model, run_stage

logger = logging.getLogger(__name__)

Row = dict[str, Any]
COLUMNS = ("id", "question", "context")


@dataclass
class DataTrainingArguments(DataArguments):
    """The data, its preprocessing, and how answers are chosen."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data on the Hub, such as rajpurkar/squad."})
    max_seq_length: int = field(default=384, metadata={"help": "Maximum number of tokens per window, question included."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that neighbouring windows of a context share."})
    n_best_size: int = field(default=20, metadata={"help": "Number of start and end candidates per window."})
    max_answer_length: int = field(default=30, metadata={"help": "Maximum number of tokens of an answer."})
    version_2_with_negative: bool = field(default=False, metadata={"help": "Some questions have no answer, as in SQuAD 2."})
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={"help": "Predict no answer if its score exceeds that of the best answer by more than this."},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.doc_stride < self.max_seq_length:
            raise ValueError(f"doc_stride={self.doc_stride}: must be less than max_seq_length={self.max_seq_length}.")

    @property
    def choice(self) -> dict[str, Any]:
        """The settings of [`best_answers`]."""
        threshold = self.null_score_diff_threshold if self.version_2_with_negative else None
        return {
            "n_best_size": self.n_best_size,
            "max_answer_length": self.max_answer_length,
            "null_score_diff_threshold": threshold,
        }


# -------------------------------------------------------------------------------------------------------------------------- files


def load_squad(files: dict[str, str], dataset_name: str | None) -> DatasetDict:
    """The data from files, or from the Hub if there are none.

    Raises:
        ValueError: neither is given, or a file is not in SQuAD's format; names the file.
    """
    if files:
        return DatasetDict({split: Dataset.from_list(read_squad(file)) for split, file in files.items()})
    if dataset_name is None:
        raise ValueError("Give --dataset_name, or --train_file and --validation_file.")
    return load_dataset(dataset_name)


def read_squad(file: str) -> list[Row]:
    """The examples of a `.json` file (nested, a list, or `{"data": list}`) or of a `.jsonl` file."""
    text = Path(file).read_text(encoding="utf-8")
    try:
        found = [json.loads(line) for line in text.splitlines() if line] if file.endswith(".jsonl") else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: is not valid JSON ({error}).") from None
    rows = found.get("data", []) if isinstance(found, dict) else found
    examples = [example for row in rows for example in (_nested(row) if "paragraphs" in row else [row])]
    if not examples:
        raise ValueError(f"{file}: has no questions.")
    return [_checked(file, number, example) for number, example in enumerate(examples)]


def _nested(article: Row) -> Iterator[Row]:
    for paragraph in article["paragraphs"]:
        for question in paragraph["qas"]:
            yield {**question, "context": paragraph["context"]}


def _checked(file: str, number: int, example: Row) -> Row:
    """The required columns, with the answers as lists of texts and of starts."""
    for name in (*COLUMNS, "answers"):
        if name not in example:
            raise ValueError(f"{file}: example {number} has no {name!r}, only {', '.join(example)}.")
    answers = example["answers"]
    if isinstance(answers, list):
        answers = {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
    starts, texts = answers["answer_start"], answers["text"]
    for start, text in zip(starts, texts):
        if example["context"][start : start + len(text)] != text:
            raise ValueError(f"{file}: answer {text!r} of example {number} is not at {start} in its context.")
    return {**{name: str(example[name]) for name in COLUMNS}, "answers": {"text": list(texts), "answer_start": list(starts)}}


# ------------------------------------------------------------------------------------------------------------------------ windows


def windows(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, doc_stride: int, keep: bool = False
) -> Dataset:
    """Cut each example into as many rows as its context needs, with the tokens of the answer as labels.

    Args:
        examples: in SQuAD's format.
        tokenizer: a fast one.
        max_seq_length: tokens of a row.
        doc_stride: tokens that neighbouring rows of one context share.
        keep: keep `example` (its number) and `offsets` (characters of each token of the context, else -1), which [`best_answers`]
            needs.

    Returns:
        Rows with `start_positions` and `end_positions`, both 0 (the first token) if the row does not hold the answer.
    """

    def encode(rows: Row, numbers: list[int]) -> Row:
        encoded = tokenizer(
            [question.strip() for question in rows["question"]],  # leading spaces would take up tokens of the context
            rows["context"],
            truncation="only_second",
            max_length=min(max_seq_length, tokenizer.model_max_length),
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        sources, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        of_context = [
            [pair if part == 1 else (-1, -1) for pair, part in zip(pairs, encoded.sequence_ids(row))]
            for row, pairs in enumerate(offsets)
        ]
        spans = [_span(rows["answers"][source], pairs) for source, pairs in zip(sources, of_context)]
        encoded["start_positions"], encoded["end_positions"] = map(list, zip(*spans))
        if keep:
            encoded["example"], encoded["offsets"] = [numbers[source] for source in sources], of_context
        return dict(encoded)

    return examples.map(encode, batched=True, with_indices=True, remove_columns=examples.column_names)


def _span(answers: Row, offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """The first and the last token of the first answer; (0, 0) if the window does not hold all of it."""
    if not answers["text"]:
        return 0, 0
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    inside = [place for place, (first, last) in enumerate(offsets) if first < end and last > start and first >= 0]
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


# ------------------------------------------------------------------------------------------------------------------------ answers


def best_answers(
    logits: tuple[NDArray[Any], NDArray[Any]],
    rows: Dataset,
    examples: Dataset,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    null_score_diff_threshold: float | None = None,
) -> list[str]:
    """The text with the highest sum of start and end logit, over all windows of each example.

    Args:
        logits: of starts and of ends, `[rows, tokens]` each.
        rows: the rows from [`windows`], with `keep`, in the order of the logits.
        examples: the examples that they were cut from.
        n_best_size: number of start and end candidates per window.
        max_answer_length: maximum number of tokens.
        null_score_diff_threshold: predict no answer, `""`, if the first token's score exceeds that of the best answer by more than
            this. None: there is always an answer.
    """
    best = [(-np.inf, "") for _ in range(len(examples))]
    null = np.full(len(examples), np.inf)
    contexts = examples["context"]
    for number, offsets, starts, ends in zip(rows["example"], rows["offsets"], *logits):
        null[number] = min(null[number], starts[0] + ends[0])
        tokens = np.array([place for place, (first, _) in enumerate(offsets) if first >= 0], dtype=int)
        first, last = (tokens[np.argsort(-scores[tokens], kind="stable")[:n_best_size]] for scores in (starts, ends))
        for start in first:
            for end in last:
                score = starts[start] + ends[end]
                if start <= end < start + max_answer_length and score > best[number][0]:
                    best[number] = score, contexts[number][offsets[start][0] : offsets[end][1]]
    if null_score_diff_threshold is None:
        return [text for _, text in best]
    return ["" if null[number] - score > null_score_diff_threshold else text for number, (score, text) in enumerate(best)]


def metrics_for(
    rows: Dataset, examples: Dataset, find: Callable[..., list[str]], without_answers: bool
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Exact match and F1 in percent, from `evaluate` if its module is available, else computed here, with the same values.

    Args:
        rows: the rows from [`windows`], with `keep`.
        examples: the examples that they were cut from.
        find: [`best_answers`] with its settings.
        without_answers: whether there are questions without an answer (SQuAD 2).
    """
    module = metric_module("squad_v2" if without_answers else "squad")
    answers = list(examples["answers"])

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        found = find(prediction.predictions[:2], rows, examples)
        if module is None:
            return squad_scores(found, [answer["text"] for answer in answers])
        extra = {"no_answer_probability": 0.0} if without_answers else {}
        predictions = [{"id": name, "prediction_text": text, **extra} for name, text in zip(examples["id"], found)]
        references = [{"id": name, "answers": answer} for name, answer in zip(examples["id"], answers)]
        scores = module.compute(predictions=predictions, references=references)
        return {"exact_match": float(scores["exact" if without_answers else "exact_match"]), "f1": float(scores["f1"])}

    return compute


def squad_scores(found: list[str], answers: list[list[str]]) -> dict[str, float]:
    """The mean over the questions of the best match with any of their answers, in percent (Rajpurkar et al. 2016, section 6.1).

    A question without answers is matched only by `""`.
    """
    pairs = [(text, texts or [""]) for text, texts in zip(found, answers)]
    exact = [max(float(_normalized(text) == _normalized(answer)) for answer in texts) for text, texts in pairs]
    overlap = [max(_f1(text, answer) for answer in texts) for text, texts in pairs]
    return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}


def _normalized(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(text: str, answer: str) -> float:
    words, wanted = _normalized(text), _normalized(answer)
    common = sum((Counter(words) & Counter(wanted)).values())
    if not words or not wanted:
        return float(words == wanted)
    return 2 * common / (len(words) + len(wanted))


@cache
def metric_module(*name: str) -> Any:
    """A metric of `evaluate`, or None if it is not available, looked for once. `name`: as for `evaluate.load`."""
    if HF_HUB_OFFLINE:
        return None
    try:
        import evaluate

        return evaluate.load(*name)
    except (ImportError, OSError) as error:
        logger.info("evaluate's metric %s is not available (%s); the same values are computed here.", " ".join(name), error)
        return None


# ------------------------------------------------------------------------------------------------------------------------------ job


def load_task(model_args: ModelArguments, data_args: DataTrainingArguments, args: TrainingArguments) -> tuple[Task, DatasetDict]:
    """The task, and the examples before they were cut into windows.

    Raises:
        ValueError: the data does not fit the arguments, or the run would mix up the windows of its examples.
    """
    if args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "train_sampling_strategy='group_by_length': must be 'random' here; it changes the order in evaluation too."
        )
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer, **model_args.remote)
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer_name={tokenizer.name_or_path!r}: must be a fast tokenizer, which knows each token's characters."
        )
    examples = data_args.select(load_squad(data_args.files(), data_args.dataset_name), needed_splits(args))
    cut = partial(windows, tokenizer=tokenizer, max_seq_length=data_args.max_seq_length, doc_stride=data_args.doc_stride)
    data = DatasetDict({split: cut(rows, keep=split != "train") for split, rows in examples.items()})
    task = Task(
        load=partial(load_model, AutoModelForQuestionAnswering),
        tokenizer=tokenizer,
        data=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        card={"dataset": data_args.dataset_name, "dataset_split": "validation"} if data_args.dataset_name else {},
    )
    if "validation" in data:
        find = partial(best_answers, **data_args.choice)
        task.compute_metrics = metrics_for(data["validation"], examples["validation"], find, data_args.version_2_with_negative)
    return task, examples


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the job that the arguments (by default the command line's) describe; return its metrics."""
    parsed = parse_arguments(DataTrainingArguments, sys.argv[1:] if arguments is None else arguments)
    model_args, data_args, training_args, pruning_args, distillation_args = parsed
    task, examples = load_task(model_args, data_args, training_args)

    def predict(trainer: Trainer, task: Task) -> None:
        plain = replace(task, compute_metrics=None).evaluator(trainer.model, training_args)
        found = best_answers(
            plain.predict(task.data["test"]).predictions[:2], task.data["test"], examples["test"], **data_args.choice
        )
        if trainer.is_world_process_zero():
            file = Path(str(training_args.output_dir), "predict_predictions.json")
            file.write_text(json.dumps(dict(zip(examples["test"]["id"], found)), indent=2, ensure_ascii=False) + "\n")

    set_seed(training_args.seed)  # weights of a new head are random
    teacher = distillation_args.teacher_model_name_or_path
    return run_stage(
        task,
        model=model_args.load(task.load),
        args=training_args,
        pruning=pruning_args.to_config(),
        distillation=distillation_args.to_config(),
        teacher=None if teacher is None else task.load(teacher),
        pad_to_multiple_of=model_args.pad_to_multiple_of,
        predict=predict,
    )


if __name__ == "__main__":
    main()
