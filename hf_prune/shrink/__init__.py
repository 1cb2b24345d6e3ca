"""Shrinking what is not a block: ways to make a model smaller that change what it computes, and so happen between runs."""
