"""The format of `config.hf_prune`: the sizes in which a model differs from the stock model.

A condensed model whose layers differ keeps its stock config: `num_attention_heads`, `intermediate_size` and so on are unchanged.
The smaller sizes are listed separately, under the config key `hf_prune`:

    {
        "version": 1,
        "layers": {
            "encoder.layer.0": {
                "attention.self": {"num_attention_heads": 5},
                "intermediate.dense": {"intermediate_size": 1024}
            }
        }
    }

- A layer's name is relative to the base model, so that it is the same under every task head.
- Inside a layer, a block is named after the module that splits its heads, or after the projection that computes its neurons.
- Sizes are named as in transformers' `per_layer_config`, the same in every family, and are between 0 and the stock size. Where the
  hidden size became smaller and the width of a head follows from it, the config says how many heads of the old width that makes;
  a block may have more of them, up to the number under `original`.
- `num_key_value_heads` accompanies `num_attention_heads` in families that may have fewer of them; it divides that number.
- `heads` lists the remaining heads of the stock model, if the layers share a position bias with an entry for each head.
- `output_bias: true` means that the block's output projection has a bias, unlike in the stock model.
- A block that is not listed has its stock size.
- `removed_layers`, beside `layers` and only if there are any, lists the removed layers of the stock model by the path of their
  list (`{"layers": [3, 7]}`). The config's number of layers (and `layer_types`) and the indices in the names under `layers` are
  those of the remaining layers.
- `original`, only if the stock config itself was changed (all layers agreed, see `stock.py`; the hidden size became smaller;
  tokens, experts, or neurons of experts went), has the values of its attributes in the model that pruning started from
  (`{"intermediate_size": 3072}`). It is informative: no size is read from it.
- `architecture`, only in a family that hf_prune has no record of, is the spec that was inferred (`model/spelled.py`).

A model without anything under `layers` is an ordinary one, and nothing in its config keeps stock code from loading it.

Head size never changes. Apart from `heads`, it is not recorded which heads and neurons remain: the weights are theirs.

What loading needs of this module is also copied into the modelling file of a checkpoint, so it uses no other library.
"""

from __future__ import annotations

import difflib
import fnmatch
import reprlib
from collections.abc import Collection, Iterable
from typing import Any

from ..model import Block


def read_sizes(
    entry: Any, stock: list[Block], absent: Collection[str] = (), heads: Collection[str] = ()
) -> list[tuple[Block, dict[str, Any]]]:
    """The blocks that an entry names, each with its sizes, checked against the blocks of the stock model.

    Args:
        entry: the value of `config.hf_prune`.
        stock: the blocks of the model.
        absent: paths of lists of layers, as in a spec, that this model does not have; entries about them are ignored.
        heads: the config attributes of the number of heads that the hidden size can change, see `ArchitectureSpec.heads`.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    known: dict[str, dict[str, Block]] = {}
    for block in stock:
        known.setdefault(block.layer, {})[block.key] = block

    where = "config.hf_prune"
    check_keys(where, entry, ("version", "layers", "removed_layers", "original", "architecture"))
    version = entry.get("version")
    if type(version) is not int or version != 1:
        raise ValueError(f"{where}['version'] is {reprlib.repr(version)}; this code reads version 1. A newer hf_prune may read it.")
    layers = entry.get("layers", {})
    if isinstance(layers, dict):
        lists = {name: str(name).rpartition(".")[0] for name in layers}
        layers = {name: layers[name] for name in lists if not any(fnmatch.fnmatchcase(lists[name], path) for path in absent)}
    check_keys(f"{where}['layers']", layers, known)

    original = entry.get("original", {})
    most = max((original[name] for name in heads if name in original), default=0)
    found: list[tuple[Block, dict[str, Any]]] = []
    for layer, parts in layers.items():
        check_keys(f"{where}['layers'][{layer!r}]", parts, known[layer])
        for key, sizes in parts.items():
            check_sizes(f"{where}['layers'][{layer!r}][{key!r}]", sizes, known[layer][key], most)
            found.append((known[layer][key], sizes))
    return found


def check_removed(removed: Any, left: dict[str, int]) -> None:
    """Check the entry's `removed_layers`, given the length of each list of layers (0: the model lacks it, so it is ignored).

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    where = "config.hf_prune['removed_layers']"
    check_keys(where, removed, left)
    for path, gone in removed.items():
        whole = isinstance(gone, list) and all(type(index) is int for index in gone)
        stock = left[path] + (len(gone) if whole else 0)
        if not whole or (left[path] and gone != sorted(set(gone) & set(range(stock)))):
            raise ValueError(
                f"{where}[{path!r}] is {reprlib.repr(gone)}; allowed: a list of numbers from 0 to {stock - 1}, ascending."
            )


#: The attributes of configs that say how many experts a layer has: one is a config's own, others may be its aliases.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
#: Those that say how many neurons an expert has: the first that there is, as the second may be of other layers, without experts.
EXPERT_NEURONS = ("moe_intermediate_size", "intermediate_size")


