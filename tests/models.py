"""The tiny random models that the tests share: one table of families, one of task heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_prune.architectures import AttentionBlock, Block, find_blocks

#: Three layers of four heads of width 8 and 40 neurons; hidden sizes, and the names of the fields, differ by family.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: transformers.BertConfig(**_bert_like()),
    "roberta": lambda: transformers.RobertaConfig(**_bert_like(type_vocab_size=1)),
    "electra": lambda: transformers.ElectraConfig(**_bert_like(embedding_size=16)),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=40, max_position_embeddings=40
    ),
}

#: Task head → Auto class.
HEADS: dict[str, type] = {
    "bare": transformers.AutoModel,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "multiple-choice": transformers.AutoModelForMultipleChoice,
}


def _bert_like(**changes: int) -> dict[str, int]:
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 40,
    }
    return {**sizes, **changes}


def tiny(family: str = "bert", head: str = "sequence-classification", seed: int = 0, **config: object) -> PreTrainedModel:
    """A tiny model with random weights, in evaluation mode. `config`: changes to the family's config."""
    torch.manual_seed(seed)
    settings = FAMILIES[family]()
    settings.update(config)
    return randomize(HEADS[head].from_config(settings)).eval()


@torch.no_grad()
def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Give every bias and every LayerNorm random non-zero values, and weights a size at which every unit matters."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.2)
    return model


def ragged_batch(model: PreTrainedModel, rows: int = 4, tokens: int = 11, seed: int = 1) -> dict[str, Tensor]:
    """A right-padded batch of random tokens; each row is shorter than the one before."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(tokens) < torch.linspace(tokens, 2, rows).long()[:, None]).long()
    ids = torch.randint(5, model.config.vocab_size, (rows, tokens), generator=generator)
    batch = {"input_ids": torch.where(mask.bool(), ids, model.config.pad_token_id or 0), "attention_mask": mask}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.randint(model.config.type_vocab_size, (rows, tokens), generator=generator)
    if "MultipleChoice" in type(model).__name__:
        batch = {name: value[None] for name, value in batch.items()}
    return batch


@torch.no_grad()
def zero_units(block: Block, units: list[int], how: str) -> None:
    """Zero some heads or neurons of a block. `how`: `"in"` (value or up rows), `"out"` (output or down columns), `"query"`."""
    width = block.head_size if isinstance(block, AttentionBlock) else 1
    features = [unit * width + offset for unit in units for offset in range(width)]
    if how == "out":
        (block.output if isinstance(block, AttentionBlock) else block.down).module.weight[:, features] = 0
    elif how == "query":
        block.query.module.weight[features] = 0
    else:
        (block.value if isinstance(block, AttentionBlock) else block.up).module.weight[features] = 0


def prune_randomly(model: PreTrainedModel, seed: int = 0) -> dict[str, int]:
    """Zero random units of each block, each by its rows or its columns; the first attention and the second FFN block lose all.

    Returns how many units each block has left, by the block's name.
    """
    generator = torch.Generator().manual_seed(seed)
    left = {}
    for number, block in enumerate(find_blocks(model)):
        count = block.num_heads if isinstance(block, AttentionBlock) else block.num_neurons
        dead = torch.rand(count, generator=generator) < (1.0 if number in (0, 3) else 0.5)
        by_rows = torch.rand(count, generator=generator) < 0.5
        zero_units(block, (dead & by_rows).nonzero().flatten().tolist(), "in")
        zero_units(block, (dead & ~by_rows).nonzero().flatten().tolist(), "out")
        left[block.name] = count - int(dead.sum())
    return left
