"""bigjax: large models in JAX, from one laptop to many slices, through one loop."""

__version__ = "0.1.0"
