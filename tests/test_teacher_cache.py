"""Cached teacher logits: what is stored, when it is computed again, and that training on them is training with the teacher."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from distillation_cases import TASKS, Counted, Rows, collator_for, distiller, tokenizer, train, training_logs
from helpers import arguments, ragged_rows, tiny_bert
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    default_data_collator,
)

from hf_prune import ConfigError, DistillationConfig, DistillationTrainer, TeacherLogitsCollator, add_teacher_logits
from hf_prune.distillation.cache import row_starts

LOGITS = DistillationConfig(alpha_task=0.3, alpha_logits=0.5)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def unpadded(rows: Rows) -> Rows:
    """The rows as a tokenizer leaves them: ragged, with columns that the model does not take."""
    short = []
    for index, row in enumerate(rows):
        size = sum(row["attention_mask"])
        cut = {name: value[:size] if isinstance(value, list) else value for name, value in row.items()}
        if isinstance(row.get("labels"), list) and isinstance(row["labels"][0], float):
            cut["labels"] = row["labels"]
        elif isinstance(row.get("labels"), list) and len(row["labels"]) < len(row["input_ids"]):
            cut["labels"] = [label for label in row["labels"] if label != -100]
        short.append({"sentence": f"row {index}"} | cut)
    return short


def dataset(count: int = 21, change: int = 0) -> Dataset:
    rows = unpadded(ragged_rows(count))
    rows[5]["input_ids"][0] += change
    return Dataset.from_list(rows)


# ------------------------------------------------------------------------------------------------- when the teacher has to run


def test_a_second_call_does_no_teacher_forward(cache: Path) -> None:
    teacher = tiny_bert(seed=1)
    counted = Counted(teacher)
    collator = collator_for("sequence")
    first = add_teacher_logits(dataset(), teacher, collator, batch_size=8, cache_dir=cache)
    assert counted.calls == 3
    again = add_teacher_logits(dataset(), teacher, collator, batch_size=8, cache_dir=cache)
    assert counted.calls == 3
    assert again.to_list() == first.to_list()
    repeated = add_teacher_logits(first, teacher, collator, batch_size=8, cache_dir=cache)
    assert counted.calls == 3
    assert repeated.to_list() == first.to_list()


def test_a_teacher_saved_and_loaded_is_the_same_teacher(cache: Path, tmp_path: Path) -> None:
    teacher = tiny_bert(seed=1)
    add_teacher_logits(dataset(), teacher, collator_for("sequence"), 8, cache_dir=cache)
    teacher.save_pretrained(tmp_path / "teacher")
    loaded = type(teacher).from_pretrained(tmp_path / "teacher")
    loaded.config.use_cache = False
    counted = Counted(loaded)
    add_teacher_logits(dataset(), loaded, collator_for("sequence"), 8, cache_dir=cache)
    assert counted.calls == 0


def test_a_new_process_reads_the_cache(cache: Path, tmp_path: Path) -> None:
    teacher = tiny_bert(seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    dataset().save_to_disk(tmp_path / "data")
    expected = add_teacher_logits(dataset(), teacher, collator_for("sequence"), 8, cache_dir=cache)
    script = """
import json, sys
from datasets import load_from_disk
from distillation_cases import Counted, collator_for
from transformers import BertForSequenceClassification
from hf_prune import add_teacher_logits
folder = sys.argv[1]
teacher = BertForSequenceClassification.from_pretrained(folder + "/teacher")
counted = Counted(teacher)
data = add_teacher_logits(load_from_disk(folder + "/data"), teacher, collator_for("sequence"), 8, cache_dir=sys.argv[2])
print(json.dumps([counted.calls, data["teacher_logits"][:]]))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", script, str(tmp_path), str(cache)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    calls, logits = json.loads(result.stdout.splitlines()[-1])
    assert calls == 0
    assert logits == expected["teacher_logits"][:]


