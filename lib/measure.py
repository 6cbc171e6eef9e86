"""Expressions over named arrays and their intervals: the arithmetic of a claim's rule.

Nothing here knows a claim: `evaluate` reads an expression, `measure` gives its interval, `outcome` compares it.
"""
import ast
import math
import operator
from functools import lru_cache

import numpy as np
from scipy import stats

LEVEL = {"mc": .99, "images": .99, "blocks": .99, "seeds": .95}   # confidence of the intervals


class ClaimError(ValueError):
    """A mistake in the ledger or in a call of `settle`, in one line."""


_AGGREGATES = {"mean": np.mean, "median": np.median, "min": np.min, "max": np.max, "std": np.std,
               "quantile": np.quantile}
_FUNCTIONS = {"abs": np.abs, "log": np.log, "log10": np.log10, "log2": np.log2, "log1p": np.log1p,
              "exp": np.exp, "sqrt": np.sqrt} | _AGGREGATES
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.Pow: operator.pow, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
              ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
              ast.Eq: operator.eq, ast.NotEq: operator.ne}


def _dotted(node):
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = _dotted(node.value)
        return head and f"{head}.{node.attr}"
    return None


def _walk(node, arrays):
    """Evaluate a parsed expression; anything beyond arithmetic, comparisons and the functions above is refused."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if (name := _dotted(node)) is not None:
        if name == "inf":
            return math.inf
        if name in arrays:
            return arrays[name]
        raise ClaimError(f"unknown name {name!r} in an expression")
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_walk(node.left, arrays), _walk(node.right, arrays))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_walk(node.operand, arrays))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPERATORS:
        return _OPERATORS[type(node.ops[0])](_walk(node.left, arrays), _walk(node.comparators[0], arrays))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS \
            and not node.keywords:
        arguments = [_walk(a, arrays) for a in node.args]
        if node.func.id in ("min", "max") and len(arguments) == 2:
            return (np.minimum if node.func.id == "min" else np.maximum)(*arguments)
        return _FUNCTIONS[node.func.id](*arguments)
    raise ClaimError(f"not allowed in an expression: {ast.unparse(node)}")


@lru_cache(maxsize=None)
def _parse(q):
    try:
        return ast.parse(str(q), mode="eval").body
    except SyntaxError:
        raise ClaimError(f"not an expression: {q!r}") from None


def evaluate(q, arrays):
    """The value of the expression `q` over named arrays: arithmetic, comparisons, mean, median, log and a few more."""
    with np.errstate(all="ignore"):
        return _walk(_parse(q), arrays)


def names_in(q):
    """The array names that an expression reads."""
    found, todo = set(), [_parse(q)]
    while todo:
        node = todo.pop()
        name = _dotted(node)
        if name is not None:
            found.add(name)
        else:
            todo += node.args if isinstance(node, ast.Call) else list(ast.iter_child_nodes(node))
    return found - {"inf", "value"}


def _aggregates(q):
    return any(isinstance(n, ast.Call) and n.func.id in _AGGREGATES and len(n.args) == (2 if n.func.id == "quantile" else 1)
               for n in ast.walk(_parse(q)))


def _t_interval(values, level):
    # mean ± t_{(1+level)/2, n-1} · s / sqrt(n)
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    half = stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return values.mean() - half, values.mean() + half


def _bootstrap(q, arrays, n, level, resamples=2000):
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(resamples):
        pick = rng.integers(0, n, n)
        draws.append(evaluate(q, {k: v[pick] if v.ndim and len(v) == n else v for k, v in arrays.items()}))
    return np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])


def _by_block(arrays):
    ids, block = np.unique(arrays["block"], return_inverse=True)
    count = np.bincount(block)
    return {k: np.bincount(block, weights=v) / count if v.ndim and len(v) == len(block) else v
            for k, v in arrays.items()}


def measure(q, arrays, by):
    """(estimate, low, high, n) of the expression `q`.

    `exact` and `construction` give the smallest and the largest element; `mc` and `images` a 99 % interval of the
    mean over the leading axis (Clopper-Pearson for booleans, bootstrap where `q` aggregates); `blocks` the same over
    block means; `seeds` a 95 % t-interval over training runs.
    """
    arrays = {k: np.asarray(v) for k, v in arrays.items()}
    if by == "blocks":
        arrays = _by_block({k: v.astype(float) for k, v in arrays.items()})
    used = {k: arrays[k] for k in names_in(q)}
    value = np.asarray(evaluate(q, used))
    if by in ("exact", "construction") or all(v.ndim == 0 for v in used.values()) and by != "seeds":
        return float(value.mean()), float(value.min()), float(value.max()), int(value.size)
    value = np.atleast_1d(value)
    n, level = max((len(v) for v in used.values() if v.ndim), default=1), LEVEL[by]
    if not np.isfinite(value.astype(float)).all():
        return math.nan, -math.inf, math.inf, n
    if _aggregates(q):
        low, high = _bootstrap(q, used, n, level)
    elif value.dtype == bool:
        low, high = stats.binomtest(int(value.sum()), n).proportion_ci(level, "exact")
    else:
        low, high = _t_interval(value, level)
    return float(value.mean()), float(low), float(high), n


def outcome(low, high, bounds, by):
    """`holds` when [low, high] lies inside the bounds, `fails` when disjoint (exact: not inside), else `undecided`."""
    if math.isnan(low) or math.isnan(high):
        return "fails" if by in ("exact", "construction") else "undecided"
    if bounds[0] <= low and high <= bounds[1]:
        return "holds"
    if by in ("exact", "construction") or high < bounds[0] or low > bounds[1]:
        return "fails"
    return "undecided"
