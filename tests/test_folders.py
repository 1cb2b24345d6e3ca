"""What lies beside a model: what comes along to another folder, what goes to the Hub, and that writing is all or nothing."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import shutil
import signal
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import torch
import transformers
from card_cases import FACTS, HALF, halved
from command_line import CommandLine
from huggingface_hub import ModelCard
from reloading import save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

import hf_prune.files
from hf_prune import condense, hub
from hf_prune.files import new_folder, write_text
from hf_prune.hub import write_card
from hf_prune.hub.files import Kind, carry_over, files_to_publish, sort_files
from hf_prune.training.stage import save_condensed

MODEL = {"config.json", "model.safetensors", "README.md", "pruning_config.json", "pruning_facts.json", "pictures/kept.png"}
COMPANIONS = {
    "tokenizer.json",
    "bpe.codes",
    "normalizer.json",
    "spiece.model",
    "preprocessor_config.json",
    "additional_chat_templates/tool_use.jinja",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "3_Dense/config.json",
    "3_Dense/model.safetensors",
    "LICENSE",
}
UNKNOWN = {"notes.txt", "data/train.csv", "3_Dense/weights.pt", "tokenizer.json.bak", "vocabulary/words"}
RUN = {"checkpoint-3/", "optimizer.pt", "training_args.bin", "trainer_state.json", "runs/", "wandb/", "eval_results.json"}
OTHER = {"onnx/", "tf_model.h5", "condensed/", "data/other.safetensors", "adapter/"}
PRIVATE = {".env", ".netrc", ".cache/", "id_rsa", "ID_RSA.pub", "token", "hf_token.txt", "server.pem", "1_Pooling/.env"}
KINDS = {
    Kind.MODEL: MODEL,
    Kind.COMPANION: COMPANIONS,
    Kind.UNKNOWN: UNKNOWN,
    Kind.RUN: RUN,
    Kind.OTHER: OTHER,
    Kind.PRIVATE: PRIVATE,
}

MODULES = [{"path": path} for path in ("", "1_Pooling", "2_Normalize", "3_Dense")]


def put(folder: Path, name: str, content: str = "x") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A folder with one of everything; what is no file of the model holds its own name."""
    folder = tmp_path / "crowded"
    for names in KINDS.values():
        for name in names:
            put(folder, f"{name}config.json" if name.endswith("/") else name, name)
    put(folder, "modules.json", json.dumps(MODULES))
    put(folder, "adapter/adapter_config.json")
    (folder / "adapter" / "config.json").unlink()
    (folder / "2_Normalize").mkdir()
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------- the rule


def test_each_file_is_of_one_kind(crowded: Path) -> None:
    found = sort_files(crowded)
    assert {kind: {name for name in found if found[name] is kind} for kind in Kind} == KINDS


def test_companions_and_what_is_unknown_come_along(crowded: Path, tmp_path: Path) -> None:
    left = carry_over(crowded, tmp_path / "out")
    assert names_in(tmp_path / "out") == COMPANIONS | UNKNOWN
    assert (tmp_path / "out" / "2_Normalize").is_dir()
    assert left.keys() == RUN | OTHER | PRIVATE
    assert left["token"] == "hidden, or named like a secret"


def test_what_is_known_is_published(crowded: Path) -> None:
    names, left = files_to_publish(crowded)
    assert set(names) == MODEL | COMPANIONS
    assert left.keys() == UNKNOWN | RUN | OTHER | PRIVATE


