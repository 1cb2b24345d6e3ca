"""`prune()`: pruning without training, on every family, against what the model itself computes."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import SequentialHook, add_hook_to_module
from helpers import assert_equal, forget_update, snapshot, tiny_bert
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, ragged_batch, tiny
from peft import LoraConfig, get_peft_model
from tables import CRITERIA
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from hf_prune import ConfigError, Pruner, PruningConfig, PruningRule, condense, prune, sparsity_report
from hf_prune.model import find_blocks, spec_for
from hf_prune.model.blocks import layer_lists
from hf_prune.oneshot import driver
from hf_prune.oneshot.calibration import calibration
from hf_prune.oneshot.layers import Stream, record
from hf_prune.oneshot.sensitivity import fisher_root, importance, probe, token_weights
from hf_prune.oneshot.walk import advance, find_site, moments_at, same_inputs
from hf_prune.pruning.criteria import CRITERIA as CRITERION_CLASSES
from hf_prune.pruning.updates import UPDATES, register_update
from hf_prune.settings.config import DECLARED

HEADS_AND_NEURONS = [PruningRule(pattern="head"), PruningRule(pattern="neuron")]


def config(**settings: Any) -> PruningConfig:
    """Half of the heads and neurons."""
    return PruningConfig(**{"target_sparsity": 0.5, "rules": copy.deepcopy(HEADS_AND_NEURONS), **settings})


def batches(model: Any, count: int = 4, rows: int = 6) -> list[dict[str, Tensor]]:
    return [ragged_batch(model, rows=rows, seed=seed) for seed in range(count)]


def outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch)[0]
    return found


@pytest.mark.core
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_pruned_and_condenses(family: str) -> None:
    """True zeros up to the target, whole heads and neurons, and a smaller model that computes the same."""
    model = tiny(family)
    if family == "albert":
        with pytest.raises(ConfigError, match="no chain of layers"):
            prune(model, config(), batches(model))
        return
    report = prune(model, config(), batches(model))
    assert report.sparsity == pytest.approx(0.5, abs=0.04)
    assert report.held_out_error is not None
    by_name = {module.name: module for module in report.modules}
    for block in sparsity_report(model).blocks:
        assert block.alive <= by_name[block.name].units_left < block.units or block.alive == block.units
    parameters = model.num_parameters()
    assert condense(model).num_parameters() < parameters


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit", "gpt2", "bart"])
def test_layers_run_one_by_one_are_the_model(family: str) -> None:
    """What comes out of the last layer of a list is what the model itself has there."""
    model = tiny(family)
    rows = batches(model, 2)
    for path in spec_for(model.config.model_type).layers:
        for layers in layer_lists(model, path).values():
            stream, last = Stream(), []
            handle = layers[-1].register_forward_hook(lambda module, args, out, last=last: last.append(out))
            calls = record(model, rows, list(layers), stream)
            handle.remove()
            for layer, layer_calls in zip(layers, calls):
                advance(layer, stream, layer_calls)
            for index, out in enumerate(last):
                assert torch.equal(stream[index], out[0] if isinstance(out, tuple) else out)


@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("bert", ["attention.output.LayerNorm", "output.LayerNorm"]),
        ("llama", ["post_attention_layernorm", ""]),
        ("gpt2", ["ln_2", ""]),
        ("distilbert", ["sa_layer_norm", "output_layer_norm"]),
        ("modernbert", ["mlp_norm", ""]),
    ],
)
def test_the_place_where_a_projection_joins_the_stream_is_found(family: str, where: list[str]) -> None:
    """`""` is the layer's own output."""
    model = tiny(family)
    stream = Stream()
    (path,) = spec_for(model.config.model_type).layers
    (layers,) = layer_lists(model, path).values()
    calls = record(model, batches(model, 1), list(layers), stream)
    names = {module: name for name, module in layers[0].named_modules()}
    found = [
        find_site(layers[0], block.output.module, stream[0], calls[0][0])
        for block in find_blocks(model)
        if block.layer.endswith(".0")
    ]
    assert [names[site.joined] for site in found if site.joined is not None] == where


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        (
            "llama",
            [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]],
        ),
        ("bert", [["attention.self.query", "attention.self.value"], ["intermediate.dense"], ["output.dense"]]),
    ],
)
def test_modules_that_are_given_one_tensor_are_found(family: str, groups: list[list[str]]) -> None:
    model = tiny(family)
    stream = Stream()
    (path,) = spec_for(model.config.model_type).layers
    (layers,) = layer_lists(model, path).values()
    calls = record(model, batches(model, 1), list(layers), stream)
    modules = [[layers[0].get_submodule(name) for name in group] for group in groups]
    found = same_inputs(layers[0], [module for group in modules for module in group], stream[0], calls[0][0])
    assert [{found[module] for module in group} for group in modules] == [{number} for number in range(len(groups))]


