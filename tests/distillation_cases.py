"""What the tests of distillation share: tasks of every kind, and all losses written out item by item in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from helpers import LENGTH, VOCABULARY, Gradients, arguments, ragged_rows, tiny_bert
from models import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

from hf_prune import DistillationConfig, DistillationTrainer

Rows = list[dict[str, Any]]
Pairs = dict[str, list[tuple[int, int]]]

ALL_LOSSES = DistillationConfig(temperature=2.0, alpha_task=0.3, alpha_logits=0.5, alpha_hidden=0.7)
EVERY_LOSS = DistillationConfig(
    alpha_task=0.3, alpha_logits=0.5, alpha_hidden=0.7, alpha_hidden_layers=0.2, alpha_attention=0.4, alpha_simkd=0.6
)
#: With the losses by layer, the closest layers paired.
LAYERED = DistillationConfig(
    alpha_task=0.3, alpha_logits=0.5, alpha_hidden=0.7, alpha_hidden_layers=0.2, alpha_attention=0.4, layer_map="dynamic"
)
#: Of a teacher that is wider and deeper than the student, and has more heads.
WIDE = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 4}


# ----------------------------------------------------------------------------------------------------------------------- tasks


def sequence_task(seed: int, count: int, **config: Any) -> tuple[PreTrainedModel, Rows]:
    """Three classes."""
    rows = ragged_rows(count)
    return tiny_bert(seed=seed, num_labels=3, **config), [row | {"labels": index % 3} for index, row in enumerate(rows)]


def multi_label_task(seed: int, count: int, **config: Any) -> tuple[PreTrainedModel, Rows]:
    """Three labels, any of which may hold."""
    model, rows = sequence_task(seed, count, **config)
    return model, [row | {"labels": [float(index & bit > 0) for bit in (1, 2, 4)]} for index, row in enumerate(rows)]


def regression_task(seed: int, count: int, **config: Any) -> tuple[PreTrainedModel, Rows]:
    """One output, labels that are floats."""
    rows = ragged_rows(count)
    return tiny_bert(seed=seed, num_labels=1, **config), [row | {"labels": math.sin(index)} for index, row in enumerate(rows)]


def token_task(seed: int, count: int, **config: Any) -> tuple[PreTrainedModel, Rows]:
    """Three classes; padding and every third token are ignored, and the second row and the last two rows as a whole."""
    rows = ragged_rows(count)
    for index, row in enumerate(rows):
        ignored = index in (1, count - 2, count - 1)
        row["labels"] = [
            -100 if ignored or not real or position % 3 == 0 else token % 3
            for position, (token, real) in enumerate(zip(row["input_ids"], row["attention_mask"]))
        ]
    return tiny_bert("token-classification", seed=seed, num_labels=3, **config), rows


def question_task(seed: int, count: int, **config: Any) -> tuple[PreTrainedModel, Rows]:
    """Answers within the row, but for every fifth, whose answer was cut off."""
    rows = ragged_rows(count)
    for index, row in enumerate(rows):
        del row["labels"]
        cut = LENGTH if index % 5 == 4 else 0
        row |= {"start_positions": cut + index % 3, "end_positions": cut + 2 + index % 2}
    return tiny_bert("question-answering", seed=seed, **config), rows


def causal_task(seed: int, count: int, **config: Any) -> tuple[PreTrainedModel, Rows]:
    """Next tokens; padding is ignored."""
    rows = ragged_rows(count)
    for row in rows:
        row["labels"] = [token if real else -100 for token, real in zip(row["input_ids"], row["attention_mask"])]
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return tiny("gpt2", "causal-lm", seed, **dropout, **config), rows


def masked_task(seed: int, count: int, **config: Any) -> tuple[PreTrainedModel, Rows]:
    """Every fourth token is to be restored."""
    rows = ragged_rows(count)
    for row in rows:
        reals = zip(row["input_ids"], row["attention_mask"])
        row["labels"] = [token if real and position % 4 == 1 else -100 for position, (token, real) in enumerate(reals)]
    return tiny_bert("masked-lm", seed=seed, **config), rows


def translation_task(seed: int, count: int, **config: Any) -> tuple[PreTrainedModel, Rows]:
    """An encoder-decoder repeats the first two to five tokens."""
    rows = ragged_rows(count)
    for index, row in enumerate(rows):
        size = min(2 + index % 4, sum(row["attention_mask"]))
        row["labels"] = row["input_ids"][:size] + [-100] * (5 - size)
    return tiny("t5", "seq2seq-lm", seed, dropout_rate=0.0, **config), rows


TASKS = {
    "sequence": sequence_task,
    "multi-label": multi_label_task,
    "regression": regression_task,
    "token": token_task,
    "question": question_task,
    "causal": causal_task,
    "masked": masked_task,
    "translation": translation_task,
}


# ------------------------------------------------------------------------------------------------------------------- references


def slow_divergence(student: Tensor, teacher: Tensor, temperature: float, several: bool = False) -> Tensor:
    """T²·Σ p·log(p/q) of one item, written out; squared error of a single output; one Bernoulli a label if `several` may hold."""
    if student.numel() == 1:
        return (student - teacher).square().sum()
    if several:
        p, q = (teacher / temperature).sigmoid(), (student / temperature).sigmoid()
        each = [p[i] * (p[i] / q[i]).log() + (1 - p[i]) * ((1 - p[i]) / (1 - q[i])).log() for i in range(len(p))]
        return temperature**2 * sum(each) / len(each)
    p, q = (teacher / temperature).softmax(0), (student / temperature).softmax(0)
    return temperature**2 * sum(p[i] * (p[i].log() - q[i].log()) for i in range(len(p)))


def slow_attention(student: Tensor, teacher: Tensor) -> Tensor:
    """KL between the rows `[heads, keys]` of one query, head by head, or between the means of all heads."""
    if len(student) != len(teacher):
        student, teacher = student.mean(0, keepdim=True), teacher.mean(0, keepdim=True)
    seen = teacher[0] > 0
    return (teacher[:, seen] * (teacher[:, seen] / student[:, seen]).log()).sum(dim=1).mean()


def forward(model: PreTrainedModel, row: dict[str, Any]) -> Any:
    names = ["input_ids", "attention_mask"] + ["labels"] * model.config.is_encoder_decoder
    inputs = {name: torch.tensor([row[name]]) for name in names}
    return model(**inputs, output_hidden_states=True, output_attentions=True)


def stacks(row: dict[str, Any], *outputs: Any) -> Iterator[tuple[str, list[bool], list[Any], list[Any]]]:
    """Name, mask, hidden states (of each of `outputs`) and attention maps of each stack."""
    if "decoder_hidden_states" in outputs[0]:
        masks = {"encoder": [real == 1 for real in row["attention_mask"]], "decoder": [label != -100 for label in row["labels"]]}
        for name, mask in masks.items():
            yield name, mask, [out[f"{name}_hidden_states"] for out in outputs], [out[f"{name}_attentions"] for out in outputs]
    else:
        mask = [real == 1 for real in row["attention_mask"]]
        yield "layers", mask, [out.hidden_states for out in outputs], [out.attentions for out in outputs]


def projected(projections: dict[str, Tensor], name: str, states: Tensor) -> Tensor:
    return states @ projections[name].T if name in projections else states


def slow_losses(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Rows,
    settings: DistillationConfig,
    pairs: Pairs | None = None,
    projections: dict[str, Tensor] | None = None,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Every loss of one optimizer step, row by row and item by item. The models have eager attention."""
    items: dict[str, list[Tensor]] = {name: [] for name in settings.weights()}
    projections = projections or {}
    for row in rows:
        ours = forward(student, row)
        with torch.no_grad():
            theirs = forward(teacher, row)
        for stack, mask, hidden, maps in stacks(row, ours, theirs):
            last = stack != "encoder"
            for position in (index for index, real in enumerate(mask) if real):
                if last and settings.alpha_hidden:
                    state = projected(projections, "hidden", hidden[0][-1][0, position])
                    items["hidden"].append((state - hidden[1][-1][0, position]).square().mean())
                mapped, attention = [], []
                for one, two in (pairs or {}).get(stack, []):
                    if settings.alpha_hidden_layers:
                        state = projected(projections, f"hidden_layers_{stack}", hidden[0][one + 1][0, position])
                        mapped.append((state - hidden[1][two + 1][0, position]).square().mean())
                    if settings.alpha_attention and maps[0][one].shape[1]:
                        attention.append(slow_attention(maps[0][one][0, :, position], maps[1][two][0, :, position]))
                items["hidden_layers"] += [sum(mapped) / len(mapped)] if mapped else []
                items["attention"] += [sum(attention) / len(attention)] if attention else []
        if settings.alpha_simkd:
            features = [classifier_input(model, row) for model in (student, teacher)]
            items["simkd"].append((projected(projections, "simkd", features[0]) - features[1]).square().mean(-1).mean())
        task, logits = slow_outputs(student, ours, theirs, row, settings.temperature, smoothing)
        items["task"] += task
        items["logits"] += logits
    return {name: torch.stack(values).mean() for name, values in items.items() if values}


