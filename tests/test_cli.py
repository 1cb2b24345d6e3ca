"""`hf-prune` as a person uses it: real folders, in process where the process does not matter."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from card_cases import FACTS, HALF, halved
from command_line import CommandLine
from helpers import tiny_bert
from hub_server import TOKEN, run_with_hub, serving
from reloading import save_tokenizer, without
from transformers import AutoModelForSequenceClassification

import hf_prune
from hf_prune import CardFacts, PruningConfig, condense, condense_plan, sparsity_report
from hf_prune.hub import write_card


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model as a run leaves it: with tokenizer, card and facts."""
    folder = tmp_path_factory.mktemp("masked")
    model = halved(how="out")
    model.save_pretrained(folder)
    save_tokenizer(folder)
    write_card(folder, model, HALF, FACTS)
    return folder


def test_inspect_says_what_cannot_be_pruned(cli: CommandLine, tmp_path: Path) -> None:
    models.tiny("wav2vec2").save_pretrained(tmp_path)
    assert "not pruned: wav2vec2.encoder.pos_conv_embed.conv" in cli("inspect", tmp_path)


@pytest.fixture(scope="module")
def condensed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("condensed")
    condense(halved(how="out")).save_pretrained(folder)
    return folder


def test_inspect(cli: CommandLine, masked: Path, condensed: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(masked)
    report = cli.json("inspect", masked, "--pad-to-multiple-of", 1)
    assert report["sparsity"] == sparsity_report(model).sparsity == pytest.approx(report["total_sparsity"])
    assert report["parameters_after_condense"] == model.num_parameters() - condense_plan(model).parameters
    assert report["bytes_on_disk"] == (masked / "model.safetensors").stat().st_size
    assert report["class"] == "BertForSequenceClassification"
    assert [block["alive"] for block in report["original_blocks"]][:2] == [2, 37]
    assert not report["condensed"]
    printed = cli("inspect", masked)
    assert cli.err == "", "a bar or a warning that nobody asked for"
    assert "2 of 4 heads" in printed
    assert f"{model.num_parameters():,}" in printed

    assert "not pruned" not in printed

    small = cli.json("inspect", condensed)
    assert small["condensed"]
    assert small["sparsity"] == 0 < small["total_sparsity"]
    assert small["parameters"] == report["parameters_after_condense"]


@pytest.mark.parametrize(("family", "head"), [("gpt2", "causal-lm"), ("t5", "seq2seq-lm"), ("vit", None), ("bert", "bare")])
def test_any_head(cli: CommandLine, family: str, head: str | None, tmp_path: Path) -> None:
    model = models.tiny(family, head)
    model.save_pretrained(tmp_path)
    assert cli.json("inspect", tmp_path)["class"] == type(model).__name__


def test_condense(cli: CommandLine, masked: Path, tmp_path: Path) -> None:
    made = cli.json("condense", masked, tmp_path / "small", "--pad-to-multiple-of", 8)
    model = AutoModelForSequenceClassification.from_pretrained(masked)
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    batch = models.ragged_batch(model)
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, small(**batch).logits, atol=1e-6)
    assert (made["parameters_before"], made["parameters"]) == (model.num_parameters(), small.num_parameters())
    assert [block["alive"] for block in made["original_blocks"]][:2] == [2, 37]
    assert small.bert.encoder.layer[0].intermediate.dense.out_features == 40  # three dead neurons fill it up
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"tokenizer.json", "modeling_hf_prune.py", "pruning_config.json", "README.md", "pictures"} <= names
    assert CardFacts.load(tmp_path / "small") == FACTS
    assert "trust_remote_code" in (tmp_path / "small" / "README.md").read_text()
    assert f"{made['parameters']:,} parameters" in cli("condense", masked, tmp_path / "again", "--pad-to-multiple-of", 8)
    cli("condense", masked, tmp_path / "equal", "--uniform", code=1)
    assert "no field for num_attention_heads=2 of encoder.layer.0.attention.self" in " ".join(cli.err.split())
    assert not (tmp_path / "equal").exists()


