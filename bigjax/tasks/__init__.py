"""Tasks: what is being learned; `loss(module, batch, *, key) -> Sums` and `predict(module, batch) -> dict`."""
