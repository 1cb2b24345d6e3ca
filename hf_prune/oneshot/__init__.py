"""Pruning without training: from calibration data, in minutes.

Two passes over the layers. The first, on the dense model, asks what each unit is worth, and the budget is allocated once. The
second goes through the layers in order: each sees what the already pruned model gives it, its units are chosen again at the number
that was allocated, and the weights that stay are solved for. What is left is a model of stock shape with true zeros;
[`hf_prune.condense`] cuts them out.

```python
config = PruningConfig(target_sparsity=0.5, rules=[PruningRule(pattern="head"), PruningRule(pattern="neuron")])
report = prune(model, config, dataloader)
small = condense(model)
```
"""

from .driver import prune
from .report import PrunedModule, PruneReport

__all__ = ["PruneReport", "PrunedModule", "prune"]
