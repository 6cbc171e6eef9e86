"""Parameters of a notebook: read from its typed cell, checked by name, type and range before anything runs.

Papermill alone logs a mistyped name and runs on.
A parameter is declared as ``epsilon: float = 0.1  # tolerance, nats; in (0, inf)`` or ``…; one of cpu | cuda``:
the part behind the last semicolon is what is enforced here and printed in the book's tables.
"""
import math
import re
from dataclasses import dataclass

import yaml


class ParameterError(ValueError):
    """One line that names the parameter, its value and what is allowed."""


@dataclass(frozen=True)
class Parameter:
    """A declared parameter: name, type as written, default as written, meaning, and the allowed values."""
    name: str
    type: str
    default: str
    meaning: str
    allowed: str

    def parse(self, value):
        """`value` (text or object) as this parameter's type and inside its range; else ParameterError."""
        if isinstance(value, str):
            value = self._from_text(value)
        kinds = [k.strip() for k in self.type.split("|")]
        if not any(_is(value, kind) for kind in kinds):
            raise ParameterError(f"{self.name} must be {self.type}, got {value!r}")
        value = float(value) if "float" in kinds and isinstance(value, int) and not isinstance(value, bool) else value
        if value == []:
            raise ParameterError(f"{self.name} must hold at least one value ({self.allowed}), got []")
        for item in value if isinstance(value, list) else [value]:
            if item is not None and not self._inside(item):
                raise ParameterError(f"{self.name} must be {self.allowed}, got {item!r}")
        return value

    def _from_text(self, text):
        if "str" in self.type and "list" not in self.type:
            return text
        try:
            # YAML reads 1e-3 as text: try numbers first
            return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
        except ValueError:
            pass
        try:
            return None if text == "None" else yaml.safe_load(text)
        except yaml.YAMLError:
            raise ParameterError(f"{self.name} must be {self.type}, got {text!r}") from None

    def _inside(self, value):
        if self.allowed.startswith("one of "):
            return any(re.fullmatch(pattern_of(choice), str(value)) for choice in self.allowed[7:].split("|"))
        if interval := re.fullmatch(r"in ([\[(])(.+),(.+)([\])])", self.allowed):
            opening, low, high, closing = interval.groups()
            above = value >= float(low) if opening == "[" else value > float(low)
            below = value <= float(high) if closing == "]" else value < float(high)
            return above and below and not math.isnan(value)
        return True


def pattern_of(choice):
    """A choice as a pattern: ``cuda:N`` and ``folder:PATH`` stand for any number and any path."""
    return re.escape(choice.strip()).replace("N", r"\d+").replace("PATH", ".+")


def _is(value, kind):
    if kind == "None":
        return value is None
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    return isinstance(value, list)


LINE = re.compile(r"^(\w+)\s*:\s*([^=]+?)\s*=\s*(.+?)\s*(?:#\s*(.*))?$")


def parameters(notebook):
    """{name: Parameter} of a notebook (a dict as read from its JSON), in the order of its parameters cell."""
    cells = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if not cells:
        raise ParameterError("the notebook has no cell tagged parameters")
    found = {}
    for line in "".join(cells[0]["source"]).splitlines():
        if match := LINE.match(line):
            name, kind, default, comment = match.groups()
            meaning, _, allowed = (comment or "").rpartition(";")
            if not allowed.strip().startswith(("in ", "one of ")):
                meaning, allowed = comment or "", ""
            found[name] = Parameter(name, kind.strip("\"' "), default, meaning.strip(), allowed.strip())
    return found


def check(notebook, given):
    """`given` with every value parsed; an unknown name, a wrong type or an out-of-range value raises."""
    known = parameters(notebook)
    for name in given:
        if name not in known:
            raise ParameterError(f"parameter must be one of {', '.join(known)}, got {name!r}")
    return {name: known[name].parse(value) for name, value in given.items()}
