"""A smaller hidden size, in every family that can have one: shapes, reload, exactness, repair, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from command_line import CommandLine
from helpers import assert_equal, snapshot
from reloading import reload, save_expected
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune import ConfigError, Pruner, PruningConfig, condense, model_card, shrink_hidden, to_sparse
from hf_prune.measure.sparsity import original_blocks, stock_twin, total_sparsity
from hf_prune.model import find_blocks, spec_for
from hf_prune.model.residual import members
from hf_prune.shrink import hidden as hidden_module
from hf_prune.shrink.basis import Basis, principal, with_scale
from hf_prune.shrink.look import look
from hf_prune.shrink.narrow import narrow
from hf_prune.shrink.plans import rotation
from hf_prune.shrink.repair import DAMPING

#: Why some families cannot have another hidden size.
REFUSED = {
    "mpnet": "relative_attention_bias.weight (32x4), whose shape follows from the hidden size, but not channel by channel",
    **dict.fromkeys(
        ("wav2vec2", "wav2vec2-stable"), "(32x16x8), whose shape follows from the hidden size, but not channel by channel"
    ),
}
FAMILIES = [family for family in models.FAMILIES if family not in REFUSED]
#: Layers share their weights, so they are no chain that can be repaired.
REPAIRED = [family for family in FAMILIES if family != "albert"]
#: The width of a head is in the config.
OWN_WIDTH = ("vit", "deit", "t5", "t5-gated", "llama", "llama-with-biases", "mistral", "qwen2", "qwen3", "gemma")
RMS = ("t5", "t5-gated", "llama", "llama-with-biases", "mistral", "qwen2", "qwen3", "gemma")
#: Families with norms on block inputs alone, each with heads.
ROTATED = [
    (family, head)
    for family in RMS
    for head in ("bare", models.classifier_of(family), models.GENERATORS[family.replace("-with-biases", "")])
] + [
    ("gpt2", "causal-lm"),
    ("gpt2", "sequence-classification"),
    ("opt", "causal-lm"),
    ("vit", "image-classification"),
    ("deit", "image-classification"),
]


def batches(model: PreTrainedModel, number: int = 4) -> list[dict[str, Tensor]]:
    """Calibration data, with padding."""
    return [models.ragged_batch(model, rows=4, seed=seed) for seed in range(number)]


def outputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a model gives for a batch."""
    with torch.no_grad():
        given = dict(model(**models.ragged_batch(model)))
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


def gap(model: PreTrainedModel, wanted: dict[str, Tensor]) -> float:
    """The largest difference of a model's first output from what is wanted, relative to the largest value if that is above 1."""
    name = next(iter(wanted))
    return float((outputs(model)[name].double() - wanted[name].double()).abs().max() / max(1.0, wanted[name].abs().max()))