def test_statistics_of_one_tensor_serve_all_that_are_given_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value take the same moments, and end as they would with moments of their own."""
    models, taken = [tiny("llama", "causal-lm") for _ in range(2)], []
    settings = PruningConfig(pattern="channelx1", criterion="magnitude", update="obs", target_sparsity=0.5)
    for number, model in enumerate(models):
        calls = 0

        def counted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return moments_at(*args)

        monkeypatch.setattr(driver, "moments_at", counted)
        if number:
            monkeypatch.setattr(driver, "same_inputs", lambda layer, modules, *_: {module: id(module) for module in modules})
        prune(model, settings, batches(model))
        taken.append(calls)
    layers = models[0].config.num_hidden_layers
    assert taken == [4 * layers, 7 * layers]
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(value, models[1].state_dict()[name], rtol=1e-4, atol=1e-6)


def test_a_stream_on_disk_is_the_stream_in_memory(tmp_path: Any) -> None:
    left, right = tiny_bert(), tiny_bert()
    first = prune(left, config(), batches(left))
    second = prune(right, config(), batches(right), offload_folder=tmp_path)
    assert_equal(snapshot(left), snapshot(right))
    assert first.held_out_error == second.held_out_error
    assert not list(tmp_path.iterdir())


def test_a_database_makes_every_other_budget_cheaper_and_changes_no_bit(tmp_path: Any) -> None:
    """It is written once; with it a model is run less often, for any target, and the result is the same to the bit."""
    dense = tiny_bert()
    rows = batches(dense)
    calls: list[int] = []

    def pruned(share: float, **where: Any) -> Any:
        model = copy.deepcopy(dense)
        calls.append(0)
        handle = model.bert.encoder.layer[0].register_forward_pre_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        prune(model, config(target_sparsity=share), rows, **where)
        handle.remove()
        return snapshot(model)

    folder = tmp_path / "database"
    for share in (0.5, 0.25):
        assert_equal(pruned(share), pruned(share, database=folder))
    without_first, first, without_second, second = calls
    assert without_first == first == without_second > second
    prune(tiny_bert(), config(criterion="magnitude", update="zero"), batches(tiny_bert()), database=tmp_path / "nothing to measure")
    assert {path.name for path in tmp_path.iterdir()} == {"database"}


def test_a_database_of_something_else_is_refused(tmp_path: Any) -> None:
    """Of another model, other rows, units or seed; of another version; damaged; or no database. The model stays as it is."""
    model = tiny_bert()
    rows = batches(model)
    folder = tmp_path / "database"
    prune(copy.deepcopy(model), config(), rows, database=folder)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight[0, 0] += 1
    before = snapshot(other)
    with pytest.raises(ConfigError, match="was measured with other weights"):
        prune(other, config(), rows, database=folder)
    assert_equal(before, snapshot(other))
    with pytest.raises(ConfigError, match="other calibration rows"):
        prune(model, config(), batches(model, 3), database=folder)
    index = folder / "database.json"
    facts = json.loads(index.read_text())
    del facts["format"]  # as versions before it was said have left it
    index.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="was measured with other format"):
        prune(model, config(), rows, database=folder)
    index.write_text(json.dumps(facts | {"format": "1"}))
    with pytest.raises(ConfigError, match="other calibration rows, seed"):  # the seed says which rows are held out
        prune(model, config(), rows, database=folder, seed=1)
    with pytest.raises(ConfigError, match="other units"):
        prune(model, config(rules=HEADS_AND_NEURONS[:1]), rows, database=folder)
    (folder / "bert.encoder.layer.0.output.dense.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="is damaged"):
        prune(model, config(), rows, database=folder)
    (folder / "database.json").unlink()
    with pytest.raises(ConfigError, match="is no database"):
        prune(model, config(), rows, database=folder)


def test_an_interrupted_measurement_leaves_no_database(tmp_path: Any) -> None:
    model = tiny_bert()

    def interrupted(ticks: range) -> Iterator[int]:
        yield from ticks[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, config(), batches(model), database=tmp_path / "database", progress=interrupted)
    assert not list(tmp_path.iterdir())


def test_same_seed_same_bits_and_nothing_else_changes() -> None:
    """Mode, gradients, `requires_grad`, the cache setting and the random state stay as they are."""
    models = [tiny("llama", "causal-lm") for _ in range(2)]
    for model in models:
        model.train()
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        before, state = model.config.use_cache, torch.get_rng_state()
        prune(model, config(), batches(model), seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        assert model.config.use_cache == before
        assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
        assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
        assert model.model.layers[1].mlp.up_proj.weight.grad is None
    assert_equal(snapshot(models[0]), snapshot(models[1]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_leaves_the_model_as_it_was(error: type[BaseException]) -> None:
    """Also one in the last layer, when all others have been changed."""
    model = tiny_bert()
    before = snapshot(model)

    class Broken(nn.Dropout):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            Broken.calls += 1
            if not torch.equal(model.bert.encoder.layer[0].output.dense.weight, before["bert.encoder.layer.0.output.dense.weight"]):
                raise error("stop")
            return super().forward(input)

    model.bert.encoder.layer[-1].output.dropout = Broken(0.0)
    with pytest.raises(error, match="stop"):
        prune(model, config(), batches(model))
    assert_equal(snapshot(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    Pruner(model, config(), total_steps=10).release()  # nothing is attached


def correlated(model: Any, rows: int = 64) -> list[dict[str, Tensor]]:
    """Rows of few different tokens, so that inputs of a layer have much in common, as those of real models have."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 15, (rows, 9), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(16)]


