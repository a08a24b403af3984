"""The source of Python's standard library: the decoder of gutenberg.py on code, with a vocabulary of its own.

Of the modules at the top and of fifteen packages, those at the top that begin with f or s are held out (31 of 309
files, 0.67 of 7.2 MB; functools, statistics and subprocess are among them). The rest is seen 0.9 times over.

Prepare   cd $(python -c "import os; print(os.path.dirname(os.__file__))") && train=$(ls -d $PWD/[_a-eg-rt-z]*.py \\
          $PWD/{asyncio,collections,concurrent/futures,ctypes,email,http,importlib,json,logging}/*.py \\
          $PWD/{multiprocessing,unittest,urllib,xml/etree,xml/dom,xml/sax}/*.py) held=$(ls -d $PWD/[fs]*.py) && cd -
          bigjax data tokenizer $train --vocab_size=8192 --out=data/python/tokenizer
          bigjax data tokenize $train --tokenizer=data/python/tokenizer --out=data/python/train
          bigjax data tokenize $held --tokenizer=data/python/tokenizer --out=data/python/val
Command   bigjax train --config=configs/python_source.py --workdir=runs/python_source
Data      Python 3.12, https://docs.python.org/3/license.html
Hardware  2 CPU cores
Expected  fewer bits a byte on the held-out modules than the 1.746 of `xz -9`; see RESULTS.md
Source    what `cat [fs]*.py | xz -9` says of the held-out modules
"""

import ml_collections

from bigjax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, code="data/python")
  config = ml_collections.ConfigDict()
  config.total_steps = 360
  config.batch_size = 16
  config.data = dict(source=dict(name="tokens", path=f"{arg.code}/train", block=256))
  config.model = dict(name="decoder", vocab_size=8192, context=256, width=256, depth=6, heads=4, mlp_dim=704, tied=True)
  config.precision = "mixed"
  config.task = dict(name="language_modeling", loss_chunks=4)
  config.optimizer = dict(name="muon")
  config.schedule = dict(name="cosine", peak=4e-3, warmup=50)
  config.decay = [(".*kernel", 0.05)]
  config.clip = dict(norm=1.0)
  config.evals = dict(
    val=dict(
      evaluator=dict(name="perplexity"),
      data=dict(source=dict(name="tokens", path=f"{arg.code}/val", block=256, stride=256)),
      every=120,
      batch_size=32,
    )
  )
  config.checkpoint_every = 120
  config.log_every = 10
  config.claim = dict(metric="val/bits_per_byte", at_most=1.746, source="xz -9 of the same modules")
  return config
