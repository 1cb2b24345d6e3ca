"""Condensing: turn a model with dead heads and neurons into a smaller model that computes the same.

`plan.py` finds what is dead from the zeros in the weights, `cutting.py` carries it out: `resize.py` removes units, `layers.py`
whole layers. `format.py` defines how the config records it, and `verify.py` checks that the outputs are unchanged; `snapshot.py`
undoes failed changes. `stock.py` writes the sizes into the family's own config fields if possible, and `refusal.py` makes stock
code refuse the checkpoint if not.
"""

from __future__ import annotations

import logging
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..model import spec_for
from ..model.attached import is_attached
from ..model.wrappers import bare_model, transformers_model
from .cutting import cut
from .layers import layer_counts
from .plan import BlockPlan, CondensePlan, condense_plan, dead_units
from .refusal import needs_hf_prune
from .resize import shrink
from .snapshot import all_or_nothing, own_configs
from .stock import is_condensed, smaller, stock_config, write_sizes
from .verify import compare, observe, sample_batch

__all__ = [
    "BlockPlan",
    "CondensePlan",
    "condense",
    "condense_plan",
    "dead_units",
    "is_condensed",
    "layer_counts",
    "needs_hf_prune",
    "nothing_to_cut",
    "sample_batch",
    "shrink",
    "smaller",
    "stock_config",
]

logger = logging.getLogger(__name__)

Model = TypeVar("Model")


def condense(model: Model, verify: bool = True, pad_to_multiple_of: int | None = None, uniform: bool = False) -> Model:
    """Remove dead heads, neurons and layers from a model, however they were zeroed; see [`condense_plan`] for what counts as dead.

    Whatever a dead unit still added for every input alike is folded into the bias of the output projection, which gets one if it
    has none, so the smaller model computes what the masked one did (in evaluation, or with attention dropout 0: dropout breaks the
    sum to one that makes a head without values constant). Modes, attention implementation, dtype, device and `requires_grad` are
    kept (but parameters without elements are frozen); parameters of shrunk modules are new objects, so an optimizer has to be made
    anew. So is `model.config`, which may be shared with another model; its `hf_prune` then holds the sizes (see `format.py`).
    If all layers have the same sizes and the family's config fields can express them, the sizes are written there, and the model is
    an ordinary one (`stock.py`), which loads without hf_prune, and in other frameworks. `uniform` makes that a condition.

    A layer with nothing left that only adds to its input (pre-norm) is removed too, if that is exact; see `layers.py`.
    `output_hidden_states` then lacks one entry: the input of the removed layer. A post-norm layer keeps its LayerNorms.

    Under LoRA the merged weights determine what is dead, and base model and adapters shrink together. Adapters saved later load
    onto the condensed base model (`model.unload()`), which is saved like any other.

    Args:
        model: a transformers model, or an object that holds one: a `PeftModel`, a SentenceTransformer, a SetFitModel, a custom
            module. The transformers model in it is changed in place, all or nothing; the wrapper's `save_pretrained` saves it.
        verify: compare every hidden state and output before and after, eager and sdpa, on a ragged padded batch, in float64, for
            about twice the time of condensing. A fresh process grows by up to 0.2 of the model's memory, verified or not, one that
            has condensed before by up to 0.4 (BERT-base in float32 and a Llama of half a billion parameters in bfloat16;
            `scripts/benchmarks/benchmark_verification.py`).
        pad_to_multiple_of: keep enough dead neurons to make each block's size a multiple of this. Some matrix kernels are slow on
            widths that are not a multiple of 8, and none that was measured on a CPU gains by 16: on an AMD CPU 8 was enough,
            on an Intel one with AVX-512 and AMX a neuron costs the same at any width, to within 3 % in float32 and 7 % in bfloat16
            (1024 tokens; `scripts/benchmarks/benchmark_padding.py` measures it). The default keeps none.
        uniform: raise where the result is not an ordinary model. No unit goes for that: `scope="local"` makes layers equal while
            they are pruned.

    Returns:
        The same model object. A warning is logged if there was nothing to remove.

    Raises:
        TypeError: not a transformers model.
        RuntimeError: a `Pruner` is attached, or verification failed (differences above 1e-5 in float32; see `verify.tolerance`).
        ValueError: see [`condense_plan`]; or `uniform`, and something is in the way, which is named.
    """
    whole, body = bare_model(model), transformers_model(model)
    distributed = isinstance(model, nn.Module) and whole is not model
    if distributed or not isinstance(body, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; allowed: a transformers PreTrainedModel, or an object that holds one. "
            "Unwrap distributed wrappers first."
        )
    if str(getattr(getattr(model, "active_peft_config", None), "peft_type", "")).endswith("PREFIX_TUNING"):
        raise ValueError("model has learned keys and values for every head (prefix tuning); condense it without them.")
    if is_attached(body):
        raise RuntimeError("a Pruner is attached to the model; call `pruner.finish()` or `release()` before condensing it.")
    plan = condense_plan(body, pad_to_multiple_of)
    if plan.empty:
        _say_sizes(body, uniform)
        logger.warning(nothing_to_cut(body, pad_to_multiple_of))
        return model
    with all_or_nothing(whole) as snapshot:
        before = observe(body) if verify else None
        own_configs(whole)
        cut(body, plan, snapshot.select)
        _say_sizes(body, uniform)
        if before is not None:
            compare(before, observe(body, before), body.dtype, plan.removed)
    return model


def _say_sizes(model: PreTrainedModel, uniform: bool) -> None:
    """Let the config of the family say the sizes of a condensed model, if it can.

    Raises:
        ValueError: it cannot, and `uniform` says that it must.
    """
    said = getattr(model.config, "hf_prune", None)
    if said and (reason := write_sizes(model, spec_for(model.config.model_type))) and uniform:
        raise ValueError(
            f"uniform=True, but {reason}; nothing was changed. scope='local' makes layers equal while they are pruned, and without "
            "uniform=True the model is condensed as it is."
        )


def nothing_to_cut(model: PreTrainedModel, pad_to_multiple_of: int | None) -> str:
    """A sentence about why a model with an empty plan stays as it is."""
    if pad_to_multiple_of is not None and not condense_plan(model).empty:
        return f"There is nothing to cut out: pad_to_multiple_of={pad_to_multiple_of} keeps all dead neurons."
    return (
        f"There is nothing to cut out: no head, neuron or layer of this {type(model).__name__} is dead. Zeros of other patterns, "
        "such as 2:4 or 1x1, stay in place; see `to_sparse` for what can run them."
    )
