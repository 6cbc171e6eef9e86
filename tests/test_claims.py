"""The rules: every kind on made-up data, refusals, and negative controls of the evaluator itself."""
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from lib import claims, records
from lib.claims import ClaimError

RNG = np.random.default_rng(0)


def entry(by="exact", atoms=None, printed=None, **rule):
    atoms = atoms or [{"q": "a - b", "in": [-.1, .1]}]
    rule = {"tier": "fast", "by": by, "atoms": atoms, **rule} | ({"printed": printed} if printed else {})
    return {"id": "made.up", "kind": "theorem", "says": "made up", "erratum": [{}, {}], "value": 5, "rule": rule}


def decide(claim, **arrays):
    return claims.verdict(claim, claims.measure_claim(claim, arrays))[0]


# ---------------------------------------------------------------- a rule of each kind

@pytest.mark.parametrize("shift, slug", [(0, "holds"), (.2, "fails")])
def test_exact(shift, slug):
    assert decide(entry(), a=np.ones(5), b=np.ones(5) + shift) == slug


def test_exact_fails_on_a_single_counterexample():
    assert decide(entry(), a=np.array([0, 0, 1.]), b=0) == "fails"


def test_exact_fails_on_nan():
    assert decide(entry(), a=np.array([0, np.nan]), b=0) == "fails"


def test_construction():
    assert decide(entry("construction"), a=1, b=1) == "holds-by-construction"
    assert decide(entry("construction"), a=1, b=2) == "fails"


@pytest.mark.parametrize("by", ["mc", "images"])
@pytest.mark.parametrize("shift, slug", [(0, "holds"), (.3, "fails"), (.1, "undecided")])
def test_draws(by, shift, slug):
    assert decide(entry(by, n=100), a=RNG.normal(shift, 1, 20_000), b=0) == slug


def test_shares_use_clopper_pearson():
    # 100 of 100 is no proof of more than 95 %: the exact 99 % interval starts at 0.948
    share = [{"q": "a", "in": [.95, 1]}]
    assert decide(entry("images", share), a=np.ones(100, bool)) == "undecided"
    assert decide(entry("images", share), a=np.ones(1000, bool)) == "holds"


def test_blocks_count_blocks_not_images():
    values = np.repeat(np.linspace(-.1, .2, 12), 100)          # 12 blocks of 100 equal images
    atoms = [{"q": "a", "in": [0, 1]}]
    assert decide(entry("images", atoms), a=values) == "holds"
    assert decide(entry("blocks", atoms), a=values, block=np.repeat(np.arange(12), 100)) == "undecided"


def test_one_seed_is_undecided():
    claim = entry("seeds", n=5)
    slug, reason, _ = claims.verdict(claim, claims.measure_claim(claim, {"a": 1., "b": 1.}))
    assert (slug, reason) == ("undecided", "one seed")


@pytest.mark.parametrize("mean, slug", [(0, "holds"), (1, "fails"), (.1, "undecided")])
def test_seeds_from_a_record(mean, slug):
    claim = entry("seeds", n=5)
    a = mean + np.array([-.02, .01, 0, .02, -.01])
    table = pd.DataFrame([{"seed": s, "claim": "x/made.up", "name": n, "value": v}
                          for s in range(5) for n, v in (("a", a[s]), ("b", 0))])
    assert claims.verdict(claim, claims.measure_record("x", claim, table))[0] == slug


def test_four_seeds_are_too_few():
    claim = entry("seeds", n=3)       # a rule cannot ask for fewer than five
    table = pd.DataFrame([{"seed": s, "claim": "x/made.up", "name": n, "value": 0.} for s in range(4) for n in "ab"])
    assert claims.verdict(claim, claims.measure_record("x", claim, table))[0] == "undecided"


def test_printed_form_failing_holds_as_corrected():
    assert decide(entry(printed=[{"q": "a", "in": [5, 6]}]), a=1, b=1) == "holds-as-corrected"


def test_printed_form_holding_convicts_our_erratum():
    assert decide(entry(printed=[{"q": "a", "in": [0, 2]}]), a=1, b=1) == "undecided"


