"""A fresh process: what `embeddings.py` saved gives the same embeddings. Arguments: the folder, `remote` to go without hf_prune."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer
from start import sentences

remote = sys.argv[2:] == ["remote"]
if not remote:
    import hf_prune  # noqa: F401  (it lets transformers load condensed models)

folder = Path(sys.argv[1])
model = SentenceTransformer(str(folder / "condensed"), device="cpu", trust_remote_code=remote)
embeddings = model.encode(sentences(64)[0][:8])
assert np.abs(embeddings - np.load(folder / "expected.npy")).max() <= 1e-5
assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
assert not remote or "hf_prune" not in sys.modules
