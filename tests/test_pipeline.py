"""Recipes: stages run, go on after a kill at any of them, and leave what they should; heads from tiles, layers that are dropped."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import arguments, assert_equal, ragged_rows, tiny_bert
from models import MIXTURES, ragged_batch, tiny
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
    default_data_collator,
    modeling_utils,
)

from hf_prune import ConfigError, PruningConfig, condense, condense_plan
from hf_prune.model import find_blocks
from hf_prune.pruning import recover
from hf_prune.shrink.depth import drop_layers, shrink_depth
from hf_prune.training.recipe import Pipeline, PipelineResult, Recipe, Stage, Vocabulary, neuron_sparsity
from hf_prune.training.stage import described, set_dropout

RECIPES = Path(__file__).parents[1] / "scripts" / "recipes"
TEACH = {"alpha_task": 0.1, "alpha_logits": 0.9}


def recipe(**changes: Any) -> Recipe:
    """All kinds of stages, a few steps each."""
    stages: list[dict[str, Any]] = [
        {"name": "fine-tune"},
        {
            "name": "attention",
            "pruning": {
                "pattern": "auto",
                "target_modules": ".*attention.*",
                "criterion": "movement",
                "target_sparsity": 0.7,
                "max_sparsity_per_module": 1.0,
                "frequency": 2,
                "schedule": "linear",
            },
            "recover": "trained",
            "dropout": 0.0,
        },
        {"name": "distil", "distillation": TEACH},
        {
            "name": "ffn",
            "pruning": {"criterion": "taylor", "schedule": "exp", "updates": 3},
            "neurons_per_head": 0.5,
            "distillation": {**TEACH, "alpha_hidden": 1.0},
        },
        {"name": "last", "distillation": TEACH, "training": {"max_steps": 4}},
    ]
    for stage in stages:
        stage.update(changes.get(stage["name"], {}))
    return Recipe(stages, metric="accuracy", training={"max_steps": 8, "save_strategy": "steps", "save_steps": 2})  # type: ignore[arg-type]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, -1) == prediction.label_ids))}


def pipeline(folder: Path, plan: Recipe | None = None, model: PreTrainedModel | None = None) -> Pipeline:
    return Pipeline(
        recipe=plan or recipe(),
        model=model or tiny_bert(hidden_dropout_prob=0.1),
        args=arguments(folder, learning_rate=5e-3, logging_steps=100),
        train_dataset=Dataset.from_list(ragged_rows(64)),
        eval_dataset=Dataset.from_list(ragged_rows(32, seed=1)),
        data_collator=default_data_collator,
        compute_metrics=accuracy,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PipelineResult]:
    """The whole recipe, run without a break."""
    folder = tmp_path_factory.mktemp("pipeline")
    return folder, pipeline(folder).run()


def loaded(folder: Path, name: str) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(next(folder.glob(f"*-{name}")))


def test_every_stage_is_smaller_and_counted(finished: tuple[Path, PipelineResult]) -> None:
    folder, result = finished
    assert [row.name for row in result.rows] == ["fine-tune", "attention", "distil", "ffn", "last"]
    dense = loaded(folder, "fine-tune")
    weights = {name: p.numel() for name, p in dense.named_parameters() if "layer." in name and p.ndim == 2}
    for row in result.rows:
        model = loaded(folder, row.name)
        left = sum(int((p != 0).sum()) for name, p in model.named_parameters() if name in weights)
        assert row.sparsity == pytest.approx(1 - left / sum(weights.values()))
        assert row.parameters == sum(p.numel() for p in model.parameters())
        assert row.heads == [block.num_units for block in find_blocks(model) if block.kind == "attention"]
    by_name = {row.name: row for row in result.rows}
    assert by_name["fine-tune"].sparsity == 0
    assert sum(by_name["attention"].heads) < sum(by_name["fine-tune"].heads)
    neurons = by_name["fine-tune"].neurons[0]
    asked = [round((1 - min(1 - 0.5 * heads / 4, 0.98)) * neurons) for heads in by_name["attention"].heads]
    assert by_name["ffn"].neurons == asked
    assert by_name["last"].heads == by_name["attention"].heads
    assert not list(folder.glob("*/checkpoint-*"))
    assert loaded(folder, "attention").config.hidden_dropout_prob == 0.1


def test_the_table_has_a_row_a_stage(finished: tuple[Path, PipelineResult]) -> None:
    _, result = finished
    lines = [line for line in str(result).splitlines() if "%" in line]
    assert len(lines) == 5
    for line, row in zip(lines, result.rows):
        drop = row.metrics["accuracy"] - result.rows[0].metrics["accuracy"]
        for part in (row.name, f"{row.sparsity:.2%}", f"{row.metrics['accuracy']:.4f}", f"{drop:+.4f}", f"{row.parameters:,}"):
            assert part in line
    json.dumps(result.to_dict())


def test_a_finished_pipeline_is_not_run_again(finished: tuple[Path, PipelineResult], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = finished
    monkeypatch.setattr(torch.optim.AdamW, "step", None)
    assert pipeline(folder).run() == result
    with pytest.raises(ConfigError, match="stage='distil': was run with different settings for distillation"):
        pipeline(folder, recipe(distil={"distillation": {"alpha_task": 1.0}})).run()


@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    "other",
    [
        lambda data: data.take(len(data) - 1),
        lambda data: data.rename_column("labels", "label"),
        lambda data: data.map(lambda row, place: {"labels": 1 - row["labels"]} if place == 0 else row, with_indices=True),
        lambda data: data.take(0),
    ],
    ids=["fewer", "renamed", "relabelled", "none"],
)
def test_other_data_is_refused_where_a_recipe_has_begun(
    part: str, other: Callable[[Dataset], Dataset], finished: tuple[Path, PipelineResult]
) -> None:
    folder, _ = finished
    plan = pipeline(folder)
    now, before = other(getattr(plan, part)), described(getattr(plan, part))
    with pytest.raises(ConfigError, match=rf"{part}='{described(now)}': is not the data .*, '{before}'; choose another output_dir"):
        replace(plan, **{part: now}).run()


def test_the_same_data_is_the_same_however_it_was_made() -> None:
    rows = ragged_rows(200)
    data = Dataset.from_list(rows)
    again = Dataset.from_list(rows).filter(lambda row: True).with_format("torch")
    assert described(data) == described(again)
    assert "200 rows" in described(data)


@pytest.mark.parametrize("content", ["{", "[1]", '{"settings": {}}', "\x00"])
def test_a_result_that_cannot_be_read_is_named(content: str, finished: tuple[Path, PipelineResult], tmp_path: Path) -> None:
    shutil.copytree(finished[0] / "00-start", tmp_path / "00-start")
    (tmp_path / "00-start" / "stage_result.json").write_text(content)
    with pytest.raises(ValueError, match=r"00-start/stage_result\.json .*delete it"):
        pipeline(tmp_path).run()


def killed(folder: Path, at_step: int) -> None:
    """Run the pipeline in a process of its own that dies as the optimizer has made so many steps."""

    def work() -> None:
        step: Callable[..., Any] = torch.optim.AdamW.step
        count = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        torch.optim.AdamW.step = counted  # type: ignore[method-assign,assignment]
        pipeline(folder).run()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_at_every_stage_it_ends_with_the_same_table_and_model(finished: tuple[Path, PipelineResult], tmp_path: Path) -> None:
    folder, expected = finished
    # fine-tune, attention, distil, ffn and last; counted from the step that each process starts with
    for at_step in (6, 8, 11, 8, 7):
        killed(tmp_path, at_step)
    done = [path.parent.name for path in sorted(tmp_path.glob("*/stage_result.json"))]
    assert done == ["00-start", "01-fine-tune", "02-attention", "03-distil", "04-ffn"]
    result = pipeline(tmp_path).run()
    assert [{**vars(row), "latency_ratio": 0} for row in result.rows] == [
        {**vars(row), "latency_ratio": 0} for row in expected.rows
    ]
    assert_equal(loaded(tmp_path, "last").state_dict(), loaded(folder, "last").state_dict())


def short(folder: Path, model: PreTrainedModel | None = None) -> Pipeline:
    return pipeline(folder, Recipe([Stage("only", training={"max_steps": 2})], metric="accuracy"), model)


def test_killed_in_its_very_first_save_it_begins_again(tmp_path: Path) -> None:
    def work() -> None:
        modeling_utils.safe_save_file = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        short(tmp_path).run()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.rglob("config.json"))
    assert [row.name for row in short(tmp_path).run().rows] == ["only"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00-start", "01-only"]


def changed(weight: str) -> PreTrainedModel:
    model = tiny_bert(hidden_dropout_prob=0.1)
    with torch.no_grad():
        model.get_parameter(weight)[0] += 1
    return model


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: tiny_bert(seed=1, hidden_dropout_prob=0.1), r"bert\.embeddings.* differ"),
        (lambda: changed("bert.encoder.layer.1.output.dense.bias"), r"bert\.encoder\.layer\.1\.output\.dense\.bias differ"),
        (lambda: tiny_bert(), r"config\.hidden_dropout_prob differ"),
        (lambda: tiny_bert(hidden_dropout_prob=0.1, num_labels=3), r"config\.id2label, .* differ"),
    ],
)
def test_another_model_is_refused_where_a_recipe_has_begun(
    model: Callable[[], PreTrainedModel], names: str, tmp_path: Path
) -> None:
    plan = short(tmp_path)
    plan.begin()
    with pytest.raises(ConfigError, match=rf"model='BertForSequenceClassification': is not the one .*: .*{names}.*00-start"):
        short(tmp_path, model()).run()
    assert_equal(loaded(tmp_path, "start").state_dict(), plan.model.state_dict())


def test_a_new_head_is_that_of_the_model_that_a_recipe_began_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = short(tmp_path)
    plan.begin()
    plan.begin()
    assert not caplog.records
    short(tmp_path, changed("classifier.weight")).begin()
    assert re.search(r"classifier\.weight differ\. The recipe continues with the one in .*00-start", caplog.text)
    assert_equal(loaded(tmp_path, "start").state_dict(), plan.model.state_dict())


def test_a_pruning_recipe_compares_with_the_model_it_is_given(tmp_path: Path) -> None:
    result = pipeline(tmp_path, recipe().only(["attention", "last"]).without_distillation()).run()
    assert [row.name for row in result.rows] == ["start", "attention", "last"]
    assert result.rows[0].sparsity == 0
    assert_equal(loaded(tmp_path, "start").state_dict(), tiny_bert().state_dict())


# ----------------------------------------------------------------------------------------------------------- heads and layers


def test_a_head_with_a_living_block_comes_back_whole_and_a_dead_one_goes() -> None:
    model, before = tiny_bert(num_hidden_layers=1), tiny_bert(num_hidden_layers=1)
    size = model.config.hidden_size // 4
    attention = model.bert.encoder.layer[0].attention
    with torch.no_grad():
        attention.self.value.weight[: 2 * size] = 0  # heads 0 and 1 have no values
        attention.self.value.weight[1 * size, 0] = 1.0  # but one of head 1
        attention.self.query.weight[2 * size : 3 * size] = 0  # head 2 has no queries: it attends evenly
        attention.output.dense.weight[:, 3 * size :] = 0  # head 3 is not read
    recover(model, before.state_dict())
    (dead,) = (plan.dead for plan in condense_plan(model).blocks if plan.block.kind == "attention")
    assert dead.tolist() == [True, False, False, True]
    rows = torch.ones(4 * size, dtype=torch.bool)
    rows[:size] = rows[3 * size :] = False
    expected = dict(before.state_dict())
    for name in ("query", "key", "value"):
        for kind in ("weight", "bias"):
            key = f"bert.encoder.layer.0.attention.self.{name}.{kind}"
            expected[key] = torch.where(rows.view(-1, *[1] * (expected[key].ndim - 1)), expected[key], 0.0)
    key = "bert.encoder.layer.0.attention.output.dense.weight"
    expected[key] = expected[key] * rows
    assert_equal(model.state_dict(), expected)


@pytest.mark.parametrize("empty", [[1], [0, 2], [0, 1, 2]])
def test_layers_without_heads_are_dropped(empty: list[int], tmp_path: Path) -> None:
    model, stays = tiny_bert(), tiny_bert()
    with torch.no_grad():
        for index in empty:
            model.bert.encoder.layer[index].attention.output.dense.weight.zero_()
    gone = empty[1:] if len(empty) == 3 else empty
    assert drop_layers(model) == [f"encoder.layer.{index}" for index in gone]
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 3 - len(gone)
    # by hand: the same model without these layers
    kept = [layer for index, layer in enumerate(stays.bert.encoder.layer) if index not in gone]
    stays.bert.encoder.layer = torch.nn.ModuleList(kept)
    if len(empty) == 3:
        stays.bert.encoder.layer[0].attention.output.dense.weight.data.zero_()
    batch = ragged_batch(model)
    assert torch.equal(model.eval()(**batch).logits, stays.eval()(**batch).logits)
    condense(model).save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(model.eval()(**batch).logits, again(**batch).logits)


def test_a_first_layer_that_is_made_otherwise_stays(tmp_path: Path) -> None:
    model = tiny("modernbert", "sequence-classification")  # whose first layer has no norm before attention
    with torch.no_grad():
        for layer in model.model.layers[:2]:
            layer.attn.Wo.weight.zero_()
    assert drop_layers(model) == ["layers.1"]
    model.save_pretrained(tmp_path)
    batch = ragged_batch(model)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(model.eval()(**batch).logits, again(**batch).logits)


def test_neurons_follow_the_share_of_heads_that_is_left() -> None:
    model = tiny_bert()
    size = model.config.hidden_size // 4
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.dense.weight[:, : 3 * size] = 0
        model.bert.encoder.layer[2].attention.output.dense.weight.zero_()
    shares = neuron_sparsity(condense(model), heads=4, factor=0.5)
    assert list(shares.values()) == [1 - 0.5 / 4, 1 - 0.5, 0.98]


# --------------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_recipes_can_be_read(path: Path) -> None:
    if "stages" in json.loads(path.read_text()):
        assert Recipe.from_json_file(path).stages
    else:
        PruningConfig.from_json_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": {"recover": "befor"}}, r"stages\[1\].recover='befor': .* Did you mean 'before'"),
        ({"distil": {"recover": "before"}}, r"stages\[2\].recover='before': needs pruning by criterion 'movement'"),
        (
            {"attention": {"pruning": {"pattern": "auto", "criterion": "movement", "rules": [{"criterion": "taylor"}]}}},
            r"stages\[1\].recover='trained': needs pruning by criterion 'movement' or 'soft_movement'; rules\[0\] has 'taylor'",
        ),
        ({"attention": {"dropout": 1.5}}, r"stages\[1\].dropout=1.5: must be a number in \[0, 1\)"),
        ({"ffn": {"neurons_per_head": 2}}, r"stages\[3\].neurons_per_head=2: must be in \(0, 1\]"),
        ({"ffn": {"pruning": {"criterion": "tailor"}}}, r"stages\[3\].pruning.criterion='tailor'.*Did you mean 'taylor'"),
        (
            {"distil": {"distillation": {"alpha_logit": 1}}},
            r"stages\[2\].distillation.alpha_logit=1: .*Did you mean 'alpha_logits'",
        ),
        ({"last": {"training": {"learning_rat": 1}}}, r"stages\[4\].training.learning_rat=1: .*Did you mean 'learning_rate'"),
        ({"last": {"training": {"learning_rate": "5e-5"}}}, r"stages\[4\].training.learning_rate='5e-5': must be a number."),
        ({"last": {"training": {"bf16": 1}}}, r"stages\[4\].training.bf16=1: must be true or false."),
        ({"last": {"training": {"seed": 0.5}}}, r"stages\[4\].training.seed=0.5: must be a whole number."),
        ({"last": {"training": None}}, r"stages\[4\].training=None: must be an object."),
        ({"last": {"name": 5}}, r"stages\[4\].name=5: must be a text."),
        ({"last": {"pruning": "head"}}, r"stages\[4\].pruning='head': must be an object or null."),
        ({"ffn": {"neurons_per_head": "half"}}, r"stages\[3\].neurons_per_head='half': must be a number or null."),
        ({"attention": {"recover": ["before"]}}, r"stages\[1\].recover=\['before'\]: must be a text or null."),
        ({"last": {"drop_layers": 1}}, r"stages\[4\].drop_layers=1: must be true or false."),
        ({"last": {"nam": "x"}}, r"stages\[4\].nam='x': is not a field of Stage"),
        ({"last": {"name": "a/b"}}, r"stages\[4\].name='a/b'"),
        ({"last": {"name": "ffn"}}, "stages=.*distinct names"),
    ],
)
def test_bad_recipes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": None}, "stages=None: must be a list."),
        ({"stages": [], "metric": ["f1"]}, r"metric=\['f1'\]: must be a text."),
        ({"stages": [], "training": None}, "training=None: must be an object."),
        ({"stages": [], "vocabulary": {"min_counts": 2}}, "vocabulary.min_counts=2: .*Did you mean 'min_count'"),
        ({"stages": [], "vocabulary": {"min_count": 0}}, "vocabulary.min_count=0: must be a whole number, 1 or more."),
        ({"stages": [], "vocabulary": {"keep": "[MASK]"}}, r"vocabulary.keep='\[MASK\]': must be a list."),
        ({"stages": [{}]}, r"stages\[0\].name=None: must be given in each Stage."),
    ],
)
def test_recipes_of_other_types(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**settings)


def test_unknown_stage() -> None:
    with pytest.raises(ConfigError, match=r"stages='atention': must be one of .*Did you mean 'attention'"):
        recipe().only(["atention"])


def test_a_recipe_that_is_no_file_or_no_json(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ConfigError, match=r"Recipe file='.*recipe.json': is not valid JSON"):
        Recipe.from_json_file(tmp_path / "recipe.json")
    with pytest.raises(ConfigError, match=r"Recipe file='.*recpe.json': .* Did you mean '.*/recipe.json'"):
        Recipe.from_json_file(tmp_path / "recpe.json")


def refused(folder: Path, plan: Recipe, message: str, model: PreTrainedModel | None = None) -> None:
    """Assert that a recipe is refused before any of its stages begins."""
    with pytest.raises(ConfigError, match=message):
        pipeline(folder, plan, model).run()
    assert [path.name for path in folder.iterdir()] == ["00-start"]


#: Prunes at once, and by what needs no training.
HEADS = {"pattern": "head", "criterion": "magnitude", "schedule": "constant"}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"pruning": {**HEADS, "target_modules": ["atention"]}}, r"pruning.config.target_modules='atention': matches no module"),
        ({"pruning": {**HEADS, "cooldown_steps": 8}}, r"pruning.config.cooldown_steps=8: .*cool-down \(8 steps\)"),
        ({"pruning": {**HEADS, "cooldown_epochs": 1}}, r"pruning.config.cooldown_epochs=1: .*cool-down \(8 steps\)"),
        ({"pruning": HEADS, "training": {"optim": "adamw_8bit"}}, r"training=.*'adamw_8bit'.*: cannot be used"),
        ({"num_layers": 3}, r"num_layers=3: must be a whole number from 1 to 2: encoder.layer has 3 layers"),
        ({"hidden_size": 20}, r"hidden_size=20: must be a multiple of 8, the width of a head"),
        ({"num_layers": {"decoder": 1}}, r"num_layers='decoder': is no list of layers; there are encoder.layer"),
        (
            {"num_layers": 2, "distillation": {"alpha_hidden_layers": 1.0, "layer_map": [[2, 2]]}},
            r"layer_map=\[\[2, 2\]\]: the student has layers 0 to 1, so no layer 2",
        ),
        ({"pruning": HEADS, "pad_to_multiple_of": 0}, r"pad_to_multiple_of=0: must be a whole number, 1 or more"),
        ({"training": {"save_strategy": "step"}}, r"training=.*'save_strategy': 'step'.*: cannot be used: .*\['no', 'steps'"),
        ({"training": {"learning_rate": -1.0}}, r"training=.*'learning_rate': -1.0.*: cannot be used: Invalid learning rate"),
        ({"training": {"per_device_train_batch_size": 0}}, r"training=.*cannot be used: batch_size should be a positive integer"),
        ({"training": {"lr_scheduler_type": "linea"}}, r"training=.*cannot be used: '?linea'? is not a valid SchedulerType"),
        (
            {"distillation": {"alpha_hidden_layers": 1.0, "layer_map": [[0, 9]]}},
            r"layer_map=\[\[0, 9\]\]: the teacher has layers 0 to 2, so no layer 9",
        ),
    ],
)
def test_a_stage_that_cannot_be_run_is_refused_before_the_first_begins(stage: dict[str, Any], message: str, tmp_path: Path) -> None:
    plan = Recipe([Stage("first"), Stage("bad", **stage)], metric="accuracy", training={"max_steps": 8})
    refused(tmp_path, plan, rf"stages\[1\].{message}")


def test_layers_that_cannot_go_are_refused_before_the_first_stage(tmp_path: Path) -> None:
    plan = Recipe([Stage("first"), Stage("bad", pruning=HEADS, drop_layers=True)], metric="accuracy")
    message = r"stages\[1\].drop_layers: model_type='albert': .* cannot be counted one by one"
    refused(tmp_path, plan, message, tiny("albert", "sequence-classification"))


def test_a_vocabulary_that_nobody_cut_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    """Data come tokenized, and the texts are not there any more."""
    message = "vocabulary=.*: is cut before anything is tokenized; pass model and tokenizer that recipe.prepare"
    with pytest.raises(ConfigError, match=message):
        pipeline(tmp_path, Recipe([Stage("fine-tune")], vocabulary=Vocabulary())).run()
    assert not list(tmp_path.iterdir())


def test_a_metric_that_is_not_there_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    plan = Recipe([Stage("first")], metric="acuracy")
    refused(tmp_path, plan, r"metric='acuracy': must be one of loss, accuracy. Did you mean 'accuracy'")


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "bart"])
def test_every_dropout_is_set(family: str) -> None:
    config = tiny(family, "sequence-classification").config
    set_dropout(config, 0.25)
    model = AutoModelForSequenceClassification.from_config(config)
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates
    assert set(rates) == {0.25}
    with pytest.raises(ConfigError, match=r"dropout=-1: must be a number in \[0, 1\)"):
        set_dropout(config, -1)


def shallow(folder: Path) -> Pipeline:
    stages = [
        Stage("fine-tune"),
        Stage("fewer layers", num_layers=2, distillation={**TEACH, "alpha_hidden_layers": 1.0}),
        Stage("narrower", hidden_size=24, distillation={**TEACH, "alpha_hidden": 1.0}),
        Stage("heads", pruning=HEADS, distillation=TEACH),
    ]
    return pipeline(folder, Recipe(stages, metric="accuracy", training={"max_steps": 4}))


def test_stages_that_shrink_the_whole_model(tmp_path: Path) -> None:
    """Those go that cost least; the teacher keeps them all, and all counts are relative to the model before."""
    result = shallow(tmp_path).run()
    assert [len(row.heads) for row in result.rows] == [3, 2, 2, 2]
    assert result.rows[1].sparsity == pytest.approx(1 / 3)
    assert result.rows[2].sparsity == pytest.approx(1 - 2 / 3 * 24 / 32)
    sizes = [(row.sparsity, -row.parameters) for row in result.rows]
    assert sizes == sorted(set(sizes))
    start = loaded(tmp_path, "fine-tune")
    rows = [default_data_collator(ragged_rows(64))]
    expected = shrink_depth(start, 2, rows, calibration_rows=64).config.hf_prune
    assert loaded(tmp_path, "fewer layers").config.hf_prune == expected
    assert loaded(tmp_path, "heads").config.hf_prune["removed_layers"] == expected["removed_layers"]
    assert loaded(tmp_path, "heads").config.hidden_size == 24
    again = shallow(tmp_path).run()
    assert again.rows == result.rows


@pytest.mark.slow
def test_a_stage_with_fewer_and_narrower_experts(tmp_path: Path) -> None:
    """Every layer has so many, before the stage trains; too few are refused before the first stage."""
    torch.manual_seed(0)
    config = MIXTURES["qwen3-moe"]()
    model = AutoModelForSequenceClassification.from_config(config)
    stages = [Stage("fewer experts", num_experts=4, moe_intermediate_size=8, distillation=TEACH)]
    result = pipeline(tmp_path, Recipe(stages, metric="accuracy", training={"max_steps": 2}), model).run()
    assert result.rows[1].parameters < result.rows[0].parameters
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "01-fewer experts")
    assert (small.config.num_experts, small.config.moe_intermediate_size) == (4, 8)
    refused(tmp_path / "none", Recipe([Stage("none", num_experts=1)]), r"stages\[0\].num_experts=1: must be a whole number", model)
    stage = Stage("none", moe_intermediate_size=3)
    refused(tmp_path / "none", Recipe([stage]), r"stages\[0\].moe_intermediate_size=3: must be a multiple of 8", model)


def test_layers_are_dropped_after_neurons_were_pruned(tmp_path: Path) -> None:
    plan = Recipe(
        [
            Stage("neurons", pruning={"pattern": "neuron", "criterion": "magnitude", "schedule": "constant"}),
            Stage("heads", pruning={**HEADS, "scope": "global", "max_sparsity_per_module": 1.0}, drop_layers=True),
        ],
        metric="accuracy",
        training={"max_steps": 4},
    )
    model = tiny_bert()
    for parameter in model.bert.encoder.layer[0].attention.parameters():
        parameter.data *= 1e-3
    first = pipeline(tmp_path, plan, model).run()
    assert loaded(tmp_path, "heads").config.num_hidden_layers == 2
    assert pipeline(tmp_path, plan, model).run().rows == first.rows
