"""The losses, as pure functions of tensors. Each is a sum over its items, so that any mean can be made of parts of a batch.

Sources:
    logits: Hinton et al. 2015, https://arxiv.org/abs/1503.02531.
    hidden states: TinyBERT, Jiao et al. 2020, https://arxiv.org/abs/1909.10351, equation 8; on the last one alone, the recipes of
        Intel Neural Compressor.
    attention maps: MiniLM, Wang et al. 2020, https://arxiv.org/abs/2002.10957, equation 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Takes the place of the logits of padding; its softmax is 0, and differences of two stay finite.
_NEVER = -1e9


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    problem_type: str | None = None,
    indices: Tensor | None = None,
) -> Tensor:
    """T²·KL(teacher/T ‖ student/T), or the squared error of a regression, summed over the items of `mask`.

    Args:
        student: `[..., classes]`.
        teacher: `[..., classes]`, or `[..., k]` with `indices`.
        mask: bool `[...]`, the items that count.
        temperature: divides the logits of both; a regression has none.
        problem_type: as in the config of transformers' models. `"multi_label_classification"` compares a Bernoulli distribution a
            label, mean over the labels; `"regression"` is the squared error, mean over the outputs; everything else compares
            softmax distributions. None: a regression when there is one output.
        indices: int `[..., k]`, the classes that the teacher's logits are of. The teacher's distribution is then that of its k
            classes alone, the student's still that of all classes.
    """
    student, teacher = student.float(), teacher.float()
    if problem_type == "regression" or (problem_type is None and student.shape[-1] == 1):
        return ((student - teacher).square().mean(dim=-1) * mask).sum()
    student, teacher = student / temperature, teacher / temperature
    if problem_type == "multi_label_classification":
        both = [(F.logsigmoid(sign * teacher), F.logsigmoid(sign * student)) for sign in (1, -1)]
        divergence = torch.stack([log_p.exp() * (log_p - log_q) for log_p, log_q in both]).sum(dim=0) / student.shape[-1]
    else:
        log_q, log_p = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
        if indices is not None:
            log_q = log_q.gather(-1, indices)
        divergence = log_p.exp() * (log_p - log_q)
    return (divergence.sum(dim=-1) * mask).sum() * temperature**2


def without_padding(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits over positions, `[batch, tokens]`, so that padding gets no probability. `tokens`: bool `[batch, tokens]`."""
    return logits.float().masked_fill(~tokens, _NEVER)


def token_weights(tokens: Tensor, length: int) -> Tensor:
    """The weight of each position of `[sequences, length]`, float.

    Args:
        tokens: bool `[sequences, length]`, which positions are no padding; or `[sequences, 1]` for inputs whose positions are not
            known in advance (images, sound): a sequence then counts 1 as a whole.
    """
    return tokens.float() if tokens.shape[1] == length else tokens.float().expand(-1, length) / length


def hidden_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Squared error, mean over the hidden size, weighted sum over tokens. `[batch, tokens, hidden]`, weights `[batch, tokens]`."""
    return ((student.float() - teacher.float()).square().mean(dim=-1) * weights).sum()


def attention_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """KL(teacher ‖ student) of attention distributions, mean over heads, weighted sum over queries.

    Heads are compared one to one when both have equally many. Otherwise, as after heads were pruned, the means over the heads are
    compared, since heads no longer correspond. Keys that the student pays no attention at all, because they are
    masked or dropped out, are left out: attention dropout then changes the gradient by noise only.

    Args:
        student, teacher: `[batch, heads, queries, keys]`, each row of keys a distribution.
        weights: `[batch, queries]`.
    """
    student, teacher = student.float(), teacher.float()
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
    log_q = student.masked_fill(student == 0, 1).log()
    log_p = teacher.masked_fill(teacher == 0, 1).log()
    divergence = (teacher * (log_p - log_q)).masked_fill(student == 0, 0).sum(dim=-1)
    return (divergence.mean(dim=1) * weights).sum()


def pooled_weights(tokens: Tensor) -> Tensor:
    """Weights of tokens such that every sequence counts 1 as a whole. `tokens`: bool `[sequences, tokens]`."""
    return tokens.float() / tokens.sum(dim=-1, keepdim=True).clamp(min=1)


def distances(student: list[Tensor], teacher: list[Tensor], weights: Tensor) -> Tensor:
    """The hidden loss of every student layer and every teacher layer, `[student layers, teacher layers]`, without gradients."""
    with torch.no_grad():
        return torch.stack([torch.stack([hidden_loss(one, other, weights) for other in teacher]) for one in student])