@pytest.mark.parametrize(
    "command", ["inspect", "prune", "evaluate", "condense", "convert", "benchmark", "latency", "plan", "card", "push"]
)
def test_no_command_makes_tensors_up(command: str, cli: CommandLine, condensed: Path, masked: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(masked, folder)
    HALF.to_json_file(tmp_path / "half.json")
    (tmp_path / "rows.txt").write_text("one\n" * 9)
    without(folder, "classifier.weight")
    more = {
        "prune": [folder, out, "--data", tmp_path / "rows.txt", "--sparsity", 0.5],
        "evaluate": [folder, "--data", tmp_path / "rows.txt"],
        "condense": [folder, out],
        "convert": [folder, out],
        "benchmark": [condensed, "--against", folder],
        "latency": [folder, tmp_path / "latency.json"],
        "plan": [folder, tmp_path / "half.json"],
        "push": [folder, "me/half"],
    }
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    cli(command, *more.get(command, [folder]), code=1)
    assert "model: the checkpoint lacks classifier.weight" in " ".join(cli.err.split())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_benchmark_and_card(cli: CommandLine, condensed: Path, masked: Path, tmp_path: Path) -> None:
    quick = ("--batch-size", 2, "--tokens", 8, "--repeats", 2)
    figures = cli.json("benchmark", condensed, "--against", masked, *quick)
    assert figures["latency_ratio"] == figures["dense"]["milliseconds"] / figures["model"]["milliseconds"]
    assert figures["dense"]["parameters"] > figures["model"]["parameters"]
    assert figures["against"] == str(masked)
    assert "times as fast as a random model" in cli("benchmark", condensed, *quick)

    condense(halved(how="out")).save_pretrained(tmp_path)
    FACTS.save(tmp_path)
    assert Path(cli.json("card", tmp_path, *quick)["path"]).read_text().count("latency.png") == 1
    assert CardFacts.load(tmp_path).comparison is not None
    assert "Protocol: batch of 2 × 8" in (tmp_path / "README.md").read_text()


def test_a_card_says_which_file_is_fastest(cli: CommandLine, tmp_path: Path) -> None:
    condense(halved(how="out")).save_pretrained(tmp_path / "small")
    best = {"runtime": "onnx", "dtype": "int8-dynamic", "bytes": 2_500_000, "speedup": {"1x32": 5.5, "8x128": 4.25}}
    report = {
        "best": best | {"command": "--format onnx --quantize int8-dynamic", "metric": 0.5},
        "machine": {"name": "a processor", "flags": ["avx2", "avx512_vnni"], "cores": 2},
        "protocol": "1 thread, CPU time, median of 2 forwards in turn",
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    cli("card", tmp_path / "small", "--no-measure", "--runtimes", tmp_path / "report.json")
    card = " ".join((tmp_path / "small" / "README.md").read_text().split())
    assert "is of onnx in int8-dynamic, of 2.5 MB: 5.50 at 1x32, 4.25 at 8x128 times as fast as the dense model" in card
    assert "(a processor, avx2, avx512_vnni; 1 thread, CPU time, median of 2 forwards in turn)" in card
    assert 'hf-prune export "small" OUT --format onnx --quantize int8-dynamic' in card
    assert CardFacts.load(tmp_path / "small").runtimes["bytes"] == 2_500_000
    cli("card", tmp_path / "small", "--no-measure")
    assert "5.50 at 1x32" in (tmp_path / "small" / "README.md").read_text()
    (tmp_path / "report.json").write_text(json.dumps(report | {"best": None}))
    cli("card", tmp_path / "small", "--no-measure", "--runtimes", tmp_path / "report.json", code=1)
    assert "with a best row" in " ".join(cli.err.split())


def test_plan(cli: CommandLine, masked: Path, tmp_path: Path) -> None:
    HALF.to_json_file(tmp_path / "half.json")
    groups = cli.json("plan", masked, tmp_path / "half.json")["groups"]
    assert [(group["pattern"], group["units"]) for group in groups] == [("head", 4)] * 3 + [("neuron", 40)] * 3
    assert "bert.encoder.layer.2.attention.self" in cli("plan", masked, tmp_path / "half.json")


def test_convert(cli: CommandLine, tmp_path: Path) -> None:
    small = condense(halved(how="out"))
    small.save_pretrained(tmp_path / "v4")
    (tmp_path / "v4" / "modeling_hf_prune.py").unlink()
    config = json.loads((tmp_path / "v4" / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("hf_prune", "auto_map")} | {
        "pruned_heads": {"0": [0, 1]}
    }
    (tmp_path / "v4" / "config.json").write_text(json.dumps(config))
    assert cli.json("convert", tmp_path / "v4", tmp_path / "v5")["parameters"] == small.num_parameters()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "v5")
    batch = models.ragged_batch(small)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, small(**batch).logits)


def test_push(masked: Path, tmp_path: Path) -> None:
    code = "import sys; from hf_prune.cli import main; main(sys.argv[1:])"
    (tmp_path / "here").mkdir()
    settings = {"home": tmp_path / "here" / "home"}
    with serving() as (hub, endpoint):
        done = run_with_hub(code, "push", masked, "me/half", "--private", "--json", endpoint=endpoint, **settings)
        assert done.returncode == 0, done.stderr
        files = hub.branches["me/half"]["main"]
        assert {"model.safetensors", "README.md", "pictures/kept.png", "tokenizer.json"} <= files.keys()
        assert 'from_pretrained("me/half")' in files["README.md"].decode()
        assert json.loads(done.stdout)["commit"] == hub.heads["me/half", "main"]
        assert hub.private["me/half"]
        seen = run_with_hub(code, "inspect", "me/half", "--json", endpoint=endpoint, **settings)
        assert json.loads(seen.stdout)["class"] == "BertForSequenceClassification"
        refused = run_with_hub(code, "push", masked, "me/half", endpoint=endpoint, HF_TOKEN=f"{TOKEN}x", **settings)
        assert refused.returncode == 1
        assert "401" in refused.stderr
        assert "Traceback" not in refused.stderr


def test_help_and_usage(cli: CommandLine) -> None:
    printed = cli("--help")
    for command in ("inspect", "prune", "evaluate", "condense", "benchmark", "plan", "card", "push", "convert"):
        assert command in printed
    cli("inspct", "x", code=2)
    assert "inspect" in cli.err
    cli("inspect", "x", "--jsn", code=2)
    assert "--json" in cli.err
    cli("benchmark", "x", "--repeats", 0, code=2)
    cli("condense", "x", code=2)


def test_version(cli: CommandLine) -> None:
    assert cli("--version") == f"hf-prune {hf_prune.__version__}\n"


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
from hf_prune.cli import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "transformers"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code, "plan", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_errors_name_what_is_wrong(cli: CommandLine, masked: Path, tmp_path: Path) -> None:
    def fails(*arguments: object) -> str:
        cli(*arguments, code=1)
        assert cli.out == ""
        return " ".join(cli.err.split())

    (tmp_path / "model").mkdir()
    assert "has no config.json" in fails("inspect", tmp_path / "model")
    tiny_bert().save_pretrained(tmp_path / "dense")
    assert f"is not a folder. Did you mean '{tmp_path / 'dense'}'" in fails("inspect", tmp_path / "dens")
    for far in ("modle", "xyz"):  # a folder without a model; one that only lies in the same place
        assert "Did you mean" not in fails("inspect", tmp_path / far)
    assert "there are models in its subfolders dense" in fails("inspect", tmp_path)
    assert "0.00% of its weights are zero. There is nothing to cut out" in fails("condense", tmp_path / "dense", tmp_path / "out")
    assert "there is nothing to convert" in fails("convert", tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "is not empty" in fails("condense", masked, masked)
    (tmp_path / "config.json").write_text(json.dumps({**PruningConfig(pattern="head").to_dict(), "pattern": "heads"}))
    assert "pattern='heads'" in fails("plan", masked, tmp_path / "config.json")
    assert "Did you mean 'head'?" in " ".join(cli.err.split())
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    assert "merge it first" in fails("inspect", tmp_path / "model")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClasification"]}))
    assert "Did you mean 'BertForSequenceClassification'?" in fails("inspect", tmp_path / "dense")


def test_it_runs_as_a_module(masked: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "hf_prune.cli", "inspect", str(masked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 4 heads" in done.stdout


def test_a_config_is_read_before_the_model(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")  # no model that could be loaded
    (tmp_path / "plan.json").write_text('{"pattern": "heads"}')
    cli("plan", tmp_path, tmp_path / "plan.json", code=1)
    assert "pattern='heads'" in cli.err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": "encoder[a-z]+"}, "target_modules='encoder[a-z]+': matches no module"),
        ({"target_modules": "x[/]y"}, "target_modules='x[/]y': matches no module"),
        ({"target_sparsity": 10**400}, "target_sparsity=1000"),
        ({"target_modules": "a{99999999999}"}, "target_modules='a{99999999999}': repeats something more than 1,000,000 times"),
        ({"target_modules": r"(.|[a-z]|\w)*[!?]"}, "takes more than 1 s to match against 'bert."),
        ({"target_modules": "(" * 5000 + ")" * 5000}, "is not a valid regular expression"),
        ('{"pattern": ' + "[" * 100_000, "is not valid JSON"),
        ('{"target_sparsity": 1' + "0" * 5000 + "}", "is not valid JSON"),
        ('{"pattern": ' + "[" * 500 + "]" * 500 + "}", "pattern=[["),
    ],
)
def test_hostile_configs_end_in_one_line(config: Any, message: str, cli: CommandLine, masked: Path, tmp_path: Path) -> None:
    text = config if isinstance(config, str) else json.dumps({"pattern": "1x1", **config})
    (tmp_path / "plan.json").write_text(text)
    cli("plan", masked, tmp_path / "plan.json", code=1)
    *progress, line = cli.err.splitlines()
    assert not any(progress) or progress[-1].startswith("Loading weights: 100%")
    assert line.startswith("Error: ")
    assert message in line
    assert len(line) < 1000


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("{", "pruning_facts.json: CardFacts file="),
        ("[]", "pruning_facts.json: CardFacts=[]: must be an object"),
        ('{"metrics": [1]}', "pruning_facts.json: metrics=[1]: must be an object."),
        ('{"metrics": {"f1": "good"}}', "pruning_facts.json: metrics={'f1': 'good'}: must be an object"),
        ('{"comparison": {}}', "pruning_facts.json: comparison.dense.Cost=None: must be an object"),
        ('{"model_name": 5}', "pruning_facts.json: model_name=5: must be a text or null."),
    ],
)
def test_malformed_facts_end_in_one_line(facts: str, message: str, cli: CommandLine, masked: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(masked, tmp_path / "model"))
    (folder / "pruning_facts.json").write_text(facts)
    cli("card", folder, "--no-measure", code=1)
    assert message in cli.err


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_truncated_weights_end_in_one_line(command: str, cli: CommandLine, masked: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(masked, tmp_path / "model"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    cli(command, folder, *([tmp_path / "out"] if command == "convert" else []), code=1)
    assert "model: a file of weights cannot be read" in cli.err


@pytest.mark.parametrize("pruned_heads", [[[0, 1]], {"first": [0]}, {"0": 1}, "all"])
def test_malformed_pruned_heads_end_in_one_line(pruned_heads: Any, cli: CommandLine, masked: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(masked, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pruned_heads": pruned_heads}))
    cli("convert", folder, tmp_path / "out", code=1)
    assert f"pruned_heads={pruned_heads!r}: must be an object" in cli.err


@pytest.mark.parametrize("device", ["hpux", "mps" if torch.cuda.is_available() else "cuda"])
def test_a_device_that_is_not_there(device: str, cli: CommandLine, condensed: Path) -> None:
    cli("benchmark", condensed, "--device", device, code=1)
    assert f"device={device!r}: must be a device that is available here" in cli.err