@pytest.mark.parametrize("update", ["bias", "obs", "least_squares"])
def test_an_update_brings_the_outputs_back(update: str) -> None:
    """Held-out errors of the blocks, and of the whole model, are smaller than with zeros alone."""
    models = {name: tiny_bert() for name in ("zero", update)}
    reports = {name: prune(model, config(update=name), correlated(model), held_out=0.25) for name, model in models.items()}
    assert sum(module.updated for module in reports[update].modules) >= 4
    for module in reports[update].modules:
        assert (module.error or 0) <= (module.error_masked or 0)
    errors = {name: report.held_out_error for name, report in reports.items()}
    assert errors[update] is not None
    assert errors["zero"] is not None
    assert errors[update] < errors["zero"]


@pytest.mark.parametrize(("update", "patterns"), [("least_squares", ("neuron", "head")), ("sparsegpt", ("1x1", "2:4"))])
def test_the_dense_target_repairs_earlier_layers_too(update: str, patterns: tuple[str, str]) -> None:
    """With nothing gone in a block, its output is still made what the dense model's was."""
    register_update("aimless", reads_second_moments=True)(UPDATES[update].compute)
    errors = {}
    try:
        for name in ("aimless", update):
            model = tiny_bert()
            first, later = (
                PruningRule(pattern=pattern, target_sparsity=share, target_modules=rf".*layer\.{layers}\..*")
                for pattern, share, layers in zip(patterns, (0.5, 0.0), ("0", "[12]"))
            )
            report = prune(model, PruningConfig(update=name, rules=[first, later]), correlated(model, 128))
            errors[name] = report.held_out_error or 0.0
    finally:
        forget_update("aimless")
    assert 0 < errors[update] < errors["aimless"]


TRAINED = {"movement", "soft_movement"}


@pytest.mark.parametrize("criterion", sorted({*CRITERIA, *DECLARED["scores_absences"]} - TRAINED))
def test_every_criterion_can_choose(criterion: str) -> None:
    model = tiny_bert(hidden_dropout_prob=0.0)
    reads = criterion != "auto" and CRITERION_CLASSES[criterion].reads_gradients
    layers = criterion in DECLARED["scores_layers"] | DECLARED["scores_absences"]
    settings = (
        PruningConfig(pattern="layer", criterion=criterion, update="zero") if layers else config(criterion=criterion, update="obs")
    )
    report = prune(model, settings, batches(model))
    assert report.sparsity == pytest.approx(2 / 3 if layers else 0.5, abs=0.03)
    assert all(parameter.grad is None for parameter in model.parameters()), reads