def error(model: PreTrainedModel, wanted: dict[str, Tensor]) -> float:
    """The norm of the difference of a model's first output from what is wanted, relative to that."""
    name = next(iter(wanted))
    return float((outputs(model)[name] - wanted[name]).norm() / wanted[name].norm())


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype that models really compute in: their norms and softmax are in float32 by themselves."""
    if request.param is torch.float64:
        cast, single = Tensor.to, Tensor.float

        def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            narrows = any(one is torch.float32 for one in (*args, *kwargs.values()))
            return self if narrows and self.dtype is torch.float64 else cast(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, "to", to)
        monkeypatch.setattr(Tensor, "float", lambda self: self if self.dtype is torch.float64 else single(self))
    return request.param


#: How far outputs may be apart that are equal.
EQUAL = {torch.float32: 1e-5, torch.float64: 1e-10}


# ---------------------------------------------------------------------------------------------------------------------- every one


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    check(family, models.classifier_of(family), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head"), [case for case in models.MATRIX if case[0] in FAMILIES])
def test_every_model(family: str, head: str, tmp_path: Path) -> None:
    check(family, head, tmp_path)


def check(family: str, head: str, folder: Path) -> None:
    model = models.tiny(family, head)
    modules, before = list(model.modules()), model.num_parameters()
    stock = {name: tuple(value.shape) for name, value in stock_twin(model, "meta").state_dict().items()}
    assert shrink_hidden(model, 24) is model
    assert list(model.modules()) == modules

    assert model.config.hidden_size == 24
    assert model.num_parameters() < before
    twin = stock_twin(model, "meta")
    assert {name: tuple(value.shape) for name, value in twin.state_dict().items()} == stock
    entry = model.config.hf_prune
    assert entry["original"][hidden_name(model)] == 32
    if family in OWN_WIDTH:
        assert entry["layers"] == {}
    else:
        listed = {sizes["num_attention_heads"] for parts in entry["layers"].values() for sizes in parts.values()}
        assert listed == {4}
        assert model.config.num_attention_heads == 3

    given = model(**models.ragged_batch(model))
    given[0].float().sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    model.save_pretrained(folder)
    again, seen = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(seen.values()), seen
    assert gap(again, outputs(model)) == 0
    numbers = {
        (name, key): value
        for name, module in again.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | tuple) and not key.startswith(("_", "training"))
    }
    for (name, key), value in numbers.items():
        assert getattr(model.get_submodule(name), key) == value, (name, key)


def hidden_name(model: PreTrainedModel) -> str:
    return model.config.attribute_map.get("hidden_size", "hidden_size")


@pytest.mark.parametrize("family", REPAIRED)
def test_what_stays_makes_up_for_what_goes(family: str) -> None:
    head = models.GENERATORS.get(family) or models.classifier_of(family)
    plain, repaired, ranked = (models.tiny(family, head) for _ in range(3))
    wanted, data = outputs(plain), batches(plain)
    shrink_hidden(plain, 24)
    shrink_hidden(repaired, 24, data)
    assert error(repaired, wanted) < 0.8 * error(plain, wanted)
    assert {name: value.shape for name, value in repaired.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    shrink_hidden(ranked, 24, data)
    assert_equal(snapshot(ranked), snapshot(repaired))  # same data, same bits


def test_fresh_processes(tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("uneven", "even", "by-import", "by-remote", "by-stock")]
    for family in FAMILIES:
        head = models.classifier_of(family)
        model = models.tiny(family)
        shrink_hidden(model, 24)
        folder = roots[family in OWN_WIDTH] / f"{family}-{models.HEADS[head].__name__}"
        model.save_pretrained(folder)
        save_expected(model, folder)
    reports = [reload("import", roots[0], roots[2]), reload("remote", roots[2], roots[3]), reload("stock", roots[1], roots[4])]
    for report, number in zip(reports, (len(FAMILIES) - len(OWN_WIDTH), len(FAMILIES) - len(OWN_WIDTH), len(OWN_WIDTH))):
        assert len(report) == number
        assert max(row["gap"] for row in report.values()) <= 1e-6


@pytest.mark.parametrize(("family", "head"), [item for item in models.GENERATORS.items() if item[0] in FAMILIES])
def test_generates(family: str, head: str) -> None:
    model = models.tiny(family, head)
    shrink_hidden(model, 24, batches(model))
    batch = models.ragged_batch(model, rows=2)
    inputs = {name: value for name, value in batch.items() if not name.startswith("decoder")}
    assert len(model.generate(**inputs, max_new_tokens=3, do_sample=False)) == 2


# ------------------------------------------------------------------------------------------------------------------------- exact


@torch.no_grad()
def silence(model: PreTrainedModel, channels: list[int]) -> None:
    """Zero some channels of the stream wherever something is written to it."""
    for member in members(model, spec_for(model.config.model_type)):
        if member.writes and member.kind != "norm" and "out" not in member.apart:
            for key, axes in member.axes.items():
                for dim in axes:
                    if member.side(key, dim) == "out":
                        member.module.get_parameter(key).index_fill_(dim, torch.tensor(channels), 0.0)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("family", RMS)
def test_zero_channels_leave_without_a_difference(family: str, data: bool, dtype: torch.dtype) -> None:
    language = models.GENERATORS.get(family, "causal-lm")
    heads = [("bare", True), (language, True), (language, False)]
    if not family.startswith("t5"):  # whose classifier has channels of its own
        heads.append((models.classifier_of(family), True))
    for head, tied in heads:
        model = models.tiny(family, head, tie_word_embeddings=tied).to(dtype)
        silence(model, [0, 3, 4, 9, 17, 20, 30, 31])
        wanted = outputs(model)
        shrink_hidden(model, 24, batches(model) if data else None)
        if head == "bare":
            kept = [channel for channel in range(32) if channel not in (0, 3, 4, 9, 17, 20, 30, 31)]
            wanted = {name: value[..., kept] for name, value in wanted.items() if name == "last_hidden_state"}
        assert gap(model, wanted) <= EQUAL[dtype], head


@pytest.mark.parametrize(("family", "head"), ROTATED)
def test_a_rotation_before_the_cut_makes_no_difference(family: str, head: str, dtype: torch.dtype) -> None:
    model = models.tiny(family, head).to(dtype)
    spec = spec_for(model.config.model_type)
    found, centred = members(model, spec), family not in RMS
    config = model.config
    if centred:
        config.tie_word_embeddings = False
    whole = type(model)(config).eval()
    seen = look(model, found, hidden_module.calibration(model, batches(model), None, 0.0, False, 0), moments=True)
    assert seen.moments is not None
    every = Basis.of_channels(torch.arange(32), 32)
    plan = rotation(model, whole, found, principal(seen.moments, 32, centred), every, seen)
    narrow(model, whole, found, plan)
    wanted = outputs(model)
    if head == "bare":
        wanted = {name: (value.double() @ plan.stream.matrix).to(dtype) for name, value in wanted.items() if value.shape[-1] == 32}
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, whole.get_parameter(name))]
    assert changed or plan.stream.matrix.abs().max(dim=0).values.allclose(torch.ones(32, dtype=torch.float64))
    assert gap(whole, wanted) <= EQUAL[dtype]


@pytest.mark.parametrize(("family", "head"), ROTATED)
def test_rotated_and_cut(family: str, head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = models.tiny(family, head)
    tied = getattr(model.config, "tie_word_embeddings", False) and head.endswith("-lm")
    wanted = outputs(model)
    shrink_hidden(model, 24, batches(model), rotate=True)
    model.save_pretrained(tmp_path)
    again, seen = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(seen.values()), seen
    assert gap(again, outputs(model)) == 0
    if head != "bare":
        assert error(model, wanted) < 0.95
    if family in ("gpt2", "opt") and tied:
        assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
        assert "lm_head is tied to the embeddings no more, and has 2,376 parameters of its own." in caplog.text
    elif tied:
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert not caplog.records


def test_directions_beat_channels() -> None:
    """In a model whose stream lies in few directions, none of them a channel."""
    gaps = []
    for rotate in (False, True):
        model = models.tiny("llama", "causal-lm")
        mix = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q[:, :24]
        with torch.no_grad():
            for member in members(model, spec_for("llama")):
                for key, axes in member.axes.items():
                    for dim in axes:
                        if member.writes and member.kind != "norm" and member.side(key, dim) == "out":
                            weight = member.module.get_parameter(key)
                            weight.copy_((weight.movedim(dim, -1) @ mix @ mix.T).movedim(-1, dim))
        wanted = outputs(model)
        shrink_hidden(model, 24, batches(model), rotate=rotate)
        gaps.append(gap(model, wanted))
    assert gaps[1] <= 1e-4 < 0.05 < gaps[0]


@pytest.mark.parametrize("centred", [False, True])
def test_principal_directions(centred: bool) -> None:
    values = torch.randn(200, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)
    if centred:
        values = values - values.mean(dim=1, keepdim=True)
    moments = values.T @ values
    basis = principal(moments, 5, centred)
    ones = torch.ones(5, dtype=torch.float64)
    rank = 4 if centred else 5
    kept = float((values @ basis.matrix).square().sum())
    assert kept == pytest.approx(float(torch.linalg.eigvalsh(moments)[-rank:].sum()))
    projector = basis.matrix.T @ basis.matrix
    assert projector.allclose(torch.eye(5, dtype=torch.float64) - (torch.outer(ones, ones) / 5 if centred else 0))
    if centred:
        assert (basis.matrix @ ones).abs().max() < 1e-12


def test_a_scale_in_another_basis() -> None:
    generator = torch.Generator().manual_seed(0)
    some = torch.linalg.qr(torch.randn(12, 5, dtype=torch.float64, generator=generator)).Q
    scale = torch.randn(12, dtype=torch.float64, generator=generator)
    basis, values = with_scale(Basis(some), scale)
    assert (basis.matrix @ basis.matrix.T).allclose(some @ some.T)  # the same directions
    assert (basis.matrix.T @ torch.diag(scale) @ basis.matrix).allclose(torch.diag(values), atol=1e-12)


# ------------------------------------------------------------------------------------------------------------------------ repair


@torch.no_grad()
def test_readers_are_solved_for_by_least_squares() -> None:
    dense, small = models.tiny("qwen2", "causal-lm"), models.tiny("qwen2", "causal-lm")
    data = batches(dense)
    shrink_hidden(small, 24, data)
    kept = kept_channels(dense, small)
    given: dict[str, list[Tensor]] = {"dense": [], "small": []}
    for name, model in (("dense", dense), ("small", small)):
        module = model.model.layers[0].self_attn.q_proj
        handle = module.register_forward_pre_hook(lambda module, args, name=name: given[name].append(args[0]))
        for batch in data:
            model(**batch)
        handle.remove()
    there = torch.cat([batch["attention_mask"].flatten() for batch in data]).bool()
    wanted, inputs = (torch.cat([value.flatten(0, 1) for value in given[name]])[there].double() for name in ("dense", "small"))
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    pull = (DAMPING * inputs.square().sum(dim=0).mean()).sqrt()
    layer, other = (model.model.layers[0].self_attn.q_proj for model in (dense, small))
    old = torch.cat([layer.weight[:, kept].double(), torch.zeros(len(layer.weight), 1)], dim=1)
    rows = torch.cat([inputs, pull * torch.eye(25)])
    solved = torch.linalg.lstsq(rows, torch.cat([wanted @ layer.weight.double().T, pull * old.T])).solution.T
    assert torch.allclose(other.weight.double(), solved[:, :24], atol=1e-5)
    assert torch.allclose(other.bias.double(), layer.bias.double() + solved[:, 24], atol=1e-5)


def kept_channels(dense: PreTrainedModel, small: PreTrainedModel) -> list[int]:
    """The channels of the embeddings that are left, by their values."""
    tables = [model.get_input_embeddings().weight for model in (dense, small)]
    unit = [table / table.norm(dim=0) for table in tables]
    return (unit[1].T @ unit[0]).argmax(dim=1).tolist()


@torch.no_grad()
def test_the_stream_is_what_it_should_be() -> None:
    """Without damping, what the last block adds leaves an error that is orthogonal to what it can still use."""
    dense, small = models.tiny("llama", "causal-lm"), models.tiny("llama", "causal-lm")
    data = batches(dense)
    shrink_hidden(small, 24, data)
    kept, factor = kept_channels(dense, small), (24 / 32) ** 0.5
    errors, taken = [], []
    small.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    for batch in data:
        streams = [model(**batch, output_hidden_states=True).hidden_states[-2].double() for model in (dense, small)]
        errors.append((factor * streams[0][..., kept] - streams[1])[batch["attention_mask"].bool()])
    used = torch.cat([value[batch["attention_mask"].bool()] for value, batch in zip(taken, data)]).double()
    error = torch.cat(errors)
    change = (
        small.model.layers[1].mlp.down_proj.weight.double() - factor * dense.model.layers[1].mlp.down_proj.weight[kept].double()
    )
    pull = DAMPING * used.square().sum(dim=0).mean()
    assert torch.allclose(error.T @ used, pull * change, atol=1e-3 * float((error.T @ used).abs().max() + pull))


def test_data_rank_channels() -> None:
    """A channel with small weights that is large in the data stays."""
    model = models.tiny("bert")
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)):
            norm.weight[:8], norm.bias[:8] = 1e-3, 0.0
    table = model.bert.embeddings.word_embeddings.weight.clone()
    shrink_hidden(model, 24, batches(model))
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, table[:, 8:])


def test_padding_does_not_count() -> None:
    model, other = models.tiny("bert"), models.tiny("bert")
    data = batches(model)
    longer = [
        {name: torch.nn.functional.pad(value, (0, 5), value=7 if name == "input_ids" else 0) for name, value in batch.items()}
        for batch in data
    ]
    shrink_hidden(model, 24, data)
    shrink_hidden(other, 24, longer)
    for one, two in zip(model.parameters(), other.parameters()):
        assert torch.allclose(one, two, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- before and after


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "llama", "t5"])
def test_condensed_before_and_after(family: str, tmp_path: Path) -> None:
    model = models.tiny(family)
    dense = sum(weight.numel() for weight in stock_twin(model, "meta").parameters())
    left = models.prune_randomly(model)
    condense(model)
    shrink_hidden(model, 24, batches(model))
    assert {block.name: block.num_units for block in find_blocks(model)} == left
    assert sum(weight.numel() for weight in stock_twin(model, "meta").parameters()) == dense
    assert {block.name: block.alive for block in original_blocks(model)} == left
    before = total_sparsity(model)
    for block in find_blocks(model):
        if block.kind == "feed_forward" and block.num_units > 4:
            models.zero_units(block, [0, 1], "out")
    condense(model)
    assert total_sparsity(model) > before
    model.save_pretrained(tmp_path)
    again, seen = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(seen.values()), seen
    assert gap(again, outputs(model)) == 0
    shrink_hidden(again, 16, batches(again))
    assert again.config.hf_prune["original"] == model.config.hf_prune["original"]


def test_heads_that_are_as_many_as_the_config_says_need_no_hf_prune(tmp_path: Path) -> None:
    model = models.tiny("bert")
    for block in find_blocks(model):
        if block.kind == "attention":
            models.zero_units(block, [1], "out")
    condense(model)
    shrink_hidden(model, 24)
    assert model.config.hf_prune == {"version": 1, "layers": {}, "original": {"hidden_size": 32, "num_attention_heads": 4}}

    model = models.tiny("bert")  # the other way round
    shrink_hidden(model, 24)
    for block in find_blocks(model):
        if block.kind == "attention":
            models.zero_units(block, [1], "out")
    condense(model)
    assert model.config.hf_prune == {"version": 1, "layers": {}, "original": {"hidden_size": 32, "num_attention_heads": 4}}
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_hf_prune.py").exists()
    assert model.config.num_attention_heads == 3


def test_what_else_is_kept() -> None:
    model = models.tiny("llama", "causal-lm", tie_word_embeddings=True).to(torch.bfloat16)
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].self_attn.attention_dropout = 0.25
    shared = model.config
    state = torch.get_rng_state()
    shrink_hidden(model, 24, batches(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["model.norm.weight"]
    assert {module.training for module in model.model.layers[1].modules()} == {False}
    assert model.training
    assert model.model.layers[0].self_attn.attention_dropout == 0.25
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert shared.hidden_size == 32  # it may be another model's, too


def test_a_model_whose_hidden_size_is_smaller_is_pruned_like_any_other() -> None:
    model = models.tiny("bert")
    shrink_hidden(model, 24)
    pruner = Pruner(model, PruningConfig(pattern="head", target_sparsity=0.5), total_steps=4)
    pruner.release()
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight[:, 1:] = 0
    assert to_sparse(model, "csr").layers


def test_an_adapted_embedding_size_follows() -> None:
    model = models.tiny("electra", embedding_size=32)
    assert not hasattr(model.electra, "embeddings_project")
    shrink_hidden(model, 24)
    assert model.config.embedding_size == 24
    assert model.electra.embeddings.word_embeddings.weight.shape[1] == 24
    assert model.config.hf_prune["original"]["embedding_size"] == 32


def test_default_neurons_stay() -> None:
    model = models.tiny("gpt2", n_inner=None)
    shrink_hidden(model, 24)
    assert model.config.n_inner == 128
    assert model.config.hf_prune["original"]["n_inner"] is None
    assert stock_twin(model, "meta").transformer.h[0].mlp.c_fc.weight.shape == (32, 128)


def test_card_and_report_say_the_size_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.tiny("bert")
    assert "hidden size" not in str(model_card(model))
    shrink_hidden(model, 24)
    assert "| hidden size | 24 of 32 |" in str(model_card(model))
    model.save_pretrained(tmp_path)
    run = CommandLine(capsys)
    assert "24 of 32" in run("inspect", tmp_path)
    facts = run.json("inspect", tmp_path)
    assert facts["smaller"] == {"hidden size": {"now": 24, "before": 32}}


# --------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_are_refused(family: str) -> None:
    with pytest.raises(ConfigError) as error:
        shrink_hidden(models.tiny(family), 24)
    assert REFUSED[family] in str(error.value)


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("bert", 32, "size=32: must be a whole number from 1 to 31; the hidden size is 32."),
        ("bert", 0, "size=0: must be a whole number from 1 to 31"),
        ("bert", 0.75, "size=0.75: must be a whole number from 1 to 31"),
        ("bert", True, "size=True: must be a whole number from 1 to 31"),
        (
            "bert",
            20,
            "size=20: must be a multiple of 8, the width of a head, which follows from the hidden size; "
            "the closest sizes that BertForSequenceClassification can have: 16 and 24.",
        ),
        ("bert", 30, "can have: 24."),
        ("llama", 20, "must be divisible by number of attention heads"),
        ("llama", 20, "the closest sizes that LlamaForSequenceClassification can have: 16 and 24."),
    ],
)
def test_sizes_that_are_refused(family: str, size: Any, message: str) -> None:
    model = models.tiny(family)
    before, config = snapshot(model), model.config.to_dict()
    with pytest.raises(ConfigError) as error:
        shrink_hidden(model, size)
    assert message.replace("must be divisible by number of attention heads", "is refused by LlamaConfig") in str(error.value)
    assert_equal(snapshot(model), before)
    assert model.config.to_dict() == config


def test_models_that_are_refused() -> None:
    model = models.tiny("bert")
    pruner = Pruner(model, PruningConfig(pattern="head"), total_steps=4)
    with pytest.raises(ConfigError, match="is attached to a Pruner"):
        shrink_hidden(model, 24)
    pruner.release()
    with pytest.raises(ConfigError, match="must be a transformers PreTrainedModel"):
        shrink_hidden(torch.nn.Linear(2, 2), 1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is on the meta device"):
        shrink_hidden(stock_twin(model, "meta"), 24)
    with pytest.raises(ValueError, match="has no architecture spec"):
        shrink_hidden(transformers.FNetModel(transformers.FNetConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9)), 4)
    with pytest.raises(ConfigError, match="calls one of its layers 8 times in 4 batches"):
        shrink_hidden(models.tiny("albert"), 24, batches(models.tiny("albert")))


def test_data_that_are_refused() -> None:
    model = models.tiny("bert")
    with pytest.raises(ConfigError, match="must give at least 8 rows"):
        shrink_hidden(model, 24, [])
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="activations that are not finite"):
        shrink_hidden(model, 24, batches(model))


@pytest.mark.parametrize(
    ("family", "head", "message"),
    [
        ("bert", "sequence-classification", r"which the norms between the layers of \w+ tell apart \(post-norm\)"),
        ("whisper", "speech-seq2seq", "has model.encoder.conv2, which reads the stream without a norm"),
        ("gpt2", "bare", "has nothing that reads ln_f and could take over its scale"),
        ("vit", "bare", "before anything is cut"),
        ("modernbert", "sequence-classification", "before anything is cut"),
    ],
)
def test_rotations_that_are_refused(family: str, head: str, message: str) -> None:
    model = models.tiny(family, head)
    before, config = snapshot(model), model.config.to_dict()
    with pytest.raises(ConfigError, match=message):
        shrink_hidden(model, 24, batches(model), rotate=True)
    assert_equal(snapshot(model), before)
    assert model.config.to_dict() == config


def test_a_rotation_needs_data() -> None:
    with pytest.raises(ConfigError, match="rotate=True: needs a dataloader"):
        shrink_hidden(models.tiny("llama"), 24, rotate=True)


def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("bert")
    before, config, wanted = snapshot(model), model.config, outputs(model)

    def broken(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(hidden_module, "_write_config", broken)
    with pytest.raises(MemoryError):
        shrink_hidden(model, 24)
    assert_equal(snapshot(model), before)
    assert model.config is config
    assert gap(model, wanted) == 0


def test_more_heads_than_there_were_are_refused(tmp_path: Path) -> None:
    model = models.tiny("bert")
    shrink_hidden(model, 24)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hf_prune"]["layers"]["encoder.layer.1"]["attention.self"]["num_attention_heads"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="allowed: a whole number from 0 to 4, the stock size"):
        type(model).from_pretrained(tmp_path)