def test_corrected_form_failing_fails():
    assert decide(entry(printed=[{"q": "a", "in": [5, 6]}]), a=1, b=9) == "fails"


def test_condition_unmet_is_undecided():
    assert decide(entry(when=[{"q": "a", "in": [2, 3]}]), a=1, b=1) == "undecided"


def test_too_few_draws_are_undecided():
    assert decide(entry("mc", n=1000), a=RNG.normal(0, .1, 500), b=0) == "undecided"


def test_like_the_papers_number():
    like = [{"q": "a", "like": "value", "tol": {"abs": .5}}]
    assert decide(entry(atoms=like), a=5.4) == "holds"
    assert decide(entry(atoms=like), a=5.6) == "fails"


def test_a_conjunction_needs_every_atom():
    atoms = [{"q": "a", "in": [0, 1]}, {"q": "b", "in": [0, 1]}]
    assert decide(entry(atoms=atoms), a=.5, b=.5) == "holds"
    assert decide(entry(atoms=atoms), a=.5, b=2) == "fails"


def test_nan_decides_nothing_and_confirms_no_erratum():
    nan = [{"q": "p", "in": [-1, 1]}]
    assert decide(entry(printed=nan), a=1, b=1, p=np.nan) == "undecided"
    assert decide(entry(printed=nan), a=1, b=1, p=np.array([5, np.nan])) == "undecided"
    assert decide(entry(atoms=[{"q": "a != b", "in": [1, 1]}]), a=np.nan, b=1) == "fails"
    assert decide(entry("mc"), a=np.array([0, 0, np.nan]), b=0) == "undecided"


def test_shares_in_disguise_use_clopper_pearson_too():
    # all of 20 draws are ones: the exact 99 % interval of the share is 0.767 to 1, whatever is done to it
    for q, bounds in (("a", (.7672, 1)), ("a - 1 + c", (-.1328, .1)), ("mean(a)", (.7672, 1)), ("2 * a", (1.5345, 2))):
        for draws in (np.ones(20), np.ones(20, bool)):
            _, low, high, n = claims.measure(q, {"a": draws, "c": .1}, "mc")
            assert (low, high, n) == (pytest.approx(bounds[0], abs=1e-4), pytest.approx(bounds[1]), 20)


def test_one_number_is_no_sample():
    assert decide(entry("mc"), a=0., b=0.) == "undecided"


def test_bootstrap_resamples_arrays_of_each_length():
    hits = 0
    for k in range(40):
        rng = np.random.default_rng(k)
        a, b = rng.normal(0, 1, 500), rng.normal(0, 1, 20)
        _, low, high, _ = claims.measure("mean(a) - mean(b)", {"a": a, "b": b}, "mc")
        hits += low <= 0 <= high
    assert hits >= 36


def test_a_number_is_settled_by_the_papers_settings_only():
    claim = entry(atoms=[{"q": "a", "like": "value", "tol": {"abs": 1}}], data=["mnist"]) | {"kind": "number"}
    claim["rule"]["tier"] = "full"
    source = {"notebook": "x/y", "result": claims.measure_claim(claim, {"a": 5}), "record": "r"}
    assert claims.judge("x", claim, source)["verdict"] == "holds"
    row = claims.judge("x", claim, source | {"deviations": ["half the epochs"]})
    assert (row["verdict"], row["evidence"]) == ("undecided", "reduced")


def test_a_claim_settled_twice_is_refused():
    result = claims.measure_claim(entry(), {"a": 1, "b": 1})
    cell = {"outputs": [{"data": {claims.MIME: {"tier": "fast", "claims": {"x/made.up": result}}}}]}
    with pytest.raises(ClaimError, match="settled twice"):
        claims.read_settled({"cells": [cell, json.loads(json.dumps(cell))]})


def test_a_stored_outcome_is_not_trusted():
    result = claims.measure_claim(entry(), {"a": 11, "b": 0})
    result["atoms"][0]["outcome"] = "holds"
    cell = {"outputs": [{"data": {claims.MIME: {"tier": "fast", "claims": {"x/made.up": result}}}}]}
    assert claims.read_settled({"cells": [cell]})["x/made.up"]["atoms"][0]["outcome"] == "fails"