@pytest.mark.parametrize("criterion", sorted(TRAINED))
def test_a_criterion_that_learns_its_scores_is_refused(criterion: str) -> None:
    with pytest.raises(ConfigError, match=f"criterion='{criterion}'.*train"):
        prune(tiny_bert(), config(criterion=criterion, update="zero"), batches(tiny_bert()))


@pytest.mark.parametrize("pattern", ["1x1", "2:4", "4x1", "channelx1"])
@pytest.mark.parametrize("update", ["zero", "sparsegpt"])
def test_patterns_inside_a_weight(pattern: str, update: str) -> None:
    """SparseGPT's repair of what a mask removes, in every layer of the body that lies in the chain."""
    models = {name: tiny_bert() for name in ("zero", update)}
    settings = {name: PruningConfig(pattern=pattern, criterion="wanda", update=name, target_sparsity=0.5) for name in models}
    reports = {name: prune(model, settings[name], correlated(model, 128)) for name, model in models.items()}
    assert reports[update].sparsity == pytest.approx(0.5, abs=1e-3)
    if update == "zero":
        return
    errors = [(module.error, module.error_masked) for module in reports[update].modules if module.error is not None]
    assert len(errors) == 3 * 6 + 1  # the pooler too
    assert all(error <= masked for error, masked in errors)
    assert sum(error < masked for error, masked in errors) > 9


@pytest.mark.parametrize("pattern", ["1x1", "2:4", "4x1"])
def test_sparsegpt_chooses_as_it_goes(pattern: str) -> None:
    """Under criterion `obs` what goes is chosen from weights that have adapted: less error than with the choice made before."""
    errors = {}
    for update in ("sparsegpt", "given"):
        if update == "given":
            register_update("given", reads_second_moments=True)(UPDATES["sparsegpt"].compute)
        try:
            settings = PruningConfig(pattern=pattern, criterion="obs", update=update, target_sparsity=0.5, scope="local")
            model = tiny_bert()
            report = prune(model, settings, correlated(model, 128), held_out=0.0)
        finally:
            forget_update("given")
        assert report.sparsity == pytest.approx(0.5, abs=1e-3)
        errors[update] = sum(module.error or 0 for module in report.modules)
        weight = model.bert.encoder.layer[1].intermediate.dense.weight
        if pattern == "2:4":
            assert ((weight == 0).view(-1, 4).sum(dim=1) == 2).all()
    assert errors["sparsegpt"] < 0.98 * errors["given"]


