"""A stand-in for a model: the same modules with weights at which everything matters, to try on it what must not touch the model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def stand_in(model: PreTrainedModel, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A model of the same class and config, on the CPU, in evaluation mode, every parameter random, the same on every call.

    No head, neuron, bias, norm or scale of a layer is zero or one in it, whatever they are in the model. The model, and torch's
    random state, stay as they are.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        try:
            made: Any = type(model)(copy.deepcopy(model.config))
        except TypeError:  # a class that is not made of its config alone
            made = copy.deepcopy(model).requires_grad_()
        made = made.to("cpu", dtype).eval()
        randomize(made)
    return made  # type: ignore[no-any-return]


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give every parameter random values: matrices of a size at which no softmax saturates, vectors around what they were.

    What a family does not train (tables of sines, which some do not save) stays as it is.
    """
    done: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in done or not parameter.requires_grad:
                continue
            done.add(id(parameter))
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter.add_(0.2 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.5 * noise)
            else:
                inputs = parameter.shape[0] if isinstance(module, Conv1D) else parameter[0].numel()
                parameter.copy_(0.7 * inputs**-0.5 * noise)