def test_an_amended_rule_finds_its_names_among_what_the_page_kept_and_nowhere_else():
    def table(owner):
        own = [{"seed": s, "claim": "x/made.up", "name": "a", "value": 1.} for s in range(5)]
        # the claim's own number comes first, though the page kept one of the same name
        return pd.DataFrame(own + [{"seed": s, "claim": owner, "name": n, "value": v} for s in range(5) for n, v in (("a", 9.), ("b", 1.))])

    found = claims.measure_record("x", entry("seeds", n=5), table(claims.KEPT))
    assert found["atoms"][0]["estimate"] == 0 and found["atoms"][0]["n"] == 5
    with pytest.raises(ClaimError, match=r"lacks the names \['b'\]"):
        claims.measure_record("x", entry("seeds", n=5), table("x/another"))


def test_a_seed_recorded_twice_is_refused():
    table = pd.DataFrame([{"seed": s, "claim": "x/made.up", "name": n, "value": 0.} for s in (0, 0, 1) for n in "ab"])
    with pytest.raises(ClaimError, match="a seed twice"):
        claims.measure_record("x", entry("seeds", n=5), table)


def test_empty_arrays_and_more_axes_are_refused():
    with pytest.raises(ClaimError, match="must not be empty"):
        claims.measure("a", {"a": np.array([])}, "exact")
    with pytest.raises(ClaimError, match="more than one axis"):
        claims.measure("a", {"a": np.ones((3, 3))}, "images")
    with pytest.raises(ClaimError, match="no interval"):
        claims.measure("max(a)", {"a": np.arange(9.)}, "mc")


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize("arrays, word", [({"a": 1}, "needs the names"), ({"a": 1, "b": 1, "c": 1}, "not in its rule")])
def test_names_are_checked(arrays, word):
    with pytest.raises(ClaimError, match=word):
        claims.measure_claim(entry(), arrays)


def test_a_claim_without_a_rule_is_refused():
    with pytest.raises(ClaimError, match="has no rule"):
        claims.measure_claim({"id": "x", "kind": "trend"}, {"a": 1})


def test_unknown_ids_and_papers_are_refused():
    with pytest.raises(ClaimError, match="got 'no.such'"):
        claims.settle({"no.such": {}}, section="", paper="fetaya2020")
    with pytest.raises(ClaimError, match="paper must be one of"):
        claims.ledger("nobody2020")


@pytest.mark.parametrize("q", ["__import__('os')", "a.__class__()", "[1, 2]", "lambda: 1", "a if a else b", "open('x')",
                               "'text'", "mean(a, axis=0)", "a and b", "a +"])
def test_expressions_refuse_all_but_arithmetic(q):
    with pytest.raises(ClaimError):
        claims.evaluate(q, {"a": 1, "b": 2})


@pytest.mark.parametrize("change, word", [
    ({"by": "hope"}, "by must be"), ({"tier": "slow"}, "tier"), ({"atoms": []}, "no atoms"), ({"extra": 1}, "unknown keys"),
    ({"atoms": [{"q": "a"}]}, "either in or like"), ({"atoms": [{"q": "a", "like": 1}]}, "tol"), ({"printed": [{"q": "a", "in": [0, 1], "erratum": 3}]}, "erratum")])
def test_malformed_rules_are_refused(change, word):
    claim = entry()
    claim["rule"] |= change
    with pytest.raises(ClaimError, match=word):
        claims.check_rule(claim)


def test_a_changed_rule_makes_its_verdict_stale():
    claim = entry()
    result = claims.measure_claim(claim, {"a": 1, "b": 1})
    for change in (lambda: claim.update(value=6), lambda: claim["rule"]["atoms"][0].update({"in": [-9, 9]})):
        change()
        assert claims.verdict(claim, result)[:2] == ("not-run", "rule changed since the run")


# ---------------------------------------------------------------- intervals

