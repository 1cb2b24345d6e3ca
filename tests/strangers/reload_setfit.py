"""A fresh process: what `setfit_classifier.py` saved predicts the same. Argument: the folder."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from setfit import SetFitModel
from start import sentences

import hf_prune  # noqa: F401  (it lets transformers load condensed models)

folder = Path(sys.argv[1])
model = SetFitModel.from_pretrained(str(folder / "condensed"), device="cpu")
assert np.abs(np.asarray(model.predict_proba(sentences(16)[0])) - np.load(folder / "expected.npy")).max() <= 1e-5
