"""Which files of a model's folder are copied to another folder, and which are uploaded to the Hub.

A folder holds more than a model. Its tokenizer and processors, and the other modules of a sentence-transformers model, belong to
it; what a training run left does not; secrets never leave it. [`sort_files`] tells them apart by name and place:

| kind | carried over to a new folder | published |
| --- | --- | --- |
| `MODEL`: weights, configs, card | no: it is written anew | yes |
| `COMPANION`: what the model is used with | yes | yes |
| `UNKNOWN`: anything else | yes | no |
| `RUN`, `OTHER`, `PRIVATE` | no | no |

Links are followed within the folder only (and, in the Hub's cache, to the cache's own blobs).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

MODULES_NAME = "modules.json"


class Kind(Enum):
    """The kind of a file in a model's folder; the value is its description."""

    MODEL = "part of the model itself"
    COMPANION = "what the model is used with"
    UNKNOWN = "not known to belong to a model"
    RUN = "left by a training run"
    OTHER = "another model, or weights in another format"
    PRIVATE = "hidden, or named like a secret"


#: Files of a tokenizer that hold its vocabulary, or ids of it.
_VOCABULARY = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "vocab-*.json",
    "*_vocab.json",
    "merges.txt",
    "*.model",
    "bpe.codes",
    "dict.txt",
    "prophetnet.tokenizer",
    "tekken.json",
)
#: Of a model that lacks tokens, the new id of each old one.
IDS_NAME = "vocabulary_ids.npy"

