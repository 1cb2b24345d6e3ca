"""Pruning in the Trainer: its callback, checkpoints that resume exactly, and recipes of several stages."""
