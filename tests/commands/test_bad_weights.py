"""Damaged weights and tokenizers, and what does not fit them, as command lines have them: one message, exit code 2."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import main, weights
from bigjax import state as states
from bigjax.data import tokenizers
from bigjax.models import bert, decoder, decoder_block
from bigjax.weights import checksums, safetensors

TEXT = "the cat sat on the mat; "
VOCAB = len(set(TEXT))
SIZES = dict(vocab_size=VOCAB, context=16, width=16, depth=2, heads=2, mlp_dim=32)
CONFIG = """
import ml_collections
def get_config():
  return ml_collections.ConfigDict(dict(
    total_steps=1, batch_size=8, model={model}, init_from=dict(weights={weights!r}),
    data=dict(source=dict(name="synthetic", kind="tokens", num_examples=16, length=8, vocab_size={vocab})),
    task=dict(name="language_modeling"), optimizer=dict(name="adamw"), schedule=dict(name="constant", peak=1e-3),
    writers=("jsonl",)))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """A folder with a decoder and one with an encoder."""
  root = tmp_path_factory.mktemp("published")
  for name, make, options in (
    ("decoder", decoder.make, decoder_block.Options(**SIZES)),
    ("encoder", bert.make, bert.Options(**SIZES)),
  ):
    params, extras = states.Model(lambda rngs, make=make: make(**SIZES, rngs=rngs)).abstract
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p, rng=rng: jnp.asarray(rng.normal(0, 0.1, p.shape), jnp.float32), params)
    weights.save(str(root / name), options, params, extras)
    (root / name / checksums.SUMS).unlink()  # As of weights that somebody else made.
    tokenizers.characters(TEXT).save(root / name)
  return root


def edited(change):
  """Changes the tensors of a folder."""

  def edit(folder):
    found, _ = safetensors.open_files(str(folder))
    values = {n: np.array(t.read(tuple(slice(0, s) for s in t.shape))) for n, t in found.items()}
    change(values)
    for file in folder.glob("*.safetensors*"):
      file.unlink()
    safetensors.write(str(folder), [safetensors.Made(n, v.shape, v.dtype, lambda v=v: v) for n, v in values.items()])

  return edit


def first_kernel(values):
  return next(n for n, v in values.items() if v.ndim == 2 and ".0." in n)


def cut_short(part):
  def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])

  return cut


def told(**changes):
  """Changes config.json."""

  def tell(folder):
    file = folder / "config.json"
    said = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))

  return tell


DAMAGE = {
  "missing": (edited(lambda v: v.pop(first_kernel(v))), "is missing"),
  "further": (edited(lambda v: v.update({"model.odd.weight": np.zeros((2, 2), np.float32)})), "model.odd.weight"),
  "nan": (edited(lambda v: v[first_kernel(v)].__setitem__((0, 0), np.nan)), "holds NaN or infinity"),
  "cut in the header": (cut_short(0.01), "model.safetensors"),
  "cut in a tensor": (cut_short(0.9), "model.safetensors"),
  "empty": (cut_short(0), "model.safetensors"),
  "no file": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
  "architecture": (told(architectures=["LamaForCausalLM"]), "is not known. The nearest are LlamaForCausalLM"),
  "config.json": (lambda folder: (folder / "config.json").write_text("{"), "can't be read as JSON"),
}


def damaged(published, name, tmp_path, damage):
  folder = pathlib.Path(shutil.copytree(published / name, tmp_path / name))
  damage(folder)
  return folder


def said(capsys, *flags):
  """Returns the message of a command that must refuse, which is one."""
  capsys.readouterr()
  assert main.main(list(flags)) == 2
  shown = capsys.readouterr()
  assert "Traceback" not in shown.err + shown.out
  assert shown.err.count("error:") <= 1 and len(shown.err) < 3000
  return shown.err


@pytest.mark.parametrize("damage", DAMAGE)
def test_generate_refuses_damaged_weights(published, tmp_path, capsys, damage):
  change, reason = DAMAGE[damage]
  folder = damaged(published, "decoder", tmp_path, change)
  assert reason in said(capsys, "generate", f"--weights={folder}", "--prompt=the", "--compile_cache=none")


@pytest.mark.parametrize("damage", DAMAGE)
def test_embed_refuses_damaged_weights(published, tmp_path, capsys, damage):
  change, reason = DAMAGE[damage]
  folder = damaged(published, "encoder", tmp_path, change)
  found = said(capsys, "embed", f"--weights={folder}", "--text=the", "--text=cat", "--compile_cache=none")
  assert reason.partition(" The nearest")[0] in found


@pytest.mark.parametrize("damage", DAMAGE)
def test_train_refuses_damaged_weights_and_writes_no_checkpoint(published, tmp_path, capsys, damage):
  change, reason = DAMAGE[damage]
  model = weights.open_weights(str(published / "decoder")).model
  folder = damaged(published, "decoder", tmp_path, change)
  (tmp_path / "config.py").write_text(CONFIG.format(model=dict(model), weights=str(folder), vocab=VOCAB))
  flags = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run", "--compile_cache=none", "--peer_timeout=300"]
  assert reason in said(capsys, "train", *flags)
  assert not list(tmp_path.glob("run/checkpoints/*"))


def test_generate_refuses_what_does_not_fit(published, tmp_path, capsys):
  flags = ["generate", f"--weights={published}/decoder", "--compile_cache=none"]
  assert "has 24 tokens, and the model's context is 16" in said(capsys, *flags, f"--prompt={TEXT}")
  assert f"the model has {VOCAB} tokens" in said(capsys, *flags, "--prompt=the", "--tokenizer=byte")
  assert "is not among its" in said(capsys, *flags, "--prompt=xyz")
  enormous = edited(lambda values: values["model.norm.weight"].fill(3e38))
  flags[1] = f"--weights={damaged(published, 'decoder', tmp_path, enormous)}"
  assert "are no numbers (NaN or infinite)" in said(capsys, *flags, "--prompt=the", "--temperature=0")


def test_embed_refuses_what_does_not_fit(published, tmp_path, capsys):
  flags = ["embed", f"--weights={published}/encoder", "--compile_cache=none", "--text=cat"]
  assert "context" in said(capsys, *flags, f"--text={TEXT * 2}")
  assert f"{VOCAB} tokens" in said(capsys, *flags, "--tokenizer=byte")
  enormous = edited(lambda values: [v.__imul__(np.float32(1e30)) for v in values.values()])
  flags[1] = f"--weights={damaged(published, 'encoder', tmp_path, enormous)}"
  assert "NaN or infinite" in said(capsys, *flags)


@pytest.mark.parametrize("part", [0, 0.5])
def test_a_tokenizer_cut_short_is_refused_by_all(published, tmp_path, capsys, part):
  def cut(folder):
    (folder / "vocabulary.json").unlink()
    file = folder / "tokenizer.json"
    tokenizers.train([TEXT], 257).save(folder)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])

  folder = damaged(published, "decoder", tmp_path, cut)
  (tmp_path / "a.txt").write_text(TEXT)
  assert "tokenizer" in said(capsys, "generate", f"--weights={folder}", "--prompt=the", "--compile_cache=none")
  out = f"--out={tmp_path}/store"
  assert "tokenizer.json" in said(capsys, "data", "tokenize", f"{tmp_path}/a.txt", out, f"--tokenizer={folder}")
  assert not (tmp_path / "store").exists()
