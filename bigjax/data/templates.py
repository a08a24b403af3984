"""How models were taught to read a conversation: its turns as pieces of text, with what of it is an answer.

A named template is a few strings. A model's own, in Jinja, is that of its `tokenizer_config.json` or
`chat_template.jinja`, rendered as `transformers` does (https://huggingface.co/docs/transformers/chat_templating).
"""

import dataclasses
import datetime
import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

from bigjax.errors import UserError, suggest

ROLES = ("system", "user", "assistant")
_MOST = 10**8  # Characters of a conversation.


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a conversation as a model reads it."""

  text: str
  control: bool  # The template's own, in which names of control tokens stand for these; else what somebody wrote.
  learned: bool = False  # Part of an answer, its end among it.


Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], list[Piece]]


@dataclasses.dataclass(frozen=True)
class Turns:
  """A named template: what stands around each turn."""

  before: Mapping[str, str]  # By role.
  end: Mapping[str, str]  # By role; of an answer, it's what says that it's over.
  after: str = ""  # After every turn, not learned.
  begin: str = ""
  system: str | None = None  # None: it's a turn; else what joins it to the first message of the user.

  def __call__(self, messages: Sequence[Message]) -> list[Piece]:
    """Returns the pieces of a conversation."""
    if self.system is not None and messages[0]["role"] == "system":
      if len(messages) < 2 or messages[1]["role"] != "user":
        raise UserError("this template has no turn for 'system': it has to stand before one of 'user'.")
      first = dict(messages[1], content=messages[0]["content"] + self.system + messages[1]["content"])
      messages = [first, *messages[2:]]
    pieces = [Piece(self.begin, True)]
    for message in messages:
      role = message["role"]
      if role not in self.before:
        raise UserError(f"this template has no role {role!r}.{suggest(role, self.before)} It has {_or(self.before)}.")
      answer = role == "assistant"
      pieces += [
        Piece(self.before[role], True),
        Piece(message["content"], False, answer),
        Piece(self.end[role], True, answer),
        Piece(self.after, True),
      ]
    return [p for p in pieces if p.text]


def _alike(before, end, roles=ROLES, names=None, **rest):
  names = names or {}
  return Turns({r: before.format(role=names.get(r, r)) for r in roles}, dict.fromkeys(roles, end), **rest)


NAMED = {
  # https://huggingface.co/Qwen/Qwen2.5-7B-Instruct, HuggingFaceTB/SmolLM2-135M-Instruct
  "chatml": _alike("<|im_start|>{role}\n", "<|im_end|>", after="\n"),
  # https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/
  "llama3": _alike("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", begin="<|begin_of_text|>"),
  # https://ai.google.dev/gemma/docs/core/prompt-structure
  "gemma": _alike(
    "<start_of_turn>{role}\n",
    "<end_of_turn>",
    roles=("user", "assistant"),
    names={"assistant": "model"},
    begin="<bos>",
    after="\n",
    system="\n\n",
  ),
  # https://huggingface.co/microsoft/Phi-3-mini-4k-instruct
  "phi3": _alike("<|{role}|>\n", "<|end|>", after="\n"),
  # https://huggingface.co/mistralai/Mixtral-8x7B-Instruct-v0.1
  "mistral": Turns(
    {"user": "[INST] ", "assistant": " "}, {"user": " [/INST]", "assistant": "</s>"}, begin="<s>", system="\n\n"
  ),
  # For vocabularies without control tokens, such as bytes.
  "plain": Turns(
    {"system": "", "user": "User:\n", "assistant": "Assistant:\n"},
    {"system": "\n\n", "user": "\n\n", "assistant": "\n\n"},
  ),
}


def load(template: str) -> Render:
  """Returns what makes pieces of messages.

  Args:
    template: One of `NAMED`; or a file, `tokenizer_config.json` or a Jinja template (`*.jinja`), or a folder with one.

  Raises:
    UserError: There is none, or it can't be read.
  """
  if template in NAMED:
    return NAMED[template]
  place = pathlib.Path(template).expanduser()
  if place.is_dir():
    known = [place / n for n in ("chat_template.jinja", "tokenizer_config.json") if (place / n).is_file()]
    place = known[0] if known else place
  if not place.is_file():
    raise UserError(f"template={template!r} is neither a name nor a file with a template.{suggest(template, NAMED)}")
  try:
    tokens, text = {}, place.read_text(encoding="utf-8")
  except ValueError as e:
    raise UserError(f"template={template!r}: {str(place)!r} is no UTF-8 text: {e}") from e
  config = place if place.suffix == ".json" else place.parent / "tokenizer_config.json"
  if config.is_file():
    try:
      found = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
      raise UserError(f"template={template!r}: {str(config)!r} is damaged: {e}") from e
    if not isinstance(found, dict):
      raise UserError(f"template={template!r}: {str(config)!r} is no object of JSON. Fetch it again.")
    named = {k: v.get("content") if isinstance(v, dict) else v for k, v in found.items() if k.endswith("_token")}
    tokens = {k: v for k, v in named.items() if isinstance(v, str)}
    if place == config:
      text = _of_config(found, template)
  return functools.partial(_rendered, _compiled(text, template), tokens)


def opened(render: Render, messages: Sequence[Message]) -> tuple[list[Piece], str]:
  """Returns the pieces of a conversation up to where the model answers, and the text that ends an answer."""
  pieces = render([*messages, {"role": "assistant", "content": "x"}])
  stop = max(i for i, piece in enumerate(pieces) if piece.learned) + 1
  start = max((i for i, piece in enumerate(pieces[:stop]) if not piece.learned), default=-1) + 1
  return pieces[:start], "".join(piece.text for piece in pieces[start:stop]).removeprefix("x")


def _of_config(found, template):
  own = found.get("chat_template")
  if isinstance(own, list):  # Several, by name.
    named = [t for t in own if isinstance(t, dict) and t.get("name") == "default"]
    own = named[0].get("template") if named else None
  if not isinstance(own, str):
    raise UserError(f"template={template!r} has no chat_template. Name one of {', '.join(NAMED)}.")
  return own


def _compiled(text, template):
  try:
    import jinja2
    import jinja2.sandbox
  except ImportError as e:
    raise UserError(f"template={template!r} is in Jinja: pip install jinja2, or name one of {', '.join(NAMED)}.") from e

  class Bounded(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context, operator, left, right):
      if operator == "**" or not all(isinstance(x, int | float) for x in (left, right)):
        raise jinja2.sandbox.SecurityError(f"{operator} makes texts or numbers without end")
      return super().call_binop(context, operator, left, right)

  def refuse(message):
    raise UserError(f"the template says: {message}")

  environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
  environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
  # The day in a prompt must not change what is trained on from one day to the next.
  day = datetime.datetime(2024, 7, 26)
  environment.globals |= {"raise_exception": refuse, "strftime_now": day.strftime}
  try:
    return environment.from_string(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text))
  except (jinja2.TemplateError, RecursionError, MemoryError) as e:
    raise UserError(f"template={template!r} can't be read: {str(e)[:300]}") from e


def _rendered(compiled, tokens, messages):
  """Pieces of a rendered text: an answer is what comes after the prompt for it, to the end of its turn."""

  def render(count, prompt):
    parts, length = [], 0
    try:
      for part in compiled.generate(messages=list(messages[:count]), add_generation_prompt=prompt, **tokens):
        parts.append(part)
        length += len(part)
        if length > _MOST:
          raise UserError(f"the template makes more than {_MOST:,} characters of it.")
    except UserError:
      raise
    except Exception as e:  # A template is a program, and raises what programs do.
      raise UserError(f"the template can't take it: {type(e).__name__}: {str(e)[:300]}") from e
    return "".join(parts)

  pieces, done, whole = [], 0, render(len(messages), False)
  for i, message in enumerate(messages):
    for name in {*tokens.values(), *re.findall(r"<\|[\w.-]+\|>|</?s>|<\w+_of_\w+>", whole)}:
      if name in message["content"]:
        raise UserError(f"message {i} holds {name!r}, a control token, which would end its turn. Take it out.")
    if message["role"] != "assistant":
      continue
    prompt, after = render(i, True), render(i + 1, False)
    if not after.startswith(prompt) or not whole.startswith(after):
      raise UserError(
        f"the template changes what came before message {i} once there is more, so the answer can't be told from the "
        f"rest. Name one of {', '.join(NAMED)}, or cut conversations after their first answer."
      )
    answer = after[len(prompt) :]
    # The line end after a turn is the template's; a model stops before it.
    stop = (
      len(answer.rstrip("\n")) if not answer.rstrip("\n").endswith(message["content"].rstrip("\n")) else len(answer)
    )
    pieces += [Piece(whole[done : len(prompt)], True), Piece(answer[:stop], True, True)]
    done = len(prompt) + stop
  return [p for p in [*pieces, Piece(whole[done:], True)] if p.text]


def _or(names):
  return ", ".join(map(repr, names))
