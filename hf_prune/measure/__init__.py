"""Measurements of a model: zeros, sizes, latency and memory, as tables and plots. Does not know the pruner."""
