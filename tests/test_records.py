"""The committed evidence: recorded sweeps are current and complete, and controls show no trend they may not show."""
import itertools

import pandas as pd
import pytest

from lib import claims, records
from lib.parameters import parameters

SWEEPS = sorted(str(p.relative_to(claims.project_root() / "book/records/seeds").with_suffix(""))
                for p in (claims.project_root() / "book" / "records" / "seeds").rglob("*.csv"))


def by_seeds(name):
    """The claims of a chapter's paper that its recorded sweep measured."""
    table = pd.read_csv(records.path("seeds", name, ".csv"))
    paper = name.split("/")[0]
    return table, [claims.claim(paper, key.split("/")[1]) for key in sorted(set(table["claim"]) - {claims.KEPT})]


def test_there_are_records():
    assert SWEEPS


@pytest.mark.parametrize("name", SWEEPS)
def test_a_recorded_sweep_is_current(name):
    assert records.changed(records.read(records.path("seeds", name, ".json")), name, but=records.SHOWN) == ""


@pytest.mark.parametrize("name", SWEEPS)
def test_no_trend_holds_under_a_control(name):
    table, entries = by_seeds(name)
    if not entries:
        return          # a page of no paper: it decides nothing
    offered = parameters(records.read(records.path("source", name)))["control"].allowed
    controls = {choice.strip() for choice in offered.removeprefix("one of ").split("|")} - {"none"}
    assert "untrained" in controls
    for control in controls:
        rows = table[table["control"] == control]
        assert rows["seed"].nunique() >= claims.MIN_SEEDS, control
        for entry in entries:
            slug, reason, _ = claims.verdict(entry, claims.measure_record(name.split("/")[0], entry, rows))
            allowed = control in entry["rule"].get("may_hold_under", ())
            assert allowed or not slug.startswith("holds"), f"{entry['id']} holds with the control {control}"


@pytest.mark.parametrize("name", SWEEPS)
def test_every_seed_differs(name):
    table, entries = by_seeds(name)
    real = (table[table["control"] == "none"] if "control" in table else table).drop_duplicates(["seed", "name"])
    runs = real.pivot(index="seed", columns="name", values="value").to_numpy()
    for one, other in itertools.combinations(runs, 2):
        assert (one == other).mean() < .5                                # five copies of one run are one run
