"""How something that a user can put right is refused: one line in four parts."""

from __future__ import annotations


def refuse(what: str, got: object, expected: object, remedy: str) -> ValueError:
  """The error to raise: "Policy is of another robot: got 3 views; expected 1 or 2; evaluate another policy."

  Args:
    what: the field, flag, file or value that does not fit.
    got: what it is. expected: what would fit.
    remedy: what to do, in the imperative, without a full stop.
  """
  return ValueError(one_line(f"{what}: got {got}; expected {expected}; {remedy}."))


def one_line(text: str) -> str:
  """The text without line breaks and control characters, which `got` may hold: it comes from files and clients."""
  if text.isprintable():
    return text
  return " ".join("".join(one if one.isprintable() else " " for one in text).split())
