"""A published decoder on synthetic tokens, for plans beside those that others publish: no data, no evaluation.

Command   bigjax plan --config=scripts/bench/plan_decoder.py:model=llama3.1-8b,batch=512 --topology=v6e:16x16
"""

import ml_collections

from bigjax.config import parse_arg

MESHES = {"fsdp": [("data", -1)], "hsdp": [("replica", 2), ("data", -1)]}


def get_config(arg=None):
  arg = parse_arg(
    arg, model="llama3.1-8b", batch=64, length=8192, chunks=8, layout="fsdp", remat="full", gradients="float32"
  )
  config = ml_collections.ConfigDict()
  config.total_steps = 1000
  config.batch_size = arg.batch
  config.data = dict(source=dict(name="synthetic", kind="tokens", length=arg.length))
  remat = arg.remat.replace(";", ",")  # A comma ends an argument.
  config.model = dict(name="decoder", variant=arg.model, scan=True, remat=remat)
  config.task = dict(name="language_modeling", loss_chunks=arg.chunks)
  config.precision = dict(mode="mixed", gradients=arg.gradients)
  config.optimizer = dict(name="adamw", b2=0.95, weight_decay=0.0)
  config.schedule = dict(name="cosine", peak=3e-4, warmup=80, final=3e-6)
  config.decay = [(".*(kernel|embedding)", 0.1)]
  config.clip = dict(norm=1.0)
  config.mesh = MESHES[arg.layout]
  config.sharding = arg.layout
  return config
