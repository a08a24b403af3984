"""Data and checkpoints run no code, pages and terminals are given text, and what is secret stays where it was."""

import ast
import gzip
import html.parser
import io
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from bigjax import main
from bigjax.data import arrays, documents, templates
from bigjax.errors import UserError
from bigjax.metrics import Writers
from bigjax.report import write_report

ROOT = pathlib.Path(__file__).parents[1]

# What runs code, or may where it reads; and the one place where that is so, because a config is Python.
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy", "code"}
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
  "exec_module",
  "extractall",
  "unpack_archive",
  "system",
  "popen",
  "unsafe_load",
  "full_load",
  "loads_pickle",
}
KEYWORDS = {"allow_pickle": True, "shell": True, "trust_remote_code": True, "weights_only": False}
ALLOWED = {("bigjax/config.py", "exec_module")}


def dangers(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (a.name for a in node.names if a.name.partition(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
      yield node.module
    elif isinstance(node, ast.Call):
      if isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield node.func.id
      if isinstance(node.func, ast.Attribute) and node.func.attr in ATTRIBUTES:
        yield node.func.attr
      for keyword in node.keywords:
        if keyword.arg in KEYWORDS and getattr(keyword.value, "value", None) == KEYWORDS[keyword.arg]:
          yield f"{keyword.arg}={KEYWORDS[keyword.arg]}"


def test_the_package_runs_code_of_configs_alone():
  found = {
    (file.relative_to(ROOT).as_posix(), what)
    for folder in ("bigjax", "scripts")
    for file in (ROOT / folder).rglob("*.py")
    for what in dangers(ast.parse(file.read_text()))
  }
  assert found == ALLOWED


def test_the_search_finds_what_it_is_for():
  code = (
    "import pickle\nfrom yaml import load\neval('1')\nnp.load(f, allow_pickle=True)\nrun(c, shell=True)\nz.extractall()"
  )
  assert sorted(dangers(ast.parse(code))) == sorted(
    ["pickle", "yaml", "eval", "allow_pickle=True", "shell=True", "extractall"]
  )


class Trap:
  """Leaves a file behind where it is unpickled."""

  def __init__(self, place):
    self.place = place

  def __reduce__(self):
    return (open, (str(self.place), "w"))


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.npy.gz", "a.bin"])
def test_pickled_objects_are_refused_and_not_opened(tmp_path, name):
  trap = np.array([Trap(tmp_path / "sprung")], object)
  buffer = io.BytesIO()
  if name == "a.npz":
    np.savez(buffer, x=trap)
  else:
    np.save(buffer, trap)
  content = buffer.getvalue()
  (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
  with pytest.raises(UserError, match="pickled objects"):
    arrays.make(str(tmp_path / name))
  assert not (tmp_path / "sprung").exists()


def test_a_template_of_a_model_reaches_nothing_of_python(tmp_path):
  render = lambda text: templates.load(str(tmp_path / "a.jinja"))([{"role": "user", "content": "x"}])
  for text in (
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('sprung', 'w') }}",
    "{{ cycler.__init__.__globals__.os.system('touch sprung') }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
  ):
    (tmp_path / "a.jinja").write_text(text)
    with pytest.raises(UserError, match="template"):
      render(text)


# Archives and numbers that promise too much


def header(shape):
  text = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.npy.gz", "a-ubyte", "a-ubyte.gz"])
def test_what_claims_more_than_the_machine_holds_is_refused_before_it_is_fetched(tmp_path, name):
  content = header((10**12, 10)) if "npy" in name or "npz" in name else bytes([0, 0, 8, 3]) + b"\xff" * 12
  if name.endswith(".gz"):
    content = gzip.compress(content)
  if name.endswith("npz"):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
      archive.writestr("x.npy", content)
  else:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=name):
    arrays.make(str(tmp_path / name))


def test_a_small_archive_of_a_large_nothing_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr("bigjax.data.formats.memory", lambda: 2**20)
  with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
    file.write(b" " * 2**24)
  inputs = documents.Inputs((str(tmp_path / "a.jsonl.gz"),))
  with pytest.raises(UserError, match=r"a\.jsonl\.gz.*more than the memory"):
    list(inputs.read(inputs.parts(100)[0]))
  np.savez_compressed(tmp_path / "a.npz", x=np.zeros(2**22, np.uint8))
  with pytest.raises(UserError, match=r"a\.npz.*more than the memory"):
    arrays.make(str(tmp_path / "a.npz"))


def test_a_name_in_an_index_leads_nowhere_else(tmp_path):
  from bigjax.weights import safetensors

  for name in ("../secret.safetensors", "/etc/passwd", "a/b.safetensors", ".."):
    (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="which is none of its directory's"):
      safetensors.open_files(str(tmp_path))


# Pages and terminals


HOSTILE = [
  "<script>alert(1)</script>", "'\"><img src=x onerror=alert(1)>", "</style><script>alert(1)</script>",
  "]]><svg/onload=a>",
  "javascript:alert(1)", "&lt;script&gt;", "<!-- --!><script>", "\u202e\x00\x1b[2J", "${7*7}{{7*7}}",
]  # fmt: skip


class Page(html.parser.HTMLParser):
  """Tags and attributes of a page."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes = [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += attributes


@pytest.mark.filterwarnings("ignore:Glyph")  # Curves have no letter for a control character.
@pytest.mark.parametrize("text", HOSTILE)
def test_the_report_shows_whatever_it_is_given_as_text(tmp_path, text):
  with Writers(tmp_path, ("jsonl",)) as writers:
    for step in (1, 2, 3):
      writers.write(step, {"loss": 1 / step, text: 0.5, f"test/{text}": 1.0, f"test/recall/{text}": 0.5})
  config = {text: text, "model": {"name": text, text: [text]}, "evals": {text: {"evaluator": {"name": text}}}}
  config |= {"claim": {"metric": f"test/{text}", "at_least": 0.5, "at_most": None, "source": text}}
  run = {
    "status": text, "step": 3, "command": [text], "versions": {text: text},
    "git": {"commit": text, "changed_files": [text]},
    "mesh": {text: 8}, "seconds": {text: 5.0}, "started": text, "starts": [text], "error": text,
    "incidents": [{"time": text, "what": text}],
  }  # fmt: skip
  parameters = [{"path": text, "shape": [1], "dtype": text, "count": 1, "bytes": 4, "spec": text, "rule": text}]
  for name, content in (("config", config), ("run", run), ("parameters", parameters)):
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
  content = write_report(tmp_path).read_text(encoding="utf-8")
  page = Page(content)
  assert not {"script", "iframe", "object", "embed", "form", "base", "link", "image"} & set(page.tags)
  for name, value in page.attributes:
    assert not name.startswith("on") and (name != "style" or "alert" not in value), (name, value)
    outside = name in ("href", "src", "xlink:href") and ":" in (value or "")
    assert not outside or re.match(r"data:image/png;|https://github\.com/", value), (name, value)


def test_a_message_moves_no_cursor(tmp_path, capsys):
  (tmp_path / "a.py").write_text("def get_config():\n  raise ValueError('\\x1b[2J\\x07 gone \\r\\x9b31m')\n")
  assert main.main(["train", f"--config={tmp_path / 'a.py'}", "--workdir=w"]) == 2
  said = capsys.readouterr().err
  assert r"\x1b[2J\x07 gone \r\x9b31m" in said and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)


# Secrets


CONFIG = """
import ml_collections
def get_config():
  images = dict(name="synthetic", kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)
  return ml_collections.ConfigDict(dict(
      total_steps=4, batch_size=16, log_every=1, checkpoint_every=2,
      data=dict(source=images), model=dict(name="mlp", in_features=16, widths=(8,), num_outputs=3),
      task=dict(name="classification"), optimizer=dict(name="sgd"), schedule=dict(name="constant", peak=1e-2),
      guard=dict(nonfinite="stop"),
  ))
"""
SECRETS = {
  "HF_TOKEN": "hf_Zq8sPd0hVbW3", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIq7", "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEJr",
  "WANDB_API_KEY": "0a1b2c3d4e5f6a7b8c9d", "GOOGLE_APPLICATION_CREDENTIALS_JSON": "private_key_id_7f3a",
  "PIP_INDEX_URL": "https://user:s3cr3tpass@index.example/simple", "GITHUB_TOKEN": "ghp_16C7e42F292c6912E7",
}  # fmt: skip


def test_secrets_in_the_environment_reach_neither_the_workdir_nor_what_is_printed(tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  workdir = tmp_path / "run"
  program = f"""
from bigjax import main, record
command = ["train", "--config={tmp_path / "config.py"}", "--workdir={workdir}"]
codes = [main.main(command), main.main([*command, "--config.schedule.peak=1e38"]), main.main(["ledger", "{workdir}"])]
print(codes)
with record.failure_noted("{workdir}"):
  raise RuntimeError("as a run that falls over")
"""
  env = os.environ | SECRETS | {"PYTHONPATH": str(ROOT)}
  ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
  said = ended.stdout + ended.stderr
  assert "[0, 2, 0]" in said and "as a run that falls over" in said, said
  files = [file for file in workdir.rglob("*") if file.is_file()]
  assert len(files) > 10
  for name, value in SECRETS.items():
    assert value not in said, name
    for file in files:
      content = file.read_bytes()
      assert value.encode() not in content and name.encode() not in content, (name, file)