def fewer_rows(path: Path) -> None:
    """The same file as it would be with all but the last batch of rows."""
    other = path.with_name("other.arrow")
    Dataset.from_file(str(path)).select(range(16)).map(lambda row: row, cache_file_name=str(other), new_fingerprint="other")
    other.replace(path)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-900]), "(Expected|Unexpected|Tried)"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "(Expected|Unexpected|Tried|Invalid)"),
        (lambda path: path.write_bytes(b""), ".*"),
        (lambda path: path.write_bytes(b"0" * 1000), ".*"),
        (fewer_rows, "it has 16 rows for 21"),
    ],
    ids=["cut short", "a header", "empty", "no Arrow", "fewer rows"],
)
def test_a_file_that_is_not_whole_is_named_and_made_again(
    harm: Callable[[Path], object], reason: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = tiny_bert(seed=1)
    first = add_teacher_logits(dataset(), teacher, collator_for("sequence"), 8, cache_dir=cache).to_list()
    (path,) = cache.glob("*.arrow")
    harm(path)
    caplog.clear()
    again = add_teacher_logits(dataset(), teacher, collator_for("sequence"), 8, cache_dir=cache)
    assert again.to_list() == first
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_prune")]
    assert re.match(rf"{path} is not whole \({reason}.*computed again", message)
    counted = Counted(teacher)
    add_teacher_logits(dataset(), teacher, collator_for("sequence"), 8, cache_dir=cache)
    assert counted.calls == 0


def changed_teacher() -> PreTrainedModel:
    teacher = tiny_bert(seed=1)
    with torch.no_grad():
        teacher.bert.encoder.layer[1].output.dense.bias[3] += 1e-3
    return teacher


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": changed_teacher()},
        {"teacher": tiny_bert(seed=1, hidden_act="relu")},
        {"dataset": dataset(change=1)},
        {"dataset": dataset(count=20)},
        {"dataset": dataset().select(range(20, -1, -1))},
        {"dataset": dataset().remove_columns("attention_mask")},
        {"dataset": dataset().add_column("note", ["a"] * 21)},
        {"collator": collator_for("sequence", padding="max_length", max_length=20)},
        {"collator": collator_for("sequence", side="left")},
        {"batch_size": 7},
    ],
    ids=["weight", "config", "token", "rows", "order", "mask", "column", "length", "side", "batch"],
)
def test_what_changes_is_computed_again(change: dict[str, Any], cache: Path) -> None:
    given = {"dataset": dataset(), "teacher": tiny_bert(seed=1), "collator": collator_for("sequence"), "batch_size": 8}
    add_teacher_logits(**given, cache_dir=cache)
    counted = Counted((given | change)["teacher"])
    result = add_teacher_logits(**given | change, cache_dir=cache)
    assert counted.calls >= 3
    assert set(result.column_names) == {*(given | change)["dataset"].column_names, "teacher_logits"}


def test_another_tokenizer_length_is_computed_again(cache: Path) -> None:
    """Rows cut shorter are other data."""
    teacher = tiny_bert(seed=1)
    counted = Counted(teacher)
    lengths = []
    for length in (12, 6, 12):
        cut = dataset().map(lambda row, size=length: {name: row[name][:size] for name in ("input_ids", "attention_mask")})
        lengths.append(add_teacher_logits(cut, teacher, collator_for("sequence"), 8, cache_dir=cache)["teacher_logits"][:])
    assert counted.calls == 6
    assert lengths[0] == lengths[2] != lengths[1]


def test_top_k_is_part_of_the_fingerprint(cache: Path) -> None:
    teacher, rows = TASKS["causal"](seed=1, count=6)
    counted = Counted(teacher)
    for top_k in (None, 4, 5, 4):
        add_teacher_logits(Dataset.from_list(unpadded(rows)), teacher, collator_for("causal"), 3, top_k, cache_dir=cache)
    assert counted.calls == 6


# -------------------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("task", TASKS)
def test_training_on_cached_logits_is_training_with_the_teacher(task: str, tmp_path: Path, cache: Path) -> None:
    """Cached in batches of 5 that are padded to a fixed length, trained on in batches of 8 that are not."""
    teacher, rows = TASKS[task](seed=1, count=12)
    data = Dataset.from_list(unpadded(rows))
    cached = add_teacher_logits(data, teacher, collator_for(task, padding="max_length", max_length=14), 5, cache_dir=cache)
    assert "sentence" in cached.column_names
    runs = []
    for source, rows_ in ((teacher, data), (None, cached)):
        student = TASKS[task](seed=0, count=1)[0]
        runs.append(
            train(tmp_path, student, source, rows_, LOGITS, learning_rate=0.0, trainer={"data_collator": collator_for(task)})
        )
    (one, gradients), (other, cached_gradients) = runs
    for left, right in zip(gradients, cached_gradients):
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)
    for left, right in zip(training_logs(one), training_logs(other)):
        assert right["logits_loss"] == pytest.approx(left["logits_loss"], rel=1e-4)
        assert right["logits_loss"] > 1e-3


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("task", ["token", "translation"])
def test_tokens_keep_their_logits_on_either_side(task: str, side: str, cache: Path) -> None:
    teacher, rows = TASKS[task](seed=1, count=6)
    short = unpadded(rows)
    collator = collator_for(task, side)
    cached = add_teacher_logits(Dataset.from_list(short), teacher, collator, 6, cache_dir=cache)
    column = "labels" if task == "translation" else "input_ids"
    own = [{name: value for name, value in row.items() if name != "sentence"} for row in short]
    batch = collator([dict(row) for row in own])
    with torch.no_grad():
        expected = teacher(**batch).logits
    padded = TeacherLogitsCollator(collator, column)(
        [dict(row) | {"teacher_logits": logits} for row, logits in zip(own, cached["teacher_logits"])]
    )
    assert padded["teacher_logits"].shape == expected.shape
    for index, row in enumerate(own):
        size = len(row[column])
        span = slice(None, size) if side == "right" else slice(expected.shape[1] - size, None)
        torch.testing.assert_close(torch.tensor(cached[index]["teacher_logits"]), expected[index, span])
        torch.testing.assert_close(padded["teacher_logits"][index, span], expected[index, span])
        assert padded["teacher_logits"][index].count_nonzero() <= size * expected.shape[2]
    assert len({len(row[column]) for row in own}) > 1