#: Files in the folder itself, or in that of a module of sentence-transformers, by name; all patterns are in lower case.
_BY_NAME: dict[Kind, tuple[str, ...]] = {
    Kind.MODEL: (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-*-of-*.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model-*-of-*.bin",
        "pytorch_model.bin.index.json",
        "modeling_hf_prune.py",
        "pruning_config.json",
        "pruning_facts.json",
        "readme.md",
        "pictures/*.png",
    ),
    Kind.COMPANION: (
        # tokenizers
        *_VOCABULARY,
        IDS_NAME,
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/*.jinja",
        "normalizer.json",
        "emoji.json",
        "byte_maps.json",
        "word_shape.json",
        "word_pronunciation.json",
        # processors
        "*processor_config.json",
        # sentence-transformers and SetFit
        MODULES_NAME,
        "config_sentence_transformers.json",
        "sentence_*_config.json",
        "router_config.json",
        "cnn_config.json",
        "lstm_config.json",
        "wordembedding_config.json",
        "whitespacetokenizer_config.json",
        "config_setfit.json",
        "model_head.pkl",
        "license*",
    ),
}

#: Files and folders at any depth, by name. The first kind that fits counts, before those above.
_ANYWHERE: dict[Kind, tuple[str, ...]] = {
    Kind.PRIVATE: (
        ".*",
        "*.env",
        "*netrc",
        "id_rsa*",
        "id_dsa*",
        "id_ecdsa*",
        "id_ed25519*",
        "*.pem",
        "*.key",
        "*.ppk",
        "*.p12",
        "*.pfx",
        "*.gpg",
        "*.asc",
        "token",
        "token.*",
        "*_token",
        "*_token.*",
        "*.token",
        "*api_key*",
        "*credential*",
        "*password*",
        "*secret*",
    ),
    Kind.RUN: (
        "checkpoint-*",
        "global_step*",
        "optimizer*",
        "scheduler*",
        "scaler.pt",
        "rng_state*",
        "random_states_*",
        "trainer_state.json",
        "training_args.*",
        "training_data.json",
        "pruner.safetensors",
        "family.json",
        "*_results.*",
        "*_predictions.*",
        "teacher_logits",
        "eval",
        "logs",
        "*.log",
        "runs",
        "events.out.tfevents.*",
        "wandb",
        "mlruns",
        "__pycache__",
        "*.unfinished",
        "*.lock",
    ),
}

#: Weights, at any depth but in a module of sentence-transformers.
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.onnx",
    "*.onnx_data",
    "onnx",
    "openvino",
)

#: A folder that holds one of these is another model.
_OF_A_MODEL = ("config.json", "adapter_config.json", MODULES_NAME)


def sort_files(folder: str | os.PathLike[str]) -> dict[str, Kind]:
    """Say what each file in a model's folder is.

    Returns:
        Path in the folder → kind. A folder that is skipped is a single entry that ends with a slash.

    Raises:
        ValueError: `modules.json` is not that of a sentence-transformers model, so what belongs to it cannot be told.
    """
    return dict(_sorted_below(Path(folder), PurePosixPath(), _module_folders(Path(folder))))


def carry_over(source: str | os.PathLike[str], target: str | os.PathLike[str], vocabulary: bool = True) -> dict[str, str]:
    """Copy the other files of a model's folder into that of a model made from it.

    Args:
        source: the folder of the old model.
        target: that of the new one.
        vocabulary: whether that of the tokenizer comes along; otherwise the new model has one of its own.

    Returns:
        What is left out, apart from the old model itself: path in the folder → why.

    Raises:
        ValueError: a file that belongs to the model is a link to elsewhere; see also [`sort_files`].
    """
    names, left = _taken(Path(source), (Kind.COMPANION, Kind.UNKNOWN))
    for module in _module_folders(Path(source)):  # some are empty
        Path(target, module).mkdir(parents=True, exist_ok=True)
    if not vocabulary:
        old = [name for name in names if _matches(PurePosixPath(name), (*_VOCABULARY, IDS_NAME))]
        names = [name for name in names if name not in old]
        left |= dict.fromkeys(old, "of the old vocabulary")
    for name in names:
        Path(target, name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(source, name), Path(target, name))
    return {name: reason for name, reason in left.items() if reason != Kind.MODEL.value}


def files_to_publish(folder: str | os.PathLike[str]) -> tuple[list[str], dict[str, str]]:
    """Say which files of a model's folder go to the Hub.

    Returns:
        Their paths in the folder, and what is left out: path → why.

    Raises:
        ValueError: a file that belongs to the model is a link to elsewhere; see also [`sort_files`].
    """
    return _taken(Path(folder), (Kind.MODEL, Kind.COMPANION))


def _taken(folder: Path, kinds: Collection[Kind]) -> tuple[list[str], dict[str, str]]:
    """The files of some kinds, and path → why of all others."""
    names, left = [], {}
    for name, kind in sort_files(folder).items():
        if kind not in kinds:
            left[name] = kind.value
        elif _is_own_file(folder, folder / name):
            names.append(name)
        elif kind is Kind.UNKNOWN:
            left[name] = "a link to elsewhere, or no plain file"
        else:
            raise ValueError(f"PATH={folder / name}: is a link to elsewhere, or no plain file; put the file itself there.")
    return names, left


def _is_own_file(folder: Path, path: Path) -> bool:
    """Whether a path is a file that lies in a folder; a snapshot in the Hub's cache is made of links to the repository's blobs."""
    home = folder.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    return path.is_file() and any(path.resolve().is_relative_to(each) for each in homes)


# ------------------------------------------------------------------------------------------------------------------------ kinds


def _sorted_below(root: Path, below: PurePosixPath, modules: Collection[PurePosixPath]) -> Iterator[tuple[str, Kind]]:
    for path in sorted(Path(root, below).iterdir()):
        name = below / path.name
        kind = _kind(root, name, modules)
        is_folder = path.is_dir() and not path.is_symlink()
        if is_folder and kind in (Kind.COMPANION, Kind.UNKNOWN):
            yield from _sorted_below(root, name, modules)
        else:
            yield f"{name}/" if is_folder else str(name), kind


def _kind(root: Path, name: PurePosixPath, modules: Collection[PurePosixPath]) -> Kind:
    for kind, patterns in _ANYWHERE.items():
        if _matches(PurePosixPath(name.name), patterns):
            return kind
    for module in modules:
        if name.is_relative_to(module):
            known = name == module or any(_matches(name.relative_to(module), patterns) for patterns in _BY_NAME.values())
            return Kind.COMPANION if known else Kind.UNKNOWN
    for kind, patterns in _BY_NAME.items():
        if _matches(name, patterns):
            return kind
    other = _matches(PurePosixPath(name.name), _WEIGHTS) or any(Path(root, name, each).is_file() for each in _OF_A_MODEL)
    return Kind.OTHER if other else Kind.UNKNOWN


def _matches(name: PurePosixPath, patterns: Iterable[str]) -> bool:
    """Whether a path has as many parts as a pattern and each fits; upper and lower case are the same."""
    parts = str(name).lower().split("/")
    return any(len(parts) == pattern.count("/") + 1 and all(map(fnmatchcase, parts, pattern.split("/"))) for pattern in patterns)


def _module_folders(root: Path) -> frozenset[PurePosixPath]:
    """The folders of a sentence-transformers model's modules, other than the transformers model in the folder itself."""
    path = root / MODULES_NAME
    if not path.is_file():
        return frozenset()
    try:
        paths = {PurePosixPath(module["path"]) for module in json.loads(path.read_text(encoding="utf-8"))} - {PurePosixPath()}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"PATH={path}: is not a list of sentence-transformers' modules ({error!r}).") from None
    if away := sorted(str(module) for module in paths if module.is_absolute() or ".." in module.parts):
        raise ValueError(f"path={away[0]!r} in {path}: must be a folder of the model.")
    return frozenset(paths)