def test_wanda_compares_weights_within_each_output_row() -> None:
    """As published: |w|·‖x‖ over the tokens of an input, and the lowest half of each row goes."""
    model = tiny_bert(num_hidden_layers=1)
    seen: list[Tensor] = []
    projection = model.bert.encoder.layer[0].output.dense
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, 1)))
    rows, weight = correlated(model), projection.weight.detach().clone()
    for batch in rows:
        outputs(model, batch)
    handle.remove()
    prune(model, PruningConfig(pattern="1x1", criterion="wanda", update="zero", scope="row", target_sparsity=0.5), rows)
    scores = weight.abs() * torch.cat(seen).square().sum(dim=0).sqrt()
    half = scores.sort(dim=1).values[:, [scores.shape[1] // 2]]
    assert torch.equal(projection.weight == 0, scores < half)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_block_influence_is_how_far_a_layer_turns_the_stream(family: str) -> None:
    """The layer goes whose input and output, as `output_hidden_states` has them, point the same way; padding does not count."""
    model = tiny(family)
    rows = batches(model)
    sums: dict[str, float] = {}
    for path in spec_for(model.config.model_type).layers:
        for name, layers in layer_lists(model, path).items():
            for number, layer in enumerate(layers):

                def hook(module: Any, args: Any, kwargs: Any, out: Any, key: str = f"{name}.{number}") -> None:
                    given, out = (args[0] if args else kwargs["hidden_states"]), out[0] if isinstance(out, tuple) else out
                    cosines = (given * out).sum(-1) / given.norm(dim=-1) / out.norm(dim=-1)
                    kept = mask.bool() if cosines.shape == mask.shape else torch.ones_like(cosines, dtype=torch.bool)
                    sums[key] = sums.get(key, 0.0) + float(cosines[kept].sum()) / 1e3

                layer.register_forward_hook(hook, with_kwargs=True)
    for batch in rows:
        mask = batch["attention_mask"]
        outputs(model, batch)
    for layer in model.modules():
        layer._forward_hooks.clear()
        layer._forward_hooks_with_kwargs.clear()
    report = prune(model, PruningConfig(pattern="layer", criterion="block_influence", update="zero", target_sparsity=0.34), rows)
    gone = [module.name for module in report.modules if not module.units_left]
    straightest = max(sums, key=lambda name: sums[name])
    assert len(gone) >= 1
    assert any(straightest.endswith(name) for name in gone)
    parameters = model.num_parameters()
    assert condense(model).num_parameters() < parameters


def test_labels_and_none_score_differently_and_both_work() -> None:
    model = tiny_bert()
    rows = [{**batch, "labels": torch.arange(6) % 2} for batch in batches(model)]
    scores = [
        prune(copy.deepcopy(model), config(criterion="fisher", update="zero"), rows, labels=labels).predicted_error
        for labels in (True, False)
    ]
    assert scores[0] != scores[1]


def test_the_report_says_what_was_done() -> None:
    model = tiny_bert()
    report = prune(model, config(), batches(model))
    data = report.to_dict()
    assert {"target", "sparsity", "predicted_error", "held_out_error", "seconds", "skipped", "modules"} <= data.keys()
    assert "held-out error" in str(report)
    weights = [part.module.weight for block in find_blocks(model) for part in block.projections]
    assert report.sparsity == sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert report.predicted_error > 0


def loader(rows: int, **changes: Any) -> list[dict[str, Any]]:
    model = tiny_bert()
    return [{**ragged_batch(model, rows=rows), **changes}]


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no rows": ([], {}, "dataloader='0 rows'"),
    "few rows": (loader(3), {}, "dataloader='3 rows'"),
    "tuples": ([(1, 2)], {}, "dataloader='tuple'.*dictionaries"),
    "unknown column": (loader(9, sentense=torch.ones(9)), {}, "dataloader='sentense'"),
    "too long": ([{"input_ids": torch.ones(9, 99, dtype=torch.long)}], {}, "rows of 99 tokens.*40 positions"),
    "foreign tokens": ([{"input_ids": torch.full((9, 4), 1000)}], {}, "token 1000.*99 tokens"),
    "no labels": (loader(9), {"labels": True}, "labels=True"),
    "held_out": (loader(9), {"held_out": 1.0}, r"held_out=1\.0"),
    "rows": (loader(9), {"calibration_rows": 0}, "calibration_rows=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_and_nothing_changes(case: str) -> None:
    rows, settings, message = BAD[case]
    model = tiny_bert()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        prune(model, config(), rows, **settings)
    assert_equal(snapshot(model), before)


def test_activations_that_are_not_finite_are_an_error() -> None:
    model = tiny_bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"model='BertForSequenceClassification'.*NaN"):
        prune(model, config(), batches(model))
    assert_equal(
        {key: value.nan_to_num() for key, value in snapshot(model).items()}, {k: v.nan_to_num() for k, v in before.items()}
    )


def unusable() -> Iterator[tuple[str, Any, str]]:
    """Models that cannot be pruned so, and what is said."""
    attached = tiny_bert()
    attached.pruner = Pruner(attached, config(), total_steps=10)
    yield "attached", attached, "attached to a Pruner"
    adapted = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    yield "adapters", adapted, "merge"
    quantized: Any = tiny_bert()
    layer = quantized.bert.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    yield "quantized", quantized, "is quantized"
    small = tiny_bert()
    prune(small, config(), batches(small))
    yield "condensed", condense(small), "condensed already"


@pytest.mark.parametrize(("name", "model", "message"), list(unusable()), ids=lambda value: value if isinstance(value, str) else "")
def test_models_that_cannot_be_changed_are_refused(name: str, model: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune(model, config(), batches(tiny_bert()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "1x1", "update": "obs"}, "update='obs'.*whole columns"),
        ({"pattern": "layer", "criterion": "obs"}, "criterion='obs'.*leave through inputs"),
        ({"pattern": "1xchannel"}, "criterion='obs'.*leave through inputs"),
        ({"pattern": "neuron", "keep_zeros": True}, "keep_zeros=True"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune(tiny_bert(), PruningConfig(**settings), batches(tiny_bert()))


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=40), st.integers(0, 10**6))
def test_no_few_tokens_have_nearly_all_the_weight(values: list[float], largest: int) -> None:
    parts = [torch.tensor([values]), torch.tensor([[float(largest)]])]
    whole = torch.cat([part.flatten() for part in parts]).double()
    found = torch.cat([part.flatten() for part in token_weights(parts)]).double()
    matter = whole > 0
    if not matter.any():
        assert not found.any()
        return
    own = found[matter]
    assert own.sum() ** 2 / own.square().sum() >= matter.sum() / 2 * (1 - 1e-4)
    assert float(own.sum()) == pytest.approx(float(whole.sum()), rel=1e-4)
    assert bool((own.argsort(stable=True) == whole[matter].argsort(stable=True)).all() or len(set(own.tolist())) < len(own))
    torch.testing.assert_close(
        found[~matter], torch.full_like(found[~matter], 0.1 * float(whole[matter].mean())), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("logits", [[0.0, 5.0], [1.0, -2.0, 0.5, 0.0]])
def test_what_weighs_logits_has_their_fisher_information_as_its_covariance(logits: list[float]) -> None:
    rows = torch.tensor([logits]).expand(50_000, -1)
    found = fisher_root(rows, torch.Generator().manual_seed(0)).double()
    shares = rows[0].double().softmax(dim=-1)
    covariance = shares.diag() - shares[:, None] * shares
    torch.testing.assert_close(found.T @ found / len(found), covariance, rtol=0.02, atol=0.002)
    assert float(found.square().sum(dim=1).max()) < 4 * float(covariance.trace())  # a label of e⁻⁵ would have 150 times as much


@pytest.mark.parametrize(("family", "head"), [("bert", None), ("llama", "causal-lm"), ("modernbert", None), ("gpt2", None)])
def test_importance_is_the_squared_gradient_of_what_a_layer_gives(family: str, head: str | None) -> None:
    """With layers run again in the backward too, and whatever is frozen."""
    model = tiny(family, head)
    model.config.use_cache = False
    frozen = next(iter(model.parameters())).requires_grad_(False)
    rows, generator = batches(model, 3), torch.Generator()
    watched = {block.output.name: block.output.module for block in find_blocks(model)}
    lists = [layers for path in spec_for(model.config.model_type).layers for layers in layer_lists(model, path).values()]
    with torch.no_grad():
        found = importance(model, rows, watched, generator.manual_seed(0), [layer for layers in lists for layer in layers])
    assert not frozen.requires_grad
    assert all(parameter.grad is None and (parameter.requires_grad or parameter is frozen) for parameter in model.parameters())
    given: dict[str, Tensor] = {}
    for name, module in watched.items():
        module.register_forward_hook(lambda module, args, out, name=name: given.__setitem__(name, out))
    generator.manual_seed(0)
    for number, batch in enumerate(rows):
        gradients = torch.autograd.grad(probe(model, batch, generator), list(given.values()))
        for name, gradient in zip(given, gradients):
            torch.testing.assert_close(found[name].tokens[number], gradient.square().sum(dim=-1), rtol=1e-3, atol=1e-9)


def test_autocast_has_no_say() -> None:
    plain, mixed = tiny_bert(), tiny_bert()
    prune(plain, config(), batches(plain))
    with torch.autocast("cpu", torch.bfloat16):
        prune(mixed, config(), batches(mixed))
    assert_equal(snapshot(plain), snapshot(mixed))


def test_a_forward_that_a_layer_has_of_its_own_stays() -> None:
    """As accelerate's hooks put one there."""
    model = tiny_bert()
    layers = list(model.bert.encoder.layer)
    add_hook_to_module(layers[0], SequentialHook())
    own, handle = layers[0].forward, model.bert.encoder.layer[0].output.dense
    importance(model, batches(model, 1), {"dense": handle}, torch.Generator().manual_seed(0), layers)
    assert layers[0].forward is own
    assert "forward" not in vars(layers[1])


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and still alive: now, and at the most.

    Args:
        there: tensors that were there before, which do not count.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)):
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return found

    def _freed(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"criterion": "flap", "update": "bias"},
        {"criterion": "obs", "update": "sparsegpt", "scope": "local", "pattern": "2:4", "rules": []},
        {"criterion": "wanda", "update": "sparsegpt", "scope": "row", "pattern": "2:4", "rules": []},
    ],
    ids=["default", "flap", "sparsegpt", "wanda"],
)
def test_extra_memory_is_what_the_report_says_and_does_not_grow_with_depth(settings: dict[str, Any]) -> None:
    """Beside the copy of the weights that change: streams, the statistics of one layer, and what one layer works with.

    The tensors that really are alive are counted.
    """
    beside = []
    for layers in (2, 8):
        model = tiny_bert(num_hidden_layers=layers, hidden_size=64, intermediate_size=256)
        rows = [{name: value.repeat(8, 1) for name, value in batch.items()} for batch in batches(model, 8)]
        weights = sum(module.parameters for module in sparsity_report(model).modules)
        with Allocated([*model.parameters(), *model.buffers(), *(part for batch in rows for part in batch.values())]) as tensors:
            report = prune(model, config(**settings), rows)
        assert 4 * weights < report.extra_bytes < tensors.peak
        beside.append(tensors.peak - 4 * weights - sum(module.units for module in report.modules))
    assert beside[1] <= beside[0] * 1.1


