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
    """The aggregating calls of an expression, as parsed nodes."""
    return [n for n in ast.walk(_parse(q)) if isinstance(n, ast.Call) and n.func.id in _AGGREGATES
            and len(n.args) == (2 if n.func.id == "quantile" else 1)]


def _t_interval(values, level):
    # mean ± t_{(1+level)/2, n-1} · s / sqrt(n)
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    half = stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return values.mean() - half, values.mean() + half


def _share(q, arrays, level):
    """Clopper-Pearson interval of an expression over one array of zeros and ones; None where it is no such thing."""
    binary = [k for k, v in arrays.items() if v.ndim and np.isin(v, (0, 1)).all()]
    if len(binary) != 1 or sum(v.ndim > 0 for v in arrays.values()) != 1:
        return None
    draws = arrays[binary[0]].astype(bool)
    low, high = stats.binomtest(int(draws.sum()), len(draws)).proportion_ci(level, "exact")
    # the expression takes one value where the draw is 0 and another where it is 1, and its mean lies between them
    zero, one = (float(evaluate(q, arrays | {binary[0]: np.asarray(bit)})) for bit in (False, True))
    return sorted((zero + (one - zero) * low, zero + (one - zero) * high))


def _bootstrap(q, arrays, level, resamples=2000):
    """Percentile interval; arrays of one length are resampled together."""
    rng, draws = np.random.default_rng(0), []
    for _ in range(resamples):
        picks = {n: rng.integers(0, n, n) for n in sorted({len(v) for v in arrays.values() if v.ndim})}
        draws.append(evaluate(q, {k: v[picks[len(v)]] if v.ndim else v for k, v in arrays.items()}))
    return np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])


def _by_block(arrays):
    ids, block = np.unique(arrays["block"], return_inverse=True)
    count = np.bincount(block)
    return {k: np.bincount(block, weights=v) / count if v.ndim and len(v) == len(block) else v
            for k, v in arrays.items()}


def measure(q, arrays, by):
    """(estimate, low, high, n) of the expression `q`.

    `exact` and `construction` give the smallest and the largest element; `mc` and `images` a 99 % interval of the
    mean over the leading axis (Clopper-Pearson for zeros and ones, bootstrap where `q` aggregates); `blocks` the same
    over block means; `seeds` a 95 % t-interval over training runs. A NaN in any input makes all of it NaN.
    """
    arrays = {k: np.asarray(v) for k, v in arrays.items()}
    if by == "blocks":
        arrays = _by_block({k: v.astype(float) for k, v in arrays.items()})
    used = {k: arrays[k] for k in names_in(q)}
    if empty := [k for k, v in used.items() if v.size == 0]:
        raise ClaimError(f"{empty[0]} must not be empty: {q}")
    n = max((len(v) for v in used.values() if v.ndim), default=1)
    if any(np.isnan(v.astype(float)).any() for v in used.values()):
        return math.nan, math.nan, math.nan, n
    if by in ("exact", "construction"):
        value = np.asarray(evaluate(q, used))
        return float(value.mean()), float(value.min()), float(value.max()), int(value.size)
    if any(v.ndim > 1 for v in used.values()):
        raise ClaimError(f"by {by} needs one number a draw, got arrays of more than one axis: {q}")
    return _sampled(q, used, by, n)


def _sampled(q, arrays, by, n):
    """`measure` for draws, images, blocks and seeds."""
    level, whole = LEVEL[by], _parse(q)
    if isinstance(whole, ast.Call) and whole.func.id == "mean" and len(_aggregates(q)) == 1:
        q = ast.unparse(whole.args[0])        # the mean over draws is what is estimated anyway
    if any(call.func.id in ("min", "max") for call in _aggregates(q)):
        raise ClaimError(f"the smallest or largest of draws has no interval: {q}")
    value = np.atleast_1d(np.asarray(evaluate(q, arrays)))
    if all(v.ndim == 0 for v in arrays.values()) and by != "seeds":
        return float(value.mean()), -math.inf, math.inf, 1     # one number is no sample
    if not np.isfinite(value.astype(float)).all():
        return math.nan, -math.inf, math.inf, n
    if _aggregates(q):
        low, high = _bootstrap(q, arrays, level)
    else:
        low, high = by != "seeds" and _share(q, arrays, level) or _t_interval(value.astype(float), level)
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
