"""How far a condensed model is from the masked one: outputs, gradients, what is generated."""

from __future__ import annotations

import copy

import models
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune import condense, condense_plan
from hf_prune.model import find_blocks


def tensors(value: object) -> list[Tensor]:
    """The floating-point tensors in nested outputs, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def outputs(model: PreTrainedModel, attention: str = "eager") -> list[Tensor]:
    """All hidden states, logits and what else the model puts out, on a ragged batch."""
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return tensors(dict(model(**models.ragged_batch(model), output_hidden_states=True, return_dict=True)))


def gap(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference; not a number if one is not."""
    assert len(before) == len(after) > 0
    return float(torch.stack([(one - other).abs().max() for one, other in zip(before, after)]).max())


def gradient_gap(model: PreTrainedModel) -> float:
    """Mask two units of each block, condense: the largest difference of gradients, relative to a parameter's largest above one."""
    for block in find_blocks(model):  # dead on both sides, so that the masked model's survivors get no other gradient
        models.zero_units(block, [2, 3], "out")
        if block.units_per_group == 1:
            models.zero_units(block, [2, 3], "in")
    plan = condense_plan(copy.deepcopy(model))
    _loss(model).backward()
    masked = gradients(model)
    condense(model)
    model.zero_grad()
    _loss(model).backward()
    condensed = gradients(model)

    kept: dict[str, Tensor] = {}
    for block in plan.blocks:
        features = (~block.dead_features).nonzero().flatten()
        for part, outputs in block.block.outputs_of(block.kept, block.groups):
            kept |= {f"{part.name}.weight": outputs, f"{part.name}.bias": outputs}
        layer = block.block.name.removesuffix(block.block.key)
        for _, _, entry in block.block.by_head:
            heads = block.kept if entry.role == "query" else block.groups
            number = block.block.num_units if entry.role == "query" else block.block.num_groups
            gradient = masked[layer + entry.path]
            apart = gradient.unflatten(entry.dim, (number, -1)).index_select(entry.dim, heads)
            masked[layer + entry.path] = apart.flatten(entry.dim, entry.dim + 1)
        if (output := f"{block.block.output.name}.weight") in masked:  # nothing reads the last layouts of LiLT
            masked[output] = masked[output][:, features]
        table = f"{block.block.name}.{getattr(block.block.spec, 'position_table', '')}.weight"
        if table in masked and not model.config.hf_prune["layers"]:  # an ordinary T5, whose position bias is cut along
            masked[table] = masked[table][:, block.heads]
    gaps = []
    for name, gradient in condensed.items():
        wanted = masked[name][kept[name]] if name in kept else masked[name]
        gaps.append(float((gradient - wanted).abs().max()) / max(1.0, float(wanted.abs().max())))
    return max(gaps)


def _loss(model: PreTrainedModel) -> Tensor:
    """The loss of a classifier; of another model a number that all of its outputs matter for."""
    batch = models.ragged_batch(model)
    if "Classification" not in type(model).__name__:
        return torch.stack([value.square().mean() for value in tensors(dict(model(**batch)))]).sum()
    loss: Tensor = model(**batch, labels=torch.tensor([0, 1, 1, 0])).loss
    return loss


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients by parameter name, weights as `[out, in]`."""
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    named = ((name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None)
    return {name: gradient.T if name in conv1d else gradient for name, gradient in named}


def check_generation(model: PreTrainedModel, family: str, beams: int = 1) -> None:
    """Generate for a left-padded batch, condense, generate: tokens and logits are the same."""
    inputs = {"input_ids": torch.tensor([[7, 8, 9], [0, 6, 4]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    if family == "whisper":
        inputs = {"input_features": models.ragged_batch(model)["input_features"]}
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "num_beams": beams}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    before = model.generate(**inputs, **settings)
    after = condense(model).generate(**inputs, **settings)
    if family == "whisper":  # puts its sequences together itself
        assert before.equal(after) if isinstance(before, Tensor) else before["sequences"].equal(after["sequences"])
        return
    assert len(before.logits) == 9
    assert before.sequences.equal(after.sequences)
    assert gap(list(before.logits), list(after.logits)) <= 1e-5
