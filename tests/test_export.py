"""Models leave Python: files for other runtimes, torch.export and torch.compile give what the model gives."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from card_cases import halved
from command_line import CommandLine
from reloading import save_tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from hf_prune import Pruner, PruningConfig, condense, export_model
from hf_prune.export import compare, graphs, onnx, openvino, runtimes
from hf_prune.settings.errors import ConfigError

#: Family → task head. One encoder, one decoder, one of both; the rest is slow.
CASES = {"bert": "sequence-classification", "llama": "causal-lm", "t5": "seq2seq-lm"}
ALL = [
    pytest.param(family, head, marks=() if family in CASES else pytest.mark.slow)
    for family, head in ({family: models.heads_of(family)[-1] for family in models.FAMILIES} | CASES).items()
]


def condensed(family: str, head: str, **config: Any) -> PreTrainedModel:
    """Uneven sizes, nothing left in the first layer of each list but what its biases add."""
    model = models.tiny(family, head, **config)
    models.prune_randomly(model)
    models.empty_layers(model, {0})
    return condense(model, verify=False)


def first(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**batch, return_dict=True)[0]
    return output


def separate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch; no tensor stands under two names."""
    return {name: value.clone() for name, value in batch.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A condensed classifier with its tokenizer and the data of its task, and what it becomes in ONNX."""
    folder = tmp_path_factory.mktemp("home")
    model = condense(halved(how="out"))
    model.save_pretrained(folder / "small", max_shard_size="50KB")
    assert len([*(folder / "small").glob("model-*-of-*.safetensors")]) > 1
    save_tokenizer(folder / "small")
    (folder / "small" / "notes.txt").write_text("mine")
    words = ("one", "two", "three", "four", "five")
    rows = [{"sentence": " ".join(words[(place * step) % 5] for step in range(2 + place % 6))} for place in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    export_model(model, folder / "small", folder / "onnx")
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize(("family", "head"), ALL)
def test_onnx(family: str, head: str, tmp_path: Path) -> None:
    """Compared by the library on batches of three shapes, and here on one more."""
    pytest.importorskip("onnxruntime")
    model = condensed(family, head)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "source").mkdir()
    made = export_model(model, tmp_path / "source", tmp_path / "out")
    assert made.agreement.difference <= 1e-5
    assert not model.training
    assert model.config.use_cache if hasattr(model.config, "use_cache") else True
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.set_attn_implementation("eager")
    batch = models.ragged_batch(model, 7, 12)
    given = graphs.joined(tmp_path / "out" / made.file, onnx.open_file)(batch)
    assert float((next(iter(given.values())) - first(model, batch)).abs().max()) <= 1e-5


#: LED cuts rows into windows by their lengths, DeepSeek-V2 turns by complex numbers: torch has no ONNX for either.
NOT_IN_ONNX = ("led", "deepseek_v2")


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family == "llama" else pytest.mark.slow) for family in models.GENERATORS]
)
def test_what_is_written_in_onnx_runtime_is_the_same(family: str, tmp_path: Path) -> None:
    """A loop that needs nothing but ONNX Runtime, over the files, inputs and outputs that optimum names."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = condensed(family, models.GENERATORS[family])
    (tmp_path / "source").mkdir()
    if family in NOT_IN_ONNX:
        with pytest.raises(compare.ExportError, match=r"torch\.onnx does not export"):
            export_model(model, tmp_path / "source", tmp_path / "out")
        return
    export_model(model, tmp_path / "source", tmp_path / "out")
    files = {
        path.stem: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in (tmp_path / "out" / "onnx").iterdir()
    }
    start = models.ragged_batch(model, 2, 6)
    start.pop("decoder_input_ids", None)
    start = {name: value[:1, :2] if name in ("input_ids", "attention_mask") else value[:1] for name, value in start.items()}
    settings: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "num_beams": 1}
    wanted = model.generate(**start, **settings)[0, -10:-1].tolist()  # some families have a way of ending
    if "encoder_model" in files:
        found = [model.generation_config.decoder_start_token_id]
        given = {put.name: start[put.name].numpy() for put in files["encoder_model"].get_inputs()}
        (states,) = files["encoder_model"].run(None, given)
        beside = {"encoder_hidden_states": states, "encoder_attention_mask": given.get("attention_mask")}
        for _ in range(9):
            given = beside | {"input_ids": np.array([found])}
            (logits,) = files["decoder_model"].run(None, {put.name: given[put.name] for put in files["decoder_model"].get_inputs()})
            found.append(chosen(model, logits))
    else:
        found = start["input_ids"][0].tolist()
        session = files["model"]
        pairs = [put for put in session.get_inputs() if put.name.startswith("past_key_values.")]
        assert len(pairs) == 2 * model.config.num_hidden_layers
        past = {put.name: np.zeros((1, put.shape[1], 0, put.shape[3]), np.float32) for put in pairs}
        new = found
        for _ in range(9):
            positions = np.arange(len(found) - len(new), len(found))[None]
            given = {"input_ids": np.array([new]), "attention_mask": np.ones((1, len(found)), np.int64), "position_ids": positions}
            logits, *states = session.run(None, {put.name: ({**given, **past})[put.name] for put in session.get_inputs()})
            past = dict(zip(past, states))
            new = [chosen(model, logits)]
            found.append(new[0])
    assert found[-9:] == wanted