def test_links_out_of_the_folder_are_not_followed(crowded: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    (crowded / "stray").symlink_to(secret)
    (crowded / "folder").symlink_to(tmp_path)
    (crowded / "again.txt").symlink_to("notes.txt")
    left = carry_over(crowded, tmp_path / "out")
    assert left.keys() >= {"stray", "folder"}
    assert "a link to elsewhere" in left["stray"]
    assert (tmp_path / "out" / "again.txt").read_text() == "notes.txt"
    assert not any("s3cret" in path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for name in ("LICENSE", "1_Pooling"):
        shutil.rmtree(crowded / name) if (crowded / name).is_dir() else (crowded / name).unlink()
        (crowded / name).symlink_to(secret if name == "LICENSE" else tmp_path)
        for take in (files_to_publish, lambda folder: carry_over(folder, tmp_path / "more")):
            with pytest.raises(ValueError, match=rf"{name}: is a link to elsewhere"):
                take(crowded)
        (crowded / name).unlink()


def test_a_snapshot_in_the_hubs_cache_is_made_of_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--half" / "snapshots" / "0123"
    put(tmp_path / "models--me--half" / "blobs", "abc", "words")
    snapshot.mkdir(parents=True)
    (snapshot / "vocab.txt").symlink_to("../../blobs/abc")
    carry_over(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"
    assert files_to_publish(snapshot)[0] == ["vocab.txt"]


@pytest.mark.parametrize("modules", ["{", "[1]", "null", '[{"path": 3}]', '[{"path": "../1_Pooling"}]', '[{"path": "/etc"}]'])
def test_modules_that_cannot_be_told_are_refused(modules: str, tmp_path: Path) -> None:
    put(tmp_path, "modules.json", modules)
    with pytest.raises(ValueError, match=r"modules\.json"):
        sort_files(tmp_path)


def test_the_files_of_every_tokenizer_are_known(tmp_path: Path) -> None:
    names: set[str] = set()
    for found in pkgutil.walk_packages(transformers.models.__path__, "transformers.models."):
        if found.name.rpartition(".")[2].startswith("tokenization_"):
            try:
                module = importlib.import_module(found.name)
            except (ImportError, NameError):  # needs what is not installed
                continue
            classes = inspect.getmembers(module, inspect.isclass)
            names |= {name for _, cls in classes if issubclass(cls, PreTrainedTokenizerBase) for name in files_of(cls)}
    assert len(names) > 15
    for name in names:
        put(tmp_path, name)
    assert {name: kind for name, kind in sort_files(tmp_path).items() if kind is not Kind.COMPANION} == {}


def files_of(cls: type[PreTrainedTokenizerBase]) -> set[str]:
    return {name for name in cls.vocab_files_names.values() if isinstance(name, str) and PurePosixPath(name).suffix}


# ------------------------------------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    model = halved(how="out")
    model.save_pretrained(folder)
    save_tokenizer(folder)
    write_card(folder, model, HALF)
    return folder


def cut_neurons(folder: Path) -> None:
    """Make a model one that an older tool pruned: its first layer has fewer neurons than its config says."""
    tensors, layer = load_file(folder / "model.safetensors"), "bert.encoder.layer.0"
    tensors |= {
        f"{layer}.intermediate.dense.{name}": tensors[f"{layer}.intermediate.dense.{name}"][:5] for name in ("weight", "bias")
    }
    tensors[f"{layer}.output.dense.weight"] = tensors[f"{layer}.output.dense.weight"][:, :5]
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "model"))


def test_condense_carries_over(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    for name in ("bpe.codes", "normalizer.json", "tokenizer.model/words", "notes.txt", "token", "optimizer.pt", "model.bin"):
        put(folder, name, name)
    made = cli.json("condense", folder, tmp_path / "small")
    assert made["left_out"].keys() == {"token", "optimizer.pt", "model.bin"}
    carried = {"bpe.codes", "normalizer.json", "tokenizer.model/words", "notes.txt", "tokenizer.json", "tokenizer_config.json"}
    assert names_in(tmp_path / "small") == carried | MODEL | {"modeling_hf_prune.py"}
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert sum(tensor.numel() for tensor in small.values()) == made["parameters"]
    assert "Left out: token, hidden, or named like a secret." in cli("condense", folder, tmp_path / "again")


@pytest.mark.parametrize("command", ["condense", "convert"])
@pytest.mark.parametrize("fails", ["save_pretrained", "write_card", "copyfile"])
def test_a_folder_is_written_whole_or_not_at_all(
    command: str, fails: str, cli: CommandLine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    if command == "convert":
        cut_neurons(folder)
    owner = {"save_pretrained": transformers.PreTrainedModel, "write_card": hub.saving, "copyfile": shutil}[fails]
    monkeypatch.setattr(owner, fails, full)
    cli(command, folder, tmp_path / "deep" / "small", code=1)
    assert "No space left" in cli.err
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("command", ["condense", "convert", "export"])
def test_nothing_is_written_over(command: str, cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    put(tmp_path, "full/precious")
    put(tmp_path, "file")
    for out, why in ((tmp_path / "full", "is not empty"), (tmp_path / "file", "is a file"), (folder, "is not empty")):
        cli(command, folder, out, code=1)
        assert f"OUT={out}: {why}" in " ".join(cli.err.split())
    assert names_in(tmp_path / "full") == {"precious"}


def test_a_dry_run_lists_and_sends_nothing(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    for name in ("token", ".env", "data.csv", "wandb/run", "checkpoint-3/model.safetensors"):
        put(folder, name)
    (folder / "README.md").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    listed = cli.json("push", folder, "me/half", "--dry-run")
    assert set(listed["files"]) == MODEL | {"tokenizer.json", "tokenizer_config.json"}
    assert listed["left_out"].keys() == {"token", ".env", "data.csv", "wandb/", "checkpoint-3/"}
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "Left out: wandb/, left by a training run." in cli("push", folder, "me/half", "--dry-run")
    assert "README.md" not in cli.json("push", folder, "me/half", "--dry-run", "--no-new-card")["files"]


def test_a_sentence_transformers_model_stays_one(cli: CommandLine, tmp_path: Path) -> None:
    """The other modules come along, so the condensed model gives the same unit vectors."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    source, out = tmp_path / "model", tmp_path / "small"
    body = halved(how="out").bert
    body.save_pretrained(tmp_path / "body")
    save_tokenizer(tmp_path / "body")
    modules = pytest.importorskip("sentence_transformers.models")
    transformer = modules.Transformer(str(tmp_path / "body"))
    parts = [transformer, modules.Pooling(32), modules.Dense(32, 8), modules.Normalize()]
    dense = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
    dense.save(str(source))
    cli("condense", source, out)
    small = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    assert [type(module).__name__ for module in small] == ["Transformer", "Pooling", "Dense", "Normalize"]
    sentences = ["two three five", "one"]
    embeddings = torch.from_numpy(small.encode(sentences))
    assert torch.allclose(embeddings, torch.from_numpy(dense.encode(sentences)), atol=1e-6)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2))
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= set(files_to_publish(out)[0])
    for card in (ModelCard.load(out / "README.md"), hub.model_card(small)):
        assert (card.data.library_name, card.data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
        assert "import SentenceTransformer\n\nmodel = SentenceTransformer(" in card.content
        assert "AutoModel" not in card.content


# ------------------------------------------------------------------------------------------------------------------ all or nothing


def test_a_new_folder_appears_when_it_is_done(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        put(folder, "a")
        assert not (tmp_path / "out").exists()
    assert names_in(tmp_path) == {"out/a"}
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "other") as folder:
        interrupted(folder)
    assert names_in(tmp_path) == {"out/a"}


def test_a_folder_is_replaced_when_its_successor_is_done(tmp_path: Path) -> None:
    put(tmp_path, "out/old")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", replace=True) as folder:
        interrupted(folder)
    assert names_in(tmp_path) == {"out/old"}
    with new_folder(tmp_path / "out", replace=True) as folder:
        put(folder, "new")
        assert (tmp_path / "out" / "old").is_file()
    assert names_in(tmp_path) == {"out/new"}
    with pytest.raises(ValueError, match="is not empty"), new_folder(tmp_path / "out"):
        pass


#: Loads `hf_prune/files.py` alone, which takes no time, writes a folder and kills itself at a moment.
KILLED = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
moment, seen, replace = int(sys.argv[3]), [], os.replace
def count():
    seen.append(None)
    if len(seen) == moment:
        os.kill(os.getpid(), signal.SIGKILL)
def replaced(*paths):
    count()
    replace(*paths)
    count()
os.replace = replaced
with files.new_folder(sys.argv[2], replace=True) as folder:
    (folder / "new").write_text("half")
    count()
    (folder / "new").write_text("whole")
"""


@pytest.mark.parametrize("moment", range(1, 6))
def test_what_a_killed_process_leaves_is_removed_by_the_next_and_nothing_is_lost(moment: int, tmp_path: Path) -> None:
    """Killed while it writes, before, between and after the two renames."""
    put(tmp_path, "out/old")
    put(tmp_path, ".out-mine/keep")
    arguments = [str(Path(hf_prune.files.__file__)), str(tmp_path / "out"), str(moment)]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments]).returncode == -signal.SIGKILL
    there = {"out/new"} if moment == 5 else {"out/old"} if moment < 3 else set()
    assert {name for name in names_in(tmp_path) if name.startswith("out/")} == there
    (left,) = tmp_path.glob(".out-*.unfinished")
    with pytest.raises(ValueError, match="is not empty"), new_folder(tmp_path / "out"):  # it puts back what was there
        pass
    assert names_in(tmp_path) == (there or {"out/old"}) | {".out-mine/keep"}
    assert not left.exists()


def test_what_somebody_is_still_writing_stays(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a-b") as other, new_folder(tmp_path / "a") as first:
        put(other, "file")
        put(first, "file")
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a") as second:
            interrupted(second)
    assert names_in(tmp_path) == {"a/file", "a-b/file"}


def test_a_condensed_model_below_its_source_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = halved(how="out")
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    write_card(tmp_path, model, HALF, FACTS)
    for name in ("predict_predictions.json", "train_results.json", "checkpoint-2/model.safetensors"):
        put(tmp_path, name)
    save_condensed(condense(model), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    companions = {"tokenizer.json", "tokenizer_config.json"}
    assert names_in(tmp_path / "condensed") == {*MODEL, *companions, "modeling_hf_prune.py", "pictures/history.png"}
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, folder: interrupted(folder))
    with pytest.raises(KeyboardInterrupt):
        save_condensed(model, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)} == before


WRITERS = {
    "modeling_hf_prune.py": lambda folder: condense(halved(how="out")).config.save_pretrained(folder),
    "pruning_config.json": HALF.save_pretrained,
    "pruning_facts.json": FACTS.save,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_that_is_killed_leaves_the_old_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[name](tmp_path)
    before = (tmp_path / name).read_bytes()

    def killed(path: Path, text: str, **kwargs: object) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        WRITERS[name](tmp_path)
    assert (tmp_path / name).read_bytes() == before


def interrupted(folder: Path) -> None:
    put(folder, "a")
    raise KeyboardInterrupt


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "new \ud800")
    assert (tmp_path / "a").read_text() == "old"
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
