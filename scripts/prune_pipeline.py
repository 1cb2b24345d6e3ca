"""Run a recipe on a GLUE task or on your own files: fine-tune, prune attention, distil, prune the feed-forward blocks, distil.

    python scripts/prune_pipeline.py --recipe scripts/recipes/mrpc_half.json --task_name mrpc --train_file train.jsonl \\
        --validation_file validation.jsonl --model_name_or_path bert-base-uncased --output_dir runs/mrpc_half --bf16

An interrupted run resumes when the same command is run again. At the end it prints a table and writes `pipeline_results.json` to
`output_dir`; each stage's model is in a folder below.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import rich
from run_glue import DataTrainingArguments, load_task, training_texts
from transformers import HfArgumentParser, TrainingArguments, set_seed

from hf_prune.training.arguments import ModelArguments
from hf_prune.training.recipe import Pipeline, PipelineResult, Recipe


@dataclass
class PipelineArguments:
    """The recipe, and which part of it to run."""

    recipe: str = field(metadata={"help": "A JSON file; see hf_prune.training.recipe.Recipe."})
    stages: list[str] | None = field(
        default=None, metadata={"help": "Run only these stages, such as all after `fine-tune` for a fine-tuned model."}
    )
    no_distillation: bool = field(default=False, metadata={"help": "Train every stage with the task loss alone, as a baseline."})


def main(arguments: Sequence[str] | None = None) -> PipelineResult:
    """Run the pipeline that the arguments (by default the command line's) describe."""
    parser = HfArgumentParser((PipelineArguments, ModelArguments, DataTrainingArguments, TrainingArguments))
    parsed = parser.parse_args_into_dataclasses(sys.argv[1:] if arguments is None else list(arguments))
    pipeline_args, model_args, data_args, training_args = parsed
    recipe = Recipe.from_json_file(pipeline_args.recipe)
    if pipeline_args.stages:
        recipe = recipe.only(pipeline_args.stages)
    if pipeline_args.no_distillation:
        recipe = recipe.without_distillation()
    task = load_task(model_args, data_args, {"train", "validation"})
    set_seed(training_args.seed)  # weights of a new classifier are random
    model = model_args.load(task.load)
    if recipe.vocabulary is not None:
        model, tokenizer, _ = recipe.prepare(model, task.tokenizer, training_texts(data_args))
        task = load_task(model_args, data_args, {"train", "validation"}, tokenizer)
    result = Pipeline(
        recipe=recipe,
        model=model,
        args=training_args,
        train_dataset=task.data["train"],
        eval_dataset=task.splits("validation")[""],
        processing_class=task.tokenizer,
        data_collator=task.data_collator,
        compute_metrics=task.compute_metrics,
    ).run()
    rich.print(result)
    path = Path(str(training_args.output_dir), "pipeline_results.json")
    path.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
