"""bigjax: large models in JAX, from one laptop to many slices, through one loop.

In a notebook: `bigjax.run(config, workdir)`, `bigjax.load(workdir)`, `bigjax.plan(config, topology)`. Importing the
package imports neither JAX nor TensorFlow.
"""

__version__ = "0.1.0"
__all__ = ["load", "plan", "read_metrics", "resolve", "run"]


def __getattr__(name):
  if name == "plan":  # A package that can be called, which would hide a function of its name.
    import importlib

    return importlib.import_module("bigjax.plan")
  if name in __all__:
    from bigjax import notebook

    return getattr(notebook, name)
  raise AttributeError(f"module 'bigjax' has no attribute {name!r}")
