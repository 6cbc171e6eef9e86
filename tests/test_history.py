"""A rule is older than the verdict that it gives: asked of git, commit by commit."""
import json
import subprocess

import pytest
import yaml

from lib import claims

ROOT = claims.project_root()


def git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def rules_at(commit, paper):
    """{claim: digest of its rule} of a paper's ledger as of a commit."""
    text = git("show", f"{commit}:book/claims/{paper}.yaml")
    entries = yaml.load(text, Loader=yaml.CSafeLoader)["claims"] if text else []
    return {e["id"]: claims.rule_digest(e) for e in entries if "rule" in e}


def verdicts_at(commit):
    return json.loads(git("show", f"{commit}:book/verdicts.json") or "{}")


def judged_too_early(commit):
    """The claims that a commit settles anew although it also brings or changes their rule."""
    before, now, early = verdicts_at(f"{commit}^"), verdicts_at(commit), []
    for paper, entries in now.items():
        settled = [i for i, entry in entries.items() if entry[0] not in ("not-run", "cited")
                   and entry != before.get(paper, {}).get(i)]
        if settled:
            was, new = rules_at(f"{commit}^", paper), rules_at(commit, paper)
            early += [f"{paper}/{i}" for i in settled if was.get(i) != new.get(i)]
    return early


COMMITS = git("log", "-20", "--format=%H", "--", "book/verdicts.json").split()


@pytest.mark.skipif(not COMMITS, reason="no history: not a git clone, or a shallow one")
@pytest.mark.parametrize("commit", COMMITS)
def test_no_commit_settles_a_claim_whose_rule_it_brings(commit):
    if not git("rev-parse", "--verify", "--quiet", f"{commit}^"):
        pytest.skip("the first commit of this clone: its parent is not here")
    assert judged_too_early(commit) == []