def chosen(model: PreTrainedModel, logits: Any) -> int:
    """The likeliest token that does not end the text."""
    ends = model.generation_config.eos_token_id
    logits[..., [ends] if isinstance(ends, int) else ends or []] = -np.inf
    return int(logits[0, -1].argmax())


@pytest.mark.core
def test_a_folder_has_what_others_look_for(home: Path) -> None:
    """The layout of optimum and Transformers.js; a tokenizer and a file are all that is needed."""
    onnxruntime = pytest.importorskip("onnxruntime")
    assert names_in(home / "onnx") == {"config.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json", "notes.txt"}
    config = json.loads((home / "onnx" / "config.json").read_text())
    assert not config.keys() & {"hf_prune", "auto_map", "transformers_weights"}
    assert AutoConfig.from_pretrained(home / "onnx").id2label == {0: "LABEL_0", 1: "LABEL_1"}
    session = onnxruntime.InferenceSession(home / "onnx" / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [entry.shape for entry in session.get_inputs()] == [["batch", "sequence"]] * 2  # the tokenizer gives no segments
    assert [entry.name for entry in session.get_outputs()] == ["logits"]
    tokenizer = AutoTokenizer.from_pretrained(home / "onnx")
    encoded = dict(tokenizer(["two three five", "one"], padding=True, return_tensors="np"))
    logits = session.run(["logits"], {entry.name: encoded[entry.name].astype(np.int64) for entry in session.get_inputs()})[0]
    assert logits.shape == (2, 2)
    assert str(home) not in (home / "onnx" / "onnx" / "model.onnx").read_bytes().decode("latin-1")


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int8-dynamic"])
def test_onnx_in_int8(quantize: str, cli: CommandLine, home: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    made = cli.json(
        "export", home / "small", tmp_path / "out", "--quantize", quantize, "--data", home / "rows.jsonl", "--batch-size", 2
    )
    found = made["agreement"]
    assert found["rows"] == (4 if quantize == "int8" else 40)  # scales are chosen by the others
    assert 1e-4 < found["error"] < found["bound"] == 0.3
    assert 0.5 <= found["same"] <= 1
    assert made["bytes"] == (tmp_path / "out" / "onnx" / "model.onnx").stat().st_size
    nodes = onnx.load(tmp_path / "out" / "onnx" / "model.onnx").graph.node
    kinds = {node.op_type for node in nodes}
    products = {name for node in nodes if node.op_type in ("MatMul", "Gemm") for name in node.output}
    rounded = {node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    assert bool(rounded) == (quantize == "int8")
    assert not products & rounded  # what goes into a product is, what comes out is not
    assert ("DynamicQuantizeLinear" in kinds) == (quantize == "int8-dynamic")
    assert "DequantizeLinear" in kinds


# ------------------------------------------------------------------------------------------------------------------------ OpenVINO


@pytest.mark.parametrize(
    ("family", "head"), [pytest.param(*case.values, marks=() if case.values[0] == "bert" else pytest.mark.slow) for case in ALL]
)
def test_openvino(family: str, head: str, tmp_path: Path) -> None:
    """Compared by the library on batches of three shapes, and here on one more."""
    pytest.importorskip("openvino")
    model = condensed(family, head)
    (tmp_path / "source").mkdir()
    made = export_model(model, tmp_path / "source", tmp_path / "out", "openvino")
    assert made.agreement.difference <= 1e-5
    names = {made.file, made.file.replace("decoder", "encoder")}
    assert names_in(tmp_path / "out") >= {"config.json", *names, *(name.replace(".xml", ".bin") for name in names)}
    assert not any(path.name.startswith("tmp") for path in tmp_path.rglob("*"))
    assert str(tmp_path) not in (tmp_path / "out" / made.file).read_text()
    model.set_attn_implementation("eager")
    batch = models.ragged_batch(model, 7, 12)
    given = graphs.joined(tmp_path / "out" / made.file, openvino.open_file)(batch)
    assert float((next(iter(given.values())) - first(model, batch)).abs().max()) <= 1e-5


@pytest.mark.slow
def test_openvino_in_int8(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    data = ("--data", home / "rows.jsonl", "--batch-size", 2)
    made = cli.json("export", home / "small", tmp_path / "out", "--format", "openvino", "--quantize", "int8", *data)
    found = made["agreement"]
    assert found["rows"] == 4
    assert 1e-4 < found["error"] < found["bound"] == 0.3
    assert "FakeQuantize" in (tmp_path / "out" / "openvino" / "openvino_model.xml").read_text()


# --------------------------------------------------------------------------------------------------------------- all or nothing


def test_what_differs_is_not_kept(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "EXACT", -1.0)
    with pytest.raises(compare.ExportError, match=r"computes something else: its outputs differ by \d\.\d+e.\d\d; allowed: -1"):
        export_model(condensed("llama", "causal-lm"), home / "small", tmp_path / "deep" / "out", "per-layer-config")
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("quantized", [False, True, None])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_agrees_with_nothing_else(value: float, quantized: bool | None) -> None:
    """Nor in a batch after the first: nothing is larger than NaN. What PyTorch leaves undefined, padding say, may be so."""
    batches = [{"input_ids": torch.ones(2, 3, dtype=torch.long)} for _ in range(3)]
    wanted = {"logits": torch.arange(12.0).view(2, 6)}
    wrong = {"logits": wanted["logits"].index_fill(1, torch.tensor([2]), value)}
    given = iter([wanted, wrong, wanted])
    with pytest.raises(compare.ExportError, match="2 of 12 values of its logits are not finite"):
        compare.compare(lambda batch: next(given), lambda batch: wanted, batches, quantized)
    found = compare.compare(lambda batch: wrong, lambda batch: wrong, batches, quantized)
    assert (found.difference, found.error) == (0, 0)


def test_padding_is_not_compared_and_tokens_are() -> None:
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    wanted = {"logits": torch.ones(2, 3, 4)}
    padding, token = (wanted["logits"].clone() for _ in range(2))
    padding[1, 2], token[1, 1] = torch.nan, 1.1
    found = compare.compare(lambda batch: {"logits": padding}, lambda batch: wanted, [batch], False)
    assert (found.difference, found.rows, found.same) == (0, 2, 1)
    with pytest.raises(compare.ExportError, match="differ by 1"):
        compare.compare(lambda batch: {"logits": token}, lambda batch: wanted, [batch], False)


def test_infinity_on_both_sides_hides_nothing_beside_it() -> None:
    """Beside the largest number there is, every difference would be small."""
    wanted = torch.zeros(2, 3)
    wanted[0, 0] = -torch.inf
    given = wanted.clone()
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long)}
    assert compare.compare(lambda _: {"logits": given}, lambda _: {"logits": wanted}, [batch], False).difference == 0
    given[1, 1] = 1.0
    with pytest.raises(compare.ExportError, match="the file computes something else"):
        compare.compare(lambda _: {"logits": given}, lambda _: {"logits": wanted}, [batch], False)


def test_a_model_that_gives_nan_is_refused(home: Path, tmp_path: Path) -> None:
    model = models.tiny("bert", num_hidden_layers=1)
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(ConfigError, match="gives NaN or infinity in logits"):
        export_model(model, home / "small", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def full(*args: object) -> None:
    raise OSError("No space left on device")


def killed(graph: object, file: Path, opset: object) -> None:
    file.parent.mkdir()
    file.write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("owner", "name", "ends"), [(shutil, "copyfile", full), (onnx, "write", killed)])
def test_a_folder_is_written_whole_or_not_at_all(
    owner: object, name: str, ends: Callable[..., None], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, ends)
    with pytest.raises((OSError, KeyboardInterrupt)):
        export_model(models.tiny("bert", num_hidden_layers=1), home / "small", tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_a_killed_export_leaves_nothing_half_written(format: str, home: Path, tmp_path: Path) -> None:
    """By SIGKILL, in processes of their own; what lies beside goes with the next export."""
    pytest.importorskip(format)
    whole = {f"out/{name}" for name in names_in(home / "onnx") - {"onnx/model.onnx"}}
    whole |= {"out/onnx/model.onnx"} if format == "onnx" else {f"out/openvino/openvino_model.{end}" for end in ("xml", "bin")}
    (tmp_path / "folder").mkdir()
    script = Path(__file__).with_name("killed_exports.py")
    done = subprocess.run(
        [sys.executable, script, home / "small", tmp_path / "folder", format], capture_output=True, text=True, check=True
    )
    *killed, last = (json.loads(line) for line in done.stdout.splitlines())
    assert len(killed) >= 6
    for report in killed:
        assert report["status"] == -signal.SIGKILL, report
        assert {name for name in report["left"] if not name.startswith(".out-")} in (set(), whole), report
        assert len({name.partition("/")[0] for name in report["left"]}) <= 1, report  # what the one before left is gone
    assert any(report["left"] for report in killed)
    assert last["status"] == 0
    assert set(last["left"]) == whole


def test_the_exporters_reason_is_one_sentence(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("bert", num_hidden_layers=1)
    stock = type(model).forward

    def forward(self: PreTrainedModel, input_ids: Tensor | None = None, **others: Any) -> Any:
        output = stock(self, input_ids=input_ids, **others)
        if float(output.logits.sum()) > 1e9:  # what no graph can say
            raise ValueError("too much")
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(
        compare.ExportError, match=r"^torch\.onnx does not export BertForSequenceClassification: .+; nothing was"
    ) as error:
        export_model(model, home / "small", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "onx"), "format='onx': must be one of onnx"),
        (("--format", "onx"), "Did you mean 'onnx'?"),
        (("--quantize", "int4"), "quantize='int4': must be one of int8, int8-dynamic for onnx. Did you mean 'int8'?"),
        (("--format", "openvino", "--quantize", "int8-dynamic"), "must be one of int8 for openvino"),
        (("--format", "gguf", "--opset", 18), "opset=18: is a setting of onnx"),
        (("--quantize", "int8"), "finds its scales by calibration rows; give data, or take 'int8-dynamic'"),
        (("--opset", 9), "opset=9: must be from 18 to"),
        (("--opset", 99), "opset=99: must be from 18 to"),
        (("--data", "rows.xml"), "data='rows.xml': must end in .txt, .csv, .json, .jsonl"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    options: tuple[object, ...], message: str, cli: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{")  # an error of its own, were it read
    cli("export", tmp_path, tmp_path / "out", *options, code=1)
    assert message in " ".join(cli.err.split())
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}


def test_a_folder_that_is_there_is_not_written_over(cli: CommandLine, home: Path) -> None:
    cli("export", home / "small", home / "small", code=1)
    assert "small: is not empty" in " ".join(cli.err.split())


@pytest.mark.parametrize(("name", "format"), [("onnxruntime", "onnx"), ("openvino", "openvino"), ("xllamacpp", "gguf")])
def test_a_runtime_that_is_not_installed_is_named(
    name: str, format: str, cli: CommandLine, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    cli("export", home / "small", tmp_path / "out", "--format", format, code=1)
    assert re.search(rf"format='{format}': needs .*{name}; `pip install hf-prune\[{format}\]`", " ".join(cli.err.split()))
    assert not list(tmp_path.iterdir())


def test_too_few_rows_and_no_tokenizer(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("")
    data = ("--quantize", "int8", "--data")
    cli("export", home / "small", tmp_path / "out", *data, few, code=1)
    assert "few.jsonl" in " ".join(cli.err.split())
    few.write_text('{"sentence": "one"}\n')
    cli("export", home / "small", tmp_path / "out", *data, few, code=1)
    assert "has 1 rows; it must have at least 8" in " ".join(cli.err.split())
    cli("export", home / "small", tmp_path / "out", *data, home / "rows.jsonl", "--text-column", "sentense", code=1)
    assert "Did you mean 'sentence'?" in " ".join(cli.err.split())
    bare = Path(shutil.copytree(home / "small", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    cli("export", bare, tmp_path / "out", *data, home / "rows.jsonl", code=1)
    assert "has no tokenizer" in " ".join(cli.err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.ones(8, 41, dtype=torch.long)}, "longer than the 40 positions"),
        ({"input_ids": torch.full((8, 4), 99)}, "is beyond the 99 tokens"),
        ({"input_idx": torch.ones(8, 4, dtype=torch.long)}, "Did you mean 'input_ids'?"),
        ({"input_ids": torch.ones(7, 4, dtype=torch.long)}, "must give at least 8 rows"),
        ({"input_ids": torch.ones(8, 0, dtype=torch.long)}, "has rows without tokens"),
    ],
)
def test_rows_that_the_model_does_not_take_are_refused(batch: dict[str, Tensor], message: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        export_model(models.tiny("bert"), home / "small", tmp_path / "out", batches=[batch])
    assert not list(tmp_path.iterdir())


def with_adapters(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), model)


def in_eight_bits(model: Any) -> Any:
    model.classifier.weight = nn.Parameter(model.classifier.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def in_shards(model: Any) -> Any:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model.classifier.weight = nn.Parameter(torch.distributed.tensor.distribute_tensor(model.classifier.weight.detach(), mesh))
    return model


def without_weights(model: Any) -> Any:
    return model.to("meta")


def being_pruned(model: Any) -> Any:
    model.pruner = Pruner(model, PruningConfig(pattern="head"), total_steps=10)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_adapters, "has adapters; merge them first"),
        (in_eight_bits, "is quantized"),
        (in_shards, "is sharded over ranks"),
        (without_weights, "is on the meta device"),
        (being_pruned, "is attached to a Pruner"),
    ],
)
@pytest.mark.parametrize("format", ["onnx", "per-layer-config"])
def test_models_whose_weights_cannot_be_read_are_refused(
    change: Callable[[Any], Any], message: str, format: str, one_rank: None, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_model(change(models.tiny("bert")), home / "small", tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------------------ runtimes


@pytest.mark.slow
def test_runtimes_are_compared(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    halved(how="out").save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    rows = [json.loads(line) | {"label": place % 2} for place, line in enumerate((home / "rows.jsonl").read_text().splitlines())]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shapes = ("--batch-size", 2, "--tokens", 8, "--repeats", 2)
    files = ("--data", home / "rows.jsonl", "--evaluate", tmp_path / "labelled.jsonl", "--picture", tmp_path / "latency.png")
    given = ("benchmark", home / "small", "--against", tmp_path / "dense", "--runtimes", "onnx", *shapes)
    found = cli.json(*given, *files)
    assert [(row["model"], row["runtime"], row["dtype"]) for row in found["rows"]] == [
        (model, runtime, dtype)
        for model in ("dense", "model")
        for runtime, dtypes in (("torch", ("float32", "bfloat16")), ("onnx", ("float32", "int8-dynamic", "int8")))
        for dtype in dtypes
    ]
    exact = [row for row in found["rows"] if row["dtype"] == "float32"]
    assert all(row["agreement"]["difference"] < 1e-5 for row in exact)
    assert len({row["metric"] for row in exact}) == 1  # condensing changes nothing
    assert found["rows"][0]["speedup"] == dict.fromkeys(("1x8", "1x32", "2x8", "2x32"), 1.0)
    assert found["best"]["model"] == "model"
    assert isinstance(found["machine"]["flags"], list)
    assert (tmp_path / "latency.png").stat().st_size > 0
    printed = cli(*given)
    assert "finds its scales by calibration rows" in printed
    assert "Best: " in printed
    assert "hf-prune export " in printed or "The checkpoint is all it needs" in printed


def test_what_does_not_compile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    model = models.tiny("bert", num_hidden_layers=1)
    found = runtimes.benchmark_runtimes(model, model, ("compile",), batch_sizes=(1,), lengths=(8,), repeats=1)
    assert {row.runtime for row in found.rows} == {"torch"}
    assert found.left_out.keys() == {"compile float32", "compile bfloat16"}
    reason = found.left_out["compile float32"]
    assert reason.startswith("compile does not run the model: ")
    assert "RuntimeError: no compiler here" in reason


def test_the_best_file_is_one_that_is_exported() -> None:
    """Neither one that loses too much, nor one that would be refused for what it computes."""

    def row(model: str, dtype: str, small: float, large: float, metric: float, error: float) -> runtimes.RuntimeRow:
        agreement = compare.Agreement(rows=8, difference=error, error=error, same=None, bound=1.0)
        times, speedup = {"1x8": 1.0, "8x8": 1.0}, {"1x8": small, "8x8": large}
        return runtimes.RuntimeRow(model, "onnx", dtype, 8, times, times, agreement, metric, speedup, f"--as {dtype}")

    rows = (
        row("dense", "float32", 9.0, 9.0, 0.80, 0.0),
        row("model", "float32", 2.0, 4.0, 0.80, 1e-6),
        row("model", "bfloat16", 3.0, 2.0, 0.79, 1e-3),
        row("model", "int8-dynamic", 5.0, 5.0, 0.78, 0.1),
        row("model", "int8", 6.0, 6.0, 0.80, 0.31),
    )
    report = runtimes.RuntimeReport(rows, {}, "accuracy", {}, "")
    assert (report.best, report.best_at("1x8"), report.best_at("8x8")) == (rows[1], rows[2], rows[1])
    assert report.to_dict()["best at 1x8"]["dtype"] == "bfloat16"
    said = report.advice("small").splitlines()
    assert said[0].endswith("in float32: 4.00 at 8x8.")
    assert said[1] == "hf-prune export small OUT --as float32"
    assert said[2].endswith("in float32: 3.00 at 1x8.")
    nothing = runtimes.RuntimeReport((rows[0], *rows[3:]), {}, "accuracy", {}, "")
    assert nothing.best is None
    assert "No row is within 1.5 points" in nothing.advice("small")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--runtimes", "onx"), 1, "runtimes='onx': must be of torch, compile, onnx, openvino. Did you mean 'onnx'?"),
        (("--runtimes", ""), 1, "runtimes='': must be of"),
        (("--data", "rows.jsonl"), 2, "--data goes with --runtimes"),
        (("--runtimes", "torch", "--picture", "x.png"), 2, "--picture goes with --evaluate"),
        (("--runtimes", "torch", "--evaluate", "rows.jsonl"), 1, "data='rows.jsonl': is no file"),
    ],
)
def test_what_runtimes_cannot_be_told(options: tuple[object, ...], code: int, message: str, cli: CommandLine, home: Path) -> None:
    cli("benchmark", home / "small", *options, code=code)
    assert message in " ".join(cli.err.replace("│", " ").split())


def test_rows_without_labels_are_no_evaluation(cli: CommandLine, home: Path) -> None:
    cli("benchmark", home / "small", "--runtimes", "torch", "--evaluate", home / "rows.jsonl", code=1)
    assert "has no column label or labels, but sentence" in " ".join(cli.err.split())


# ------------------------------------------------------------------------------------------------------------- torch's own exports


@pytest.mark.core
@pytest.mark.parametrize(("family", "head"), ALL)
def test_torch_export(family: str, head: str) -> None:
    model = condensed(family, head, use_cache=False)  # a cache in the output cannot be exported, of stock models neither
    batch = separate(models.ragged_batch(model))
    with torch.no_grad():
        given = torch.export.export(model, (), kwargs=batch).module()(**batch)
    assert float((given[0] - first(model, batch)).abs().max()) <= 1e-5


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "head"), ALL)
def test_torch_compile(family: str, head: str, backend: str) -> None:
    model = condensed(family, head, use_cache=False)
    batch = models.ragged_batch(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert float((first(compiled, batch) - first(model, batch)).abs().max()) <= 1e-5
