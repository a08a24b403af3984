"""Every test sees eight CPU devices and checked array shapes, and reuses what an earlier run compiled.

The compiler is told not to try hard, since a third of the tests' time was its own. What programs compute is the same
but for rounding; where XLA_FLAGS is set, and be it to nothing, as in `make test-all`, they are compiled as for users.
"""

import os
import pathlib

# Set before anything imports JAX or TensorFlow; programs that tests start inherit it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["MPLBACKEND"] = "Agg"

import jax
import jaxtyping

jax.config.update("jax_num_cpu_devices", 8)
# [batch] + [batch, 1] is [batch, batch]: a mistake that trains. Broadcasting between ranks has to be written out.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Shapes in annotations are claims; here, and only here, each call of a function of the package is held to them.
jaxtyping.install_import_hook("bigjax", "beartype.beartype")