@pytest.mark.parametrize(
    ("family", "settings", "ticks"),
    [
        ("bert", {"criterion": "obs"}, 2 * 3),
        ("bert", {"criterion": "magnitude"}, 3),
        ("bert", {"criterion": "obs", "update": "sparsegpt", "scope": "local", "pattern": "2:4", "rules": []}, 3),
        ("t5", {"criterion": "obs"}, 2 * 6),
    ],
)
def test_progress_is_a_number_for_each_layer_of_each_pass(family: str, settings: dict[str, Any], ticks: int) -> None:
    seen: list[int] = []

    def watched(numbers: range) -> Iterator[int]:
        assert len(numbers) == ticks
        for number in numbers:
            seen.append(number)
            yield number
        seen.append(-1)

    model = tiny(family)
    prune(model, config(**settings), batches(model), progress=watched)
    assert seen == [*range(ticks), -1]


def test_every_update_has_a_place() -> None:
    assert {"zero", "bias", "least_squares", "obs", "sparsegpt"} <= UPDATES.keys()


def test_flap_is_variance_times_weight_and_the_mean_goes_to_the_bias() -> None:
    """Against the definition, from the inputs themselves; and what the bias update leaves is the masked model with mean inputs."""
    model = tiny_bert(num_hidden_layers=1)
    seen: list[Tensor] = []
    projection = model.bert.encoder.layer[0].output.dense
    rows = correlated(model)
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, 1)))
    for batch in rows:
        outputs(model, batch)
    handle.remove()
    inputs, weight, bias = torch.cat(seen).double(), projection.weight.detach().double(), projection.bias.detach().double()
    scores = inputs.var(dim=0, unbiased=False) * weight.square().sum(dim=0)
    settings = PruningConfig(pattern="neuron", criterion="flap", update="bias", target_sparsity=0.5)
    prune(model, settings, rows, held_out=0.0)
    gone = (projection.weight == 0).all(dim=0)
    assert set(scores.argsort()[: int(gone.sum())].tolist()) == set(gone.nonzero().flatten().tolist())
    expected = bias + weight[:, gone] @ inputs.mean(dim=0)[gone]
    torch.testing.assert_close(projection.bias.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "rows"), [(4, 2048), (32, 1024), (1, 2048)])
