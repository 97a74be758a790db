"""Verdicts and tables of experiments/relu_revival.py on scale, of results with known numbers."""

import fixtures.make_results as made
import numpy as np
import pytest
from revival import cases, front, tables, verdicts, words
from revival.cells import TUNING_SEED
from revival.differences import differences
from revival.heads_table import replaceable

from normfree.heads import entropy_ceiling


@pytest.mark.parametrize("arm", ["gelu", "relu"])
def test_lost_runs_show_in_the_verdict_on_scale(arm: str) -> None:
    records = made.scaled(2.45, 2.44)
    gone = [made.make("B", r["arm"], r["lr"], r["seed"], None) if r["arm"].startswith(arm) else r for r in records]
    line = next(line for line in verdicts.scale(made.view_of(gone)) if "embeddings x 50" in line)
    assert "no seed of which both survived" in line
    assert f"{arm.upper().replace('RELU', 'ReLU')} 5 of 5 (48 to 100 %)" in line
    absent = [record for record in records if not record["arm"].startswith(arm)]
    line = next(line for line in verdicts.scale(made.view_of(absent)) if "embeddings x 50" in line)
    assert f"{arm.upper().replace('RELU', 'ReLU')}: not run" in line
    assert "0 of 5" in line
    line = next(line for line in verdicts.scale(made.view_of(records, lost=("gelu1",))) if "embeddings x 50" in line)
    assert "on rung A lost: ReLU 0 of 5 (0 to 52 %), GELU 1 of 5" in line
    assert line.startswith("Preliminary")  # four pairs are left of the change


def test_a_run_that_is_far_off_counts_and_is_named() -> None:
    """One that learned next to nothing and is not lost decides a mean: the difference without it stands beside."""
    records = made.scaled(2.45, 2.44)
    alike = next(line for line in verdicts.scale(made.view_of(records)) if "embeddings x 50" in line)
    assert "far off" not in alike
    stuck = next(r for r in records if r["arm"].startswith("relu") and r["seed"] == 5 and not r["tuning"])
    stuck["val_loss"] = 6.8
    view = made.view_of(records)
    line = next(line for line in verdicts.scale(view) if "embeddings x 50" in line)
    before = alike.partition("GELU is ")[2].partition(" (n")[0]
    assert "far off: ReLU, embeddings x 50's seed 5 at 6.800; without: " in line
    assert line.partition("without: ")[2].startswith(before.partition(" ±")[0])
    assert f"{before} (n = 5) nats" not in line
    change = alike.partition("a change of ")[2].partition(" ±")[0]
    assert f"(without what is far off {change[:6]}" in line
    assert "what is far off" not in alike
    assert "(seed 5: 6.8000)" in " ".join(tables.results(view, "B"))
    glance = next(row for row in front.at_a_glance(view) if row.startswith("| embeddings x 50"))
    assert "(seed 5: 6.800)" in glance


def test_scale_at_a_glance_has_the_published_rate_too() -> None:
    """Rung B has it on the tuning seed alone."""
    records = made.scaled(2.45, 2.44)
    for arm, losses in (("relu+embed50", (2.5, 2.6)), ("gelu+embed50", (2.6, 2.7))):
        records += [made.make("B", arm, lr, TUNING_SEED, x) for lr, x in zip((1e-3, 2e-3), losses, strict=True)]
    view = made.view_of(records)
    assert view.common_rate("A") == 2e-3
    columns, _, *rows = front.at_a_glance(view)[-10:-1]
    assert columns.endswith("at 2e-3; of seed 101, on the tokens that choose rates |")
    assert next(row for row in rows if row.startswith("| embeddings x 50")).endswith(" | \u22120.100 (seed 101) |")
    assert next(row for row in rows if row.startswith("| depth-scaled")).endswith(" | - |")
    line = next(line for line in verdicts.scale(view) if "embeddings x 50" in line)
    assert "At the common rate, 2e-3, seed 101 alone" in line
    assert line.endswith(": \u22120.100 instead of \u22120.200.")


def test_reported_seeds_at_the_published_rate_stand_in_for_the_tuning_seed() -> None:
    """Then the tokens are those that are reported, and what became of the difference is said as at own rates."""
    arms = {"relu+embed50": 2.5, "gelu+embed50": 2.51, "gelu": 2.7}
    records = made.scaled(2.45, 2.44)
    for arm, loss in arms.items():
        rung = "A" if arm == "gelu" else "B"
        records += [made.make(rung, arm, 2e-3, seed, loss + 0.001 * (seed % 2)) for seed in range(1, 6)]
    records += [made.make("B", f"{act}+embed50", 1e-3, TUNING_SEED, 2.5) for act in ("relu", "gelu")]
    view = made.view_of(records)
    row = next(row for row in front.at_a_glance(view) if row.startswith("| embeddings x 50"))
    assert row.endswith(" | \u22120.010 ± 0.000 (n = 5) |")
    line = next(line for line in verdicts.scale(view) if "embeddings x 50" in line)
    assert " At the common rate, 2e-3: \u22120.0100 ± 0.0000 (n = 5) nats, instead of " in line
    assert sum("common rate" in row for row in differences(view, "B")) == 1


def test_a_share_of_heads_is_given_without_what_is_far_off() -> None:
    """A run that learned nothing has heads too, and they say nothing of the others; nor has it any to replace."""
    records = made.scaled(2.45, 2.44)
    stuck = next(r for r in records if r["arm"].startswith("relu") and r["seed"] == 5)
    stuck["val_loss"], stuck["entropy"] = 6.8, [[0.0, 0.0], [0.0, 0.0]]
    for record in records:
        if record is not stuck:
            record["entropy"] = (np.full((2, 2), 0.9) * entropy_ceiling(128)).tolist()
    view = made.view_of(records)
    relu = view.own("B", "relu+embed50")
    assert cases.shares(relu, "overload") == "80.0 ± 55.5 (without seed 5: 100.0 ± 0.0)"
    assert cases.shares(relu[:4], "overload") == "100.0 ± 0.0"
    assert [r["seed"] for r in replaceable(relu)] == [1, 2, 3, 4]


def test_an_order_that_turns_round_is_not_a_percentage() -> None:
    line = next(line for line in verdicts.scale(made.view_of(made.scaled(2.3, 2.6))) if "embeddings x 50" in line)
    assert "the order turns round" in line
    assert "%" not in line.partition("the order turns round")[0].partition("instead of")[2]
    assert "contradicts" not in line  # the papers say nothing of other scales


def test_a_share_is_of_the_seeds_that_both_have() -> None:
    """Rung A's mean over other seeds says nothing of a change that is paired, nor its sign."""
    records = [r for r in made.scaled(2.51, 2.46) if r["seed"] < 3]
    view = made.view_of(records)
    line = next(line for line in verdicts.scale(view) if "embeddings x 50" in line)
    before = view.gap(*([r for r in view.own("A", arm) if r["seed"] < 3] for arm in ("relu", "gelu")))
    change = line.partition("a change of ")[2].partition(" ±")[0]
    gone = -100 * float(change) / before.mean
    assert f"instead of {words.interval(before)} on the same seeds of rung A" in line
    assert f"{gone:.0f} % of it is gone" in line


def test_a_change_that_is_not_shown_has_no_percentage() -> None:
    records = made.scaled(2.5, 2.4)
    for record in records:
        record["val_loss"] += 0.1 * (record["arm"].startswith("relu")) * (-1) ** record["seed"]
    line = next(line for line in verdicts.scale(made.view_of(records)) if "embeddings x 50" in line)
    assert ": no change is shown" in line
    assert "is gone" not in line