def check_original(original: Any, attributes: Collection[str]) -> None:
    """Check the entry's `original`, given the config attributes that hold sizes of blocks in this family.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    check_keys("config.hf_prune['original']", original, (*attributes, "vocab_size", *EXPERTS, *EXPERT_NEURONS))
    for name, size in original.items():
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(
                f"config.hf_prune['original'][{name!r}] is {reprlib.repr(size)}; allowed: a whole number from 1, or null."
            )


def check_sizes(field: str, sizes: Any, block: Block, most_heads: int = 0) -> None:
    """Check the sizes of one block.

    Args:
        field: what errors call them.
        sizes: the sizes.
        block: the block of the stock model.
        most_heads: how many heads there may be even if the stock model has fewer.

    Raises:
        ValueError: they do not fit this kind of block, or exceed its stock size.
    """
    stock = block.sizes
    own = block.own_units
    check_keys(field, sizes, (*stock, *(["heads"] if own is not None else []), "output_bias"))
    for name, limit in stock.items():
        size, limit = sizes.get(name), max(limit, most_heads if name == "num_attention_heads" else 0)
        if type(size) is not int or not 0 <= size <= limit:
            raise ValueError(
                f"{field}[{name!r}] is {reprlib.repr(size)}; allowed: a whole number from 0 to {limit}, the stock size."
            )
    queries, shared = sizes[next(iter(stock))], sizes.get("num_key_value_heads")
    if shared is not None and (queries % max(shared, 1) or (queries > 0) != (shared > 0)):
        raise ValueError(
            f"{field}['num_key_value_heads'] is {reprlib.repr(shared)}; it must divide num_attention_heads, which is {queries}."
        )
    if type(sizes.get("output_bias", True)) is not bool:
        raise ValueError(f"{field}['output_bias'] is {reprlib.repr(sizes['output_bias'])}; allowed: true or false.")
    if own is not None:
        heads = sizes.get("heads")
        numbers = isinstance(heads, list) and all(type(head) is int for head in heads)
        if not numbers or len(heads) != queries or heads != sorted(set(heads) & set(own)):
            raise ValueError(f"{field}['heads'] is {reprlib.repr(heads)}; allowed: {queries} of {own}, ascending.")


def check_keys(field: str, value: Any, allowed: Collection[str]) -> None:
    """Check that a JSON value is an object with only these keys.

    Raises:
        ValueError: it is not an object, or has another key; names the closest allowed key.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{field} is {reprlib.repr(value)}; it must be an object with keys among: {', '.join(allowed)}.")
    for key in value:
        if key not in allowed:
            close = difflib.get_close_matches(str(key)[:200], allowed, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{field} has an unknown key {reprlib.repr(key)}; allowed: {', '.join(allowed)}.{hint}")


def after_condensing(
    entry: dict[str, Any], sizes: Iterable[tuple[Block, dict[str, Any]]], removed: dict[str, list[int]]
) -> dict[str, Any]:
    """The `config.hf_prune` of a condensed model.

    Args:
        entry: its previous value, `{}` if there was none.
        sizes: the blocks that changed, each with its current sizes.
        removed: the removed layers: indices before the removal, by the path of the list.
    """
    layers = {name: dict(parts) for name, parts in entry.get("layers", {}).items()}
    for block, own in sizes:
        parts = layers.setdefault(block.layer, {})
        parts[block.key] = parts.get(block.key, {}) | own
    gone = {path: list(indices) for path, indices in entry.get("removed_layers", {}).items()}
    for path, indices in removed.items():
        layers = _renumbered(layers, path, indices)
        earlier = gone.get(path, [])
        gone[path] = sorted(earlier + _stock_numbers(indices, earlier))
    original = {name: entry[name] for name in ("original",) if name in entry}
    return {"version": 1, "layers": layers} | ({"removed_layers": gone} if gone else {}) | original


def present_name(entry: dict[str, Any], layer: str) -> str | None:
    """The name of a layer of the stock model in the model of this `config.hf_prune`; None if it was removed."""
    path = layer.rpartition(".")[0]
    return next(iter(_renumbered({layer: None}, path, entry.get("removed_layers", {}).get(path, []))), None)


def _renumbered(layers: dict[str, Any], path: str, removed: list[int]) -> dict[str, Any]:
    """The entries of layers, under their names after the removal of some from the list at `path`."""
    said = {}
    for name, parts in layers.items():
        start, _, number = name.rpartition(".")
        if start != path:
            said[name] = parts
        elif int(number) not in removed:
            said[f"{path}.{int(number) - sum(gone < int(number) for gone in removed)}"] = parts
    return said


def _stock_numbers(indices: list[int], earlier: list[int]) -> list[int]:
    """The indices in the stock model of layers of a list from which those at `earlier` were removed."""
    left = [index for index in range(max(indices) + len(earlier) + 1) if index not in earlier]
    return [left[index] for index in indices]