def test_rows_are_taken_until_there_are_tokens_enough(tokens: int, rows: int) -> None:
    """32,768 tokens or 2,048 rows, whichever comes first, and no batch is asked for in vain."""
    model: Any = tiny_bert()
    given = 0

    def endless() -> Iterator[dict[str, Tensor]]:
        nonlocal given
        while True:
            given += 32
            yield {"input_ids": torch.ones(32, tokens, dtype=torch.long)}

    assert calibration(model, endless(), None, 0.1, False, 0).number == rows
    assert given <= rows + 32


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_rules_of_several_criteria_and_levels(criterion: str) -> None:
    """One rule reads gradients, one activations, one measures; 2:4 inside the heads that are left leaves the others gone."""
    model = tiny_bert()
    settings = PruningConfig(
        scope="local",
        rules=[
            PruningRule(pattern="head", target_sparsity=0.5, criterion="fisher", update="zero"),
            PruningRule(pattern="neuron", target_sparsity=0.5),
            PruningRule(
                pattern="2:4", target_sparsity=0.5, criterion=criterion, update="sparsegpt", target_modules=["value", "dense"]
            ),
        ],
    )
    prune(model, settings, correlated(model))
    for block in sparsity_report(model).blocks:
        assert block.alive <= block.units / 2
    for block in find_blocks(model):
        weight = block.output.module.weight
        assert int((weight == 0).view(-1, 4).sum(dim=1).min()) >= 2
        if block.kind == "attention":
            width = block.unit_width
            dead = (weight.view(len(weight), -1, width) == 0).all(dim=2).all(dim=0)
            assert (block.roles["value"].module.weight.view(-1, width, weight.shape[1])[dead] == 0).all()