@given(st.integers(0, 50), st.integers(1, 50))
def test_clopper_pearson_contains_the_share(k, extra):
    n = k + extra
    values = np.arange(n) < k
    estimate, low, high, size = claims.measure("a", {"a": values}, "images")
    assert low <= k / n <= high and size == n and estimate == pytest.approx(k / n)


def test_intervals_cover_as_they_say():
    # 400 repetitions of a 99 % interval of 30 skewed draws' median: at least 95 % must contain the truth
    hits = 0
    for _ in range(100):
        draws = RNG.exponential(size=80)
        _, low, high, _ = claims.measure("median(a)", {"a": draws}, "mc")
        hits += low <= np.log(2) <= high
    assert hits >= 95


def test_seeds_interval_is_student_t():
    estimate, low, high, _ = claims.measure("a", {"a": np.array([1., 2, 3, 4, 5])}, "seeds")
    assert (estimate, high - low) == (3, pytest.approx(2 * 2.7764451 * np.std([1, 2, 3, 4, 5], ddof=1) / 5 ** .5))


def test_infinite_values_decide_nothing_by_sampling():
    assert decide(entry("mc"), a=np.array([0, np.inf] * 100), b=0) == "undecided"


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_evaluate_is_python(a, b):
    assert claims.evaluate("abs(a - 2*b)**2 + min(a, b)", {"a": a, "b": b}) == pytest.approx(abs(a - 2 * b) ** 2 + min(a, b))


# ---------------------------------------------------------------- the ledger and the accepted verdicts

def all_entries():
    return [(paper, e) for paper in claims.papers() for e in claims.ledger(paper)["claims"]]


def test_the_ledger_is_complete_and_uniform():
    entries = all_entries()
    assert len(entries) >= 836      # the five works; whoever adds a claim adds to them
    assert len({(p, e["id"]) for p, e in entries}) == len(entries)
    for paper, e in entries:
        assert e["kind"] in ("theorem", "number", "trend", "figure") and e["says"] and e["where"], e["id"]
        assert all({"printed", "corrected", "evidence"} <= set(x) for x in e.get("erratum", [])), e["id"]


def test_every_rule_is_well_formed():
    rules = [e for _, e in all_entries() if "rule" in e]
    assert len(rules) >= 60
    for e in rules:
        claims.check_rule(e)


def test_rules_on_stand_in_data_about_methods_are_replicated():
    for paper, e in all_entries():
        if e["kind"] == "trend" and e.get("rule", {}).get("data"):
            least = 5 if e["rule"]["tier"] == "fast" else 3       # a full-size run costs too much for five
            assert e["rule"]["by"] == "construction" or e["rule"]["by"] == "seeds" and e["rule"]["n"] >= least, e["id"]


def test_a_flipped_verdict_is_seen():
    rows = [{"paper": "fetaya2020", "id": "lemma1", "verdict": "fails", "evidence": "theorem", "reason": "made up"}]
    before = records.accepted()["fetaya2020"]["lemma1"]
    assert before[0] != "fails"
    assert any(line.startswith("fetaya2020/lemma1:") for line in records.flips(rows))
    full = claims.scoreboard(records.sources())
    assert records.flips(full) == []
    next(r for r in full if r["id"] == "lemma1")["verdict"] = "fails"
    assert len(records.flips(full)) == 1


def test_settle_stores_what_it_measured(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    monkeypatch.setattr(claims, "claim", lambda paper, id: entry())
    assert claims.settle({"made.up": {"a": np.inf, "b": 0}}, section="s", paper="p") is None
    stored = json.loads(json.dumps(shown[0][claims.MIME], allow_nan=False))["claims"]["p/made.up"]
    assert stored["atoms"][0]["low"] == "inf" and "verdict" not in json.dumps(stored)
    notebook = {"cells": [{"outputs": [{"data": shown[0]}]}]}
    assert claims.read_settled(notebook)["p/made.up"]["atoms"][0]["low"] == np.inf


def test_scoreboard_rows_have_the_promised_fields():
    row = claims.scoreboard({})[0]
    assert list(row) == ["paper", "id", "kind", "verdict", "reason", "evidence", "tier", "notebook", "n", "interval", "record"]
    assert row["verdict"] in claims.VERDICTS
