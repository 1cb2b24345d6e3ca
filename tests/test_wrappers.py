"""Transformers models inside other things: what is found in them, pruned, reported and condensed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import compile_regions
from helpers import ROWS, SCHEDULED, arguments, prune_at_once, tiny_bert
from models import prune_randomly, randomize, tiny
from torch import Tensor, nn
from transformers import Trainer

from hf_prune import (
    ConfigError,
    ModelCardCallback,
    Pruner,
    PruningCallback,
    PruningConfig,
    PruningRule,
    condense,
    condense_plan,
    model_card,
    sparsity_report,
)
from hf_prune.model import SPECS
from hf_prune.model.families import INFERRED
from hf_prune.model.wrappers import transformers_model, transformers_models


class Classifier(nn.Module):
    """A module of one's own around a transformers model: what a Trainer trains as well as any."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny_bert("bare")
        self.head = nn.Linear(32, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and logits."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Pair(nn.Module):
    """Two encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = tiny_bert("bare", seed=0), tiny_bert("bare", seed=1)


def holder(module: nn.Module) -> Any:
    """An object that is no module and has one as an attribute, among others, as SetFit's model does."""
    return SimpleNamespace(body=module, head=nn.Linear(2, 2), labels=["a", "b"])


def parallel() -> Classifier:
    """A module of one's own whose encoder is in a container."""
    model = Classifier()
    model.encoder = nn.DataParallel(model.encoder)
    return model


WRAPPERS = {
    "module": Classifier,
    "object": lambda: holder(Classifier()),
    "compiled": lambda: torch.compile(Classifier()),
    "compiled layer by layer": lambda: compile_regions(Classifier()),
    "parallel inside": parallel,
}


@pytest.fixture(params=WRAPPERS)
def wrapper(request: pytest.FixtureRequest) -> Any:
    return WRAPPERS[request.param]()


def test_the_model_inside_is_found(wrapper: Any) -> None:
    assert list(transformers_models(wrapper)) == ["encoder"]
    assert type(transformers_model(wrapper)).__name__ == "BertModel"


@pytest.mark.parametrize("pattern", ["1x1", "head", "neuron", "block", "layer", "auto"])
def test_every_pattern_prunes_the_model_inside(wrapper: Any, pattern: str) -> None:
    pruner = Pruner(wrapper, PruningConfig(pattern=pattern, target_sparsity=0.5, criterion="magnitude"), total_steps=1)
    plan = pruner.plan()
    assert all(group.name.startswith("encoder.") for group in plan.groups)
    assert "head" in plan.left_out
    pruner.release()
    prune_at_once(pruner.model, pruner.config)
    inner = transformers_model(wrapper)
    assert sparsity_report(wrapper).sparsity == pytest.approx(sparsity_report(inner).sparsity) != 0
    assert [block.alive for block in sparsity_report(wrapper).blocks] == [block.alive for block in sparsity_report(inner).blocks]


def test_the_plan_and_the_report_name_modules_as_the_wrapper_does() -> None:
    model = Classifier()
    names = {name for name, _ in model.named_modules()}
    assert {module.name for module in sparsity_report(model).modules} <= names
    assert {block.name for block in sparsity_report(model).blocks} <= names
    selected = PruningConfig(pattern="1x1", target_modules=["head"], target_sparsity=0.5)
    prune_at_once(model, selected)
    assert (model.head.weight == 0).sum() == 32
    assert sparsity_report(model).sparsity == 0  # of the body


def test_condense_returns_the_wrapper_and_changes_what_it_holds() -> None:
    model = holder(Classifier())
    inner = transformers_model(model)
    prune_randomly(inner)
    batch = {name: torch.tensor([row[name] for row in ROWS[:4]]) for name in ROWS[0]}
    before, size = model.body.eval()(**batch)["logits"], inner.num_parameters()
    assert condense_plan(model).parameters == condense_plan(inner).parameters > 0
    assert condense(model) is model
    assert inner is transformers_model(model)
    assert inner.num_parameters() < size
    torch.testing.assert_close(model.body(**batch)["logits"], before, rtol=0, atol=1e-5)


def test_adapters_inside_a_wrapper_are_seen_through() -> None:
    peft = pytest.importorskip("peft")
    model = Classifier()
    model.encoder = peft.get_peft_model(model.encoder, peft.LoraConfig(target_modules=["query", "value", "dense"]))
    assert list(transformers_models(model)) == ["encoder"]
    prune_at_once(model, PruningConfig(pattern="neuron", target_sparsity=0.5, criterion="magnitude", scope="local"))
    report = sparsity_report(model)
    assert {block.alive for block in report.blocks if block.kind == "neurons"} == {20}
    assert all(".base_model." not in module.name for module in report.modules)
    assert condense_plan(model).parameters > 0


def test_a_trainer_prunes_the_model_inside(tmp_path: Path) -> None:
    model = Classifier()
    config = PruningConfig(pattern="neuron", target_sparsity=0.5, scope="local", criterion="mean_activation", **SCHEDULED)
    callbacks = [PruningCallback(config), ModelCardCallback()]
    args = arguments(tmp_path, num_train_epochs=2)
    trainer = Trainer(model=model, args=args, train_dataset=ROWS, callbacks=callbacks)
    trainer.train()
    assert {block.alive for block in sparsity_report(model).blocks if block.kind == "neurons"} == {20}
    assert "BertModel" in (tmp_path / "README.md").read_text()
    assert condense(model) is model
    assert model.encoder.config.hf_prune is not None


SEVERAL = {"module": Pair, "nested": lambda: holder(Pair())}


@pytest.mark.parametrize("make", SEVERAL.values(), ids=SEVERAL)
@pytest.mark.parametrize("use", [condense, condense_plan, sparsity_report, model_card])
def test_several_models_inside_are_an_error_that_says_how_to_choose(make: Any, use: Any) -> None:
    with pytest.raises(ConfigError, match=r"'query' \(BertModel\), 'document' \(BertModel\).*get_submodule\('query'\)"):
        use(make())


def test_several_modules_of_an_object_are_an_error() -> None:
    several = SimpleNamespace(query=tiny("bert"), document=tiny("bert"))
    with pytest.raises(ConfigError, match=r"`\.query` \(Bert.*`\.document` \(Bert.*pass one of them"):
        sparsity_report(several)
    with pytest.raises(ConfigError, match="must be a torch module"):
        Pruner(object(), PruningConfig(pattern="1x1", target_sparsity=0.5), total_steps=1)


@pytest.mark.parametrize("pattern", ["1x1", "head"])
def test_one_of_several_models_is_chosen_by_its_modules(pattern: str) -> None:
    model = Pair()
    with pytest.raises(ConfigError, match=r"target_modules=None.*All of the first is 'query\\\\\.\.\*'"):
        Pruner(model, PruningConfig(pattern=pattern, target_sparsity=0.5), total_steps=1)
    prune_at_once(model, PruningConfig(pattern=pattern, target_sparsity=0.5, target_modules=r"query\..*", criterion="magnitude"))
    pruner = Pruner(model, PruningConfig(pattern=pattern, target_sparsity=0.5, target_modules=r"query\..*"), total_steps=1)
    assert pruner.sparsity() == sparsity_report(model.query).sparsity > 0
    pruner.release()
    assert sparsity_report(model.document).sparsity == 0
    with pytest.raises(ConfigError, match="target_modules=None"):
        Pruner(model, PruningConfig(pattern=None, keep_zeros=True), total_steps=1)
    assert condense(model.query) is model.query


def test_a_model_shared_by_name_is_one() -> None:
    model = Pair()
    model.document = model.query
    assert list(transformers_models(model)) == ["query"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TimmWrapperModel", "TimmWrapperForImageClassification"])
def test_timm_in_a_wrapper_of_transformers(kind: str, tmp_path: Path) -> None:
    """Its blocks are inferred and proven as those of any model; timm's own class is refused in words."""
    try:
        import timm
    except Exception as error:  # not there, or without a torchvision that fits
        pytest.skip(f"timm: {error}")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    settings = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=3, pretrained_cfg={"input_size": [3, 32, 32]}
    )
    torch.manual_seed(0)
    known = dict(SPECS)
    try:
        model = randomize(getattr(transformers, kind)(settings)).eval()
        rules = [PruningRule(pattern="head"), PruningRule(pattern="neuron")]
        prune_at_once(model, PruningConfig(rules=rules, criterion="magnitude", schedule="constant"))
        images, before = torch.randn(2, 3, 32, 32), model.num_parameters()
        with torch.no_grad():
            wanted = model(images)[0]
            assert condense(model).num_parameters() < 0.7 * before
            assert (model(images)[0] - wanted).abs().max() <= 1e-5
            model.save_pretrained(tmp_path)
            loaded = type(model).from_pretrained(tmp_path).eval()
            assert loaded(images)[0].equal(model(images)[0])
        with pytest.raises(TypeError, match="model is a VisionTransformer; allowed: a transformers PreTrainedModel"):
            condense(timm.create_model("vit_tiny_patch16_224", **sizes))
    finally:
        SPECS.clear()
        SPECS.update(known)
        INFERRED.clear()