def classifier_input(model: PreTrainedModel, row: dict[str, Any]) -> Tensor:
    """What BERT's classifier sees of one row: the pooled output, or its tokens."""
    inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
    with torch.set_grad_enabled(model.bert.embeddings.word_embeddings.weight.requires_grad):
        outputs = model.bert(**inputs)
    pooled = outputs.pooler_output
    return pooled if pooled is not None else outputs.last_hidden_state[0, : sum(row["attention_mask"])]


def slow_outputs(
    student: PreTrainedModel, ours: Any, theirs: Any, row: dict[str, Any], temperature: float, smoothing: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The task loss and the logits loss of each item of a row."""
    task, logits = [], []
    if "labels" not in row:
        for name in ("start", "end") if row["start_positions"] < LENGTH else ():
            mine, its = ours[f"{name}_logits"][0], theirs[f"{name}_logits"][0]
            task.append(F.cross_entropy(mine, torch.tensor(row[f"{name}_positions"])))
            size = sum(row["attention_mask"])
            logits.append(slow_divergence(mine[:size], its[:size], temperature))
        return task, logits
    labels, mine, its = row["labels"], ours.logits[0], theirs.logits[0]
    if isinstance(labels, list) and isinstance(labels[0], float):
        task.append(F.binary_cross_entropy_with_logits(mine, torch.tensor(labels, dtype=mine.dtype)))
        logits.append(slow_divergence(mine, its, temperature, several=True))
        return task, logits
    per_token = isinstance(labels, list)
    shifted = labels[1:] if per_token and "GPT2" in type(student).__name__ else labels
    for label, one, other in zip(shifted, mine, its) if per_token else [(labels, mine, its)]:
        if label == -100:
            continue
        if isinstance(label, float):
            task.append((one - label).square().sum())
        else:
            task.append(F.cross_entropy(one, torch.tensor(label), label_smoothing=smoothing))
        logits.append(slow_divergence(one, other, temperature))
    return task, logits


def slow_closest(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows, projections: dict[str, Tensor]
) -> dict[str, list[tuple[int, int]]]:
    """The dynamic map of one batch: of all maps that never go down, layer by layer the one with the least distance."""
    sums: dict[tuple[str, int, int], float] = {}
    for row in rows:
        with torch.no_grad():
            for stack, mask, (mine, its), _ in stacks(row, forward(student, row), forward(teacher, row)):
                for one in range(1, len(mine)):
                    for two in range(1, len(its)):
                        state = projected(projections, f"hidden_layers_{stack}", mine[one][0])
                        gaps = (state - its[two][0]).square().mean(-1)[torch.tensor(mask)]
                        sums[stack, one - 1, two - 1] = sums.get((stack, one - 1, two - 1), 0.0) + float(gaps.sum())
    pairs: Pairs = {}
    for stack in dict.fromkeys(key[0] for key in sums):
        depth = 1 + max(key[2] for key in sums if key[0] == stack)
        for one in range(1 + max(key[1] for key in sums if key[0] == stack)):
            lowest = pairs[stack][-1][1] if one else 0
            best = min(range(lowest, depth), key=lambda two: sums[stack, one, two])
            pairs.setdefault(stack, []).append((one, best))
        assert all(before[1] <= after[1] for before, after in pairwise(pairs[stack]))
    return pairs


# --------------------------------------------------------------------------------------------------------------------- training


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in double precision with eager attention."""
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    return twin


class AllGradients(Gradients):
    """Also those of the projections, as `projections.…`."""

    def __init__(self) -> None:
        super().__init__()
        self.trainer: DistillationTrainer | None = None

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        super().on_pre_optimizer_step(*args, model=model, **kwargs)
        assert self.trainer is not None
        for name, parameter in self.trainer.projections.named_parameters():
            self.steps[-1][f"projections.{name}"] = parameter.grad.clone()


def distiller(
    folder: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel | str | Path | None,
    rows: Any,
    settings: DistillationConfig = ALL_LOSSES,
    callbacks: list[TrainerCallback] | None = None,
    trainer: dict[str, Any] | None = None,
    **overrides: Any,
) -> DistillationTrainer:
    """A trainer that takes the rows in their order."""
    return DistillationTrainer(
        student,
        arguments(folder, **{"train_sampling_strategy": "sequential", "max_grad_norm": 0.0} | overrides),
        train_dataset=rows,
        callbacks=callbacks,
        teacher=teacher,
        distillation=settings,
        **trainer or {},
    )


def train(
    folder: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel | str | Path | None,
    rows: Any,
    settings: DistillationConfig = ALL_LOSSES,
    **overrides: Any,
) -> tuple[DistillationTrainer, list[dict[str, Tensor]]]:
    """Train in the order of the rows. Returns the trainer and the gradients of each step."""
    gradients = AllGradients()
    trainer = distiller(folder, student, teacher, rows, settings, [gradients], **overrides)
    gradients.trainer = trainer
    trainer.train()
    return trainer, gradients.steps


def training_logs(trainer: Trainer) -> list[dict[str, float]]:
    """The log of each optimizer step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# ----------------------------------------------------------------------------------------------------------- teachers on disk


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[MASK]": 98} | {f"t{index}": index for index in range(1, VOCABULARY)}
    plain = Tokenizer(WordLevel(words, unk_token="[PAD]"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", mask_token="[MASK]", padding_side=side)


def collator_for(task: str, side: str = "right", **settings: Any) -> Any:
    if task == "token":
        return DataCollatorForTokenClassification(tokenizer(side), **settings)
    if task in ("causal", "masked", "translation"):
        return DataCollatorForSeq2Seq(tokenizer(side), **settings)
    return DataCollatorWithPadding(tokenizer(side), **settings)


class Counted:
    """How often a model is called."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.calls = 0
        model.register_forward_pre_hook(self)

    def __call__(self, *args: Any) -> None:
        self.calls += 1