def test_top_k_keeps_the_largest_and_says_what_is_lost(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher, rows = TASKS["causal"](seed=1, count=8)
    data = Dataset.from_list(unpadded(rows))
    collator = collator_for("causal")
    whole = add_teacher_logits(data, teacher, collator, 4, cache_dir=cache)
    caplog.clear()
    cut = add_teacher_logits(data, teacher, collator, 4, top_k=10, cache_dir=cache)
    lost = []
    for every, row in zip(whole, cut):
        logits = torch.tensor(every["teacher_logits"])
        values, indices = logits.sort(descending=True)
        torch.testing.assert_close(torch.tensor(row["teacher_logits"]), values[:, :10])
        assert torch.equal(torch.tensor(row["teacher_indices"]), indices[:, :10])
        shares = logits.double().softmax(-1).sort(descending=True).values[:, 10:].sum(-1)
        assert row["teacher_lost_mass"] == pytest.approx(float(shares.mean()), abs=1e-6)
        lost.append(row["teacher_lost_mass"])
    assert f"leave out {sum(lost) / len(lost):.3g} of" in caplog.text
    # The loss: the teacher's distribution over its ten classes against the student's over all.
    student = TASKS["causal"](seed=0, count=1)[0]
    items = []
    for row in cut:
        with torch.no_grad():
            mine = student(torch.tensor([row["input_ids"]])).logits[0]
        for position in range(len(row["input_ids"]) - 1):
            p = (torch.tensor(row["teacher_logits"][position]) / 2).softmax(0)
            q = (mine[position] / 2).softmax(0)[row["teacher_indices"][position]]
            items.append(4 * float((p * (p / q).log()).sum()))
    trainer, _ = train(tmp_path, student, None, cut, LOGITS, trainer={"data_collator": collator})
    assert training_logs(trainer)[0]["logits_loss"] == pytest.approx(sum(items) / len(items), rel=1e-5)


def test_all_classes_as_top_k_lose_nothing(tmp_path: Path, cache: Path) -> None:
    teacher, rows = TASKS["token"](seed=1, count=8)
    data = Dataset.from_list(unpadded(rows))
    logs = []
    for top_k in (None, 3):
        cached = add_teacher_logits(data, teacher, collator_for("token"), 4, top_k, cache_dir=cache)
        student = TASKS["token"](seed=0, count=1)[0]
        trainer, _ = train(tmp_path, student, None, cached, LOGITS, trainer={"data_collator": collator_for("token")})
        logs.append(training_logs(trainer)[0]["logits_loss"])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert max(cached["teacher_lost_mass"]) < 1e-6


def test_the_dataset_keeps_its_format_and_the_teacher_its_mode(cache: Path) -> None:
    teacher = tiny_bert(seed=1, hidden_dropout_prob=0.5).train()
    data = dataset().remove_columns("sentence").with_format("torch")
    cached = add_teacher_logits(data, teacher, collator_for("sequence"), 8, cache_dir=cache)
    assert teacher.training
    assert torch.is_tensor(cached[0]["teacher_logits"])
    plain = add_teacher_logits(dataset(), tiny_bert(seed=1), collator_for("sequence"), 8, cache_dir=cache)
    assert cached[3]["teacher_logits"].tolist() == plain[3]["teacher_logits"]


# -------------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("unused", [True, False])
def test_evaluation_ignores_cached_logits(unused: bool, tmp_path: Path, cache: Path) -> None:
    """Whether or not the Trainer removes columns, and whether or not there are labels."""
    teacher, rows = TASKS["token"](seed=1, count=8)
    data = Dataset.from_list(unpadded(rows)).remove_columns("sentence")
    cached = add_teacher_logits(data, teacher, collator_for("token"), 4, cache_dir=cache)
    student, names = TASKS["token"](seed=0, count=1)[0], set()
    student.register_forward_pre_hook(lambda _, __, given: names.update(given), with_kwargs=True)
    settings = {"data_collator": collator_for("token")}
    trainer = distiller(tmp_path, student, None, cached, LOGITS, trainer=settings, remove_unused_columns=unused)
    trainer.train()
    assert trainer.evaluate(cached)["eval_loss"] == trainer.evaluate(data)["eval_loss"]
    assert (trainer.predict(cached).predictions == trainer.predict(data).predictions).all()
    trainer.data_collator = TeacherLogitsCollator(DataCollatorWithPadding(tokenizer()))
    unlabelled = [each.remove_columns("labels") for each in (cached, data)]
    one, other = (trainer.predict(each).predictions for each in unlabelled)
    assert (one == other).all()
    assert not any(name.startswith("teacher") for name in names)


def test_a_checkpoint_holds_the_tokenizer_of_the_collator(tmp_path: Path, cache: Path) -> None:
    cached = add_teacher_logits(dataset(), tiny_bert(seed=1), collator_for("sequence"), 8, cache_dir=cache)
    trainer = distiller(
        tmp_path / "run", tiny_bert(), None, cached, trainer={"data_collator": collator_for("sequence")}, settings=LOGITS
    )
    trainer.save_model()
    assert (tmp_path / "run" / "tokenizer.json").is_file()


def test_a_teacher_beside_cached_logits_wins(tmp_path: Path, cache: Path) -> None:
    cached = add_teacher_logits(dataset(), tiny_bert(seed=2), collator_for("sequence"), 8, cache_dir=cache)
    logs = []
    for rows in (cached, dataset()):
        trainer, _ = train(
            tmp_path, tiny_bert(), tiny_bert(seed=1), rows, LOGITS, trainer={"data_collator": collator_for("sequence")}
        )
        logs.append([entry["logits_loss"] for entry in training_logs(trainer)])
    assert logs[0] == logs[1]


# ---------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"alpha_hidden": 1.0}, r"teacher=None: must be given for alpha_hidden=1.0; cached logits serve alpha_logits alone."),
        ({"alpha_attention": 1.0}, r"teacher=None: must be given for alpha_attention=1.0"),
        ({}, r"teacher=None: must be given, or the data have the column 'teacher_logits' .* it has sentence, input_ids"),
    ],
)
def test_no_teacher_and_no_cached_logits(weights: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillationTrainer(tiny_bert(), arguments(tmp_path), train_dataset=dataset(), distillation=DistillationConfig(**weights))


def test_rows_without_cached_logits_are_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher=None: must be given, or every row have 'teacher_logits'"):
        train(tmp_path, tiny_bert(), None, ragged_rows(8), LOGITS)


def test_no_teacher_is_needed_for_the_task_alone(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, tiny_bert(), None, ragged_rows(8), DistillationConfig(alpha_logits=0.0))
    assert training_logs(trainer)[0]["task_loss"] > 0


def test_collators_that_cached_logits_cannot_fit(cache: Path) -> None:
    teacher, rows = TASKS["masked"](seed=1, count=8)
    data = Dataset.from_list(unpadded(rows)).remove_columns("labels")
    with pytest.raises(ConfigError, match=r"must be the same whenever a batch is made"):
        add_teacher_logits(data, teacher, DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.5), 8, cache_dir=cache)

    def cut(features: Rows) -> dict[str, Any]:
        return {name: value[:, :3] for name, value in DataCollatorWithPadding(tokenizer())(features).items()}

    with pytest.raises(ConfigError, match=r"collator='input_ids': must keep every row whole"):
        add_teacher_logits(data, teacher, cut, 8, cache_dir=cache)
    with pytest.raises(ConfigError, match=r"collator='input_ids': must keep every row whole"):
        row_starts([{"input_ids": [1, 2]}] * 2, {"input_ids": torch.tensor([[1, 2, 1, 2]])}, "input_ids")


@pytest.mark.parametrize(("task", "top_k"), [("sequence", 2), ("question", 1), ("token", 4), ("token", 0)])
def test_a_top_k_that_does_not_fit(task: str, top_k: int, cache: Path) -> None:
    teacher, rows = TASKS[task](seed=1, count=4)
    with pytest.raises(ConfigError, match=f"top_k={top_k}: must fit logits of each token"):
        add_teacher_logits(Dataset.from_list(unpadded(rows)), teacher, collator_for(task), 4, top_k, cache_dir=cache)


def test_data_that_is_not_tokenized(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset=\['sentence'\]: has none of the inputs of BertForSequenceClassification"):
        add_teacher_logits(Dataset.from_dict({"sentence": ["a"]}), tiny_bert(), default_data_collator, 4, cache_dir=cache)
