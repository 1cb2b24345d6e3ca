"""Data in SQuAD's format for the tests of the scripts."""

from __future__ import annotations

from typing import Any

import numpy as np

WORDS = ("rain", "snow", "wind", "fog", "hail", "sun", "ice", "storm")


def example(number: int, length: int = 12, answers: int = 1) -> dict[str, Any]:
    """A context of words and commas; the answers are one or two words next to each other."""
    random = np.random.default_rng(number)
    words = [str(word) for word in random.choice(WORDS, length)]
    found: dict[str, list[Any]] = {"text": [], "answer_start": []}
    for _ in range(answers):
        first = int(random.integers(length - 1))
        found["text"].append(", ".join(words[first : first + 1 + int(random.integers(2))]))
        found["answer_start"].append(len(", ".join(words[:first])) + 2 * (first > 0))
    return {"id": f"q{number}", "question": " what comes ", "context": ", ".join(words), "answers": found}


EXAMPLES = [example(number) for number in range(24)]
