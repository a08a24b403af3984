"""The one entrypoint: `bigjax COMMAND ...`, the same as `python -m bigjax COMMAND ...`.

What its exit code says stands in errors.py.
"""

import importlib
import os
import pkgutil
import sys
import traceback

from bigjax import __version__, commands
from bigjax.errors import UserError, printable, suggest

COMMANDS = {
  "train": "train a config, or go on where its workdir stopped",
  "eval": "measure a checkpoint by the config's evaluators",
  "generate": "write on where a prompt ends, with a run's model or published weights",
  "embed": "how alike texts are to a published encoder, and their vectors",
  "explain": "every parameter's layout, every activation's axes, every collective of the compiled step",
  "plan": "compile the step for TPUs that need not be there: memory, work, communication, time, cost",
  "diff": "what differs between two configs or workdirs",
  "repro": "run a workdir again from what it recorded, and compare",
  "report": "write the report page of a workdir anew",
  "ledger": "check which examples the steps of a run were fed, or list those of a step",
  "replay": "take the steps of a fault again, and name the first tensor that is not finite",
  "chaos": "disturb runs at seeded moments, and compare what is left in the end to the bit",
  "data": "prepare datasets, make vocabularies, tokenize text",
  "checkpoint": "list, show, compare, verify, convert and remove checkpoints",
  "weights": "show published weights; write a run's for transformers",
}


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ("-h", "--help", "help"):
    width = max(map(len, COMMANDS))
    print("usage: bigjax COMMAND [...]   (bigjax COMMAND --help for its flags)\n")
    print("\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()))
    return 0
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())  # As `python -m` has it: components of one's own are found by dotted names.
  if argv[0] in ("-V", "--version"):
    print(f"bigjax {__version__}")
    return 0
  quiet()
  try:
    return _load(argv[0])(argv[1:]) or 0
  except UserError as e:
    if os.environ.get("BIGJAX_TRACEBACK"):
      traceback.print_exc()
    print(printable(f"bigjax {argv[0]}: {e}"), file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"bigjax {argv[0]}: interrupted", file=sys.stderr)
    return 130
  except (FloatingPointError, OSError) as e:
    print(printable(f"bigjax {argv[0]}: {e}"), file=sys.stderr)
    return 1


def _load(name):
  known = [m.name for m in pkgutil.iter_modules(commands.__path__)]
  if name not in known:
    raise UserError(f"there is no command {name!r}.{suggest(name, known)}")
  return importlib.import_module(f"bigjax.commands.{name}").main


def quiet():
  """What libraries log is for their authors, unless these variables say otherwise; JAX would set the first itself."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
  from absl import logging

  logging.set_verbosity(logging.FATAL)  # Errors are raised as well, and said once, by us.
  before = sys.unraisablehook

  def hook(unraisable):
    # What the array library reports of a save that has failed already, to a loop that Orbax has closed.
    if "Event loop is closed" not in str(unraisable.exc_value):
      before(unraisable)

  sys.unraisablehook = hook


if __name__ == "__main__":
  sys.exit(main())
