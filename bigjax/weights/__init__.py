"""Published weights: read into a state on any mesh, and written so that `transformers` reads them."""

from bigjax.weights.huggingface import Weights, load, load_leaves, open_weights, save

__all__ = ["Weights", "load", "load_leaves", "open_weights", "save"]