def test_few_rows_are_enough_for_many_weights() -> None:
    """As few long rows of a causal language model are: each weight is still measured on one."""
    model = tiny_bert()
    report = prune(model, PruningConfig(pattern="1x1", update="sparsegpt", target_sparsity=0.5), batches(model, 8, 1))
    assert len(report.modules) > 8
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_weight_outside_the_layers_is_pruned_too() -> None:
    """The pooler has no place in the chain of layers; its inputs come from the whole model."""
    model = tiny_bert()
    report = prune(model, PruningConfig(pattern="1x1", update="sparsegpt", target_sparsity=0.5), correlated(model))
    (pooler,) = [module for module in report.modules if "pooler" in module.name]
    assert pooler.error is not None
    assert 0 < int((model.bert.pooler.dense.weight == 0).sum()) == pooler.units - pooler.units_left


def test_what_no_prediction_reads_costs_nothing() -> None:
    """The pooler of a bare encoder: its last hidden state is what it predicts."""
    model = tiny_bert("bare")
    report = prune(model, PruningConfig(pattern="1x1", update="sparsegpt", target_sparsity=0.5), correlated(model))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_bias_that_is_not_there_cannot_change() -> None:
    model = tiny("llama")
    before = snapshot(model)
    message = r"config.update='bias': changes the bias, and '.*down_proj' has none; .* with attention_bias=True, mlp_bias=True"
    with pytest.raises(ConfigError, match=message):
        prune(model, PruningConfig(pattern="neuron", criterion="flap", update="bias"), batches(model))
    assert_equal(snapshot(model), before)


def test_a_model_can_be_loaded_with_biases_for_flap(tmp_path: Path) -> None:
    """Biases of zero change nothing; what FLAP puts into them stays through condensing, saving and loading."""
    tiny("llama", "causal-lm").save_pretrained(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", attention_bias=True, mlp_bias=True).eval()
    (batch,) = batches(model, 1)
    torch.testing.assert_close(outputs(model, batch), outputs(plain, batch))
    rules = [PruningRule(pattern="kv_group"), PruningRule(pattern="neuron")]
    report = prune(model, PruningConfig(target_sparsity=0.4, rules=rules, criterion="flap", update="bias"), batches(model))
    assert report.sparsity == pytest.approx(0.4, abs=0.1)
    updated = {module.name for module in report.modules if module.updated}
    assert updated
    for block in find_blocks(model):
        assert bool(block.output.module.bias.any()) == (block.name in updated)
    pruned, parameters = outputs(model, batch), model.num_parameters()
    condense(model).save_pretrained(tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert small.num_parameters() < parameters
    torch.testing.assert_close(outputs(small, batch), pruned, rtol=1e-4, atol=1e-5)


def test_inputs_of_a_convolution_are_not_scored() -> None:
    model = tiny("wav2vec2")
    with pytest.raises(ConfigError, match=r"criterion='obs': scores inputs of a weight, and a convolution"):
        prune(model, PruningConfig(pattern="1x1", update="zero", target_modules=r".*conv_layers\.1\.conv"), batches(model))


def test_modules_of_every_pattern_are_reported() -> None:
    """Rows, which leave nothing to solve for, too."""
    model = tiny_bert()
    report = prune(model, PruningConfig(pattern="1xchannel", criterion="magnitude", update="zero"), batches(model))
    assert sum(module.units_left for module in report.modules) < sum(module.units for module in report.modules)
