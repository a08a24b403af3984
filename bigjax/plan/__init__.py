"""What a step will cost on machines that are not there: the compiler's own program, read.

`bigjax.plan(config, topology)` is this package, called.
"""

import sys
import types


class _Callable(types.ModuleType):
  """A name is either a package's module or a function; this one is both."""

  def __call__(self, config, topology, **options):
    """Returns what `bigjax plan --json` prints: see `bigjax.notebook.plan`."""
    from bigjax.plan import topology as slices

    slices.environment(topology)  # Before JAX is imported, if it isn't yet.
    from bigjax import notebook

    return notebook.plan(config, topology, **options)


sys.modules[__name__].__class__ = _Callable
