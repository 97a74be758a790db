"""Verdicts and tables of experiments/relu_revival.py, of results with known numbers."""

from typing import Any

import fixtures.make_results as made
import numpy as np
import pytest
from revival import front, report, rungs, tables, verdicts
from revival.cells import TUNING_SEED, Cell
from revival.differences import differences
from revival.plan import plan
from revival.study import Results
from revival.tuning import between
from revival.view import View

from normfree.heads import entropy_ceiling


def everyone(arm: str) -> tuple[str, ...]:
    return tuple(f"{arm}{seed}" for seed in range(1, 6))


def test_other_rungs_have_verdicts_too() -> None:
    records = made.scaled(2.45, 2.44, variant="+embed22.627") + made.sloped("per_layer:0.1:nodecay", [0.3, -0.3])
    for seed in range(1, 6):
        for arm in ("gelu", "relu"):
            records.append(made.make("F", f"{arm}-finalnorm", 1e-3 if arm == "gelu" else 2e-3, seed, 2.6 + 0.1 * seed))
        records.append(made.make("D", "stopped:identity", 1e-3, seed, None))
        records.append(made.make("B", "ln+gelu+embed22.627", 2e-3, seed, 2.0 + 0.1 * seed))
    view = made.view_of(records)
    scale = " ".join(verdicts.scale(view))
    assert "90 % of it is gone, as a point estimate" in scale
    assert "a change of +0.0894 ± 0.0007 (n = 5)" in scale  # of ReLU - GELU, paired
    assert "90.0" not in scale
    assert "(paired: \u221250.0 ± 0.0 (n = 5) percentage points)" not in scale  # all heads were, none is
    assert "(paired: \u2212100.0 ± 0.0 (n = 5) percentage points)" in scale
    assert "Control: LayerNorm + GELU, embeddings x \u221ad, 52.4 million" in scale
    changed = verdicts.deviations(made.view_of(records, made.scaled(2.48, 2.39, variant="+depth")))
    assert "the loss changes by +0.1000 ± 0.0000" in " ".join(changed)
    depth = [line for line in changed if "(rung B, at its own best rate), 52.4 million" in line]
    assert len(depth) == 2
    assert "rate 1e-3: better: the loss changes by \u22120.0" in depth[1]  # ReLU, which rung A trained at 2e-3
    assert "lost 5 of 5 (48 to 100 %), 5 at steps 70 to 70" in verdicts.collapse(view)[0]
    assert "stops at its first bad step, which alone makes it count as lost" in verdicts.collapse(view)[0]
    at_the_end = {"lost": {"step": None, "why": "final validation loss 9 is not below the unigram entropy 7"}}
    kept_on = [made.make("D", "paper_nan:identity", 1e-3, seed, None, **at_the_end) for seed in (1, 2)]
    assert "lost 2 of 2 (16 to 100 %), 2 by the final loss; NaN" in verdicts.collapse(made.view_of(kept_on))[0]
    wasted = " ".join(verdicts.wasted(view))
    assert "One costs +0.01275 ± 0.00000 (n = 5)" in wasted  # GELU: all four heads


def test_the_sign_of_a_flip_is_that_of_the_losses() -> None:
    at_common = [made.make("A", "gelu", 2e-3, seed, 2.7 + 0.1 * seed) for seed in range(1, 6)]
    text = " ".join(verdicts.order(made.view_of(at_common)))
    assert "At the common rate, 2e-3: \u22120.2994 ± 0.0007 (n = 5), as published; lost: 0 of 5" in text
    assert "taking them out changes ReLU \u2212 GELU by \u22120.1994 ± 0.0007 (n = 5) nats" in text
    assert "advantage" not in text
    assert "Published: they do, the same direction." in text


def test_one_seed_says_who_is_ahead_and_no_more() -> None:
    """It has no interval: "not told apart" would sound as if much had been measured."""
    alone = [r for r in made.rung_a() if r["tuning"] or r["seed"] == 1]
    view = View("short", "f00d", tuple(alone))
    free, normed, flip = verdicts.order(view)[:3]
    assert "ReLU is ahead in the one seed that there is: \u22120.0990 (n = 1)" in free
    assert "GELU is ahead in the one seed that there is: +0.1000 (n = 1)" in normed
    assert "which these runs neither show nor contradict" in free
    assert "one seed, no interval" in flip
    heads = verdicts.overloaded(view)[0]
    assert "Preliminary: GELU's overload in the one seed: +100.0 (n = 1) percentage points" in heads
    assert heads.count("(one seed, no interval)") == 2
    assert "in the one seed that there is: with uniform attention" in " ".join(verdicts.wasted(view))
    assert not any("told apart" in line for line in (free, normed, flip, heads))


def test_a_threshold_that_turns_the_order_of_overload_is_said() -> None:
    """Overloaded heads of one arm may lie just above three quarters, and of the other at the ceiling."""
    records = made.rung_a()
    for record in records:
        if not record["tuning"] and record["arm"] in ("gelu", "relu"):
            levels = [0.8, 0.8, 0.8, 0.5] if record["arm"] == "gelu" else [0.95, 0.95, 0.5, 0.5]
            record["entropy"] = (np.array(levels).reshape(2, 2) * entropy_ceiling(128)).tolist()
    text = verdicts.overloaded(View("short", "f00d", tuple(records)))[0]
    assert (
        "ReLU \u2212 GELU is \u221225.0 ± 0.0 (n = 5) percentage points, as in the paper; **at 0.9 of the ceiling it"
        in text
    )
    assert "the other way round**: +50.0 ± 0.0" in text
    assert "other way round" not in verdicts.overloaded(made.view_of([]))[0]


def test_what_warm_up_and_decay_a_verdict_is_of_is_said() -> None:
    records = [r | {"steps": 800, "words": ["optim.warmup_steps=200"]} for r in made.rung_a()]
    line = verdicts.order(View("short", "f00d", tuple(records)))[0]
    assert "rates 2e-3 and 1e-3, warm-up 200 of 800 steps; lost" in line
    assert ". Published: \u22120.090" in line
    cut = [r | {"words": [*r["words"], "optim.lr_final=0.947"]} for r in records]
    line = verdicts.order(View("short", "f00d", tuple(cut)))[0]
    assert "Published, at the end of its decay, where these runs have hardly begun it: \u22120.090" in line


def test_only_arms_that_were_run_are_counted_as_not_lost() -> None:
    three = [r for r in made.rung_a() if r["arm"] != "ln+gelu" or r["tuning"]]
    lines = verdicts.order(View("short", "f00d", tuple(three)))
    assert "lost: LayerNorm + ReLU 0 of 5 (0 to 52 %), GELU 0 of 5 (0 to 52 %), ReLU 0 of 5 (0 to 52 %)." in lines[2]
    assert "each" not in lines[2]


def test_a_lost_run_says_what_happened_and_not_what_to_try() -> None:
    lost = {"step": 70, "why": "step 70: the loss is NaN. What to try: a lower optim.lr.\nmore", "account": None}
    records = [made.make("A", "relu", 4e-3, TUNING_SEED, None, lost=lost)]
    assert tables.lost_runs(made.view_of(records), "A")[-1].endswith("| 70 | step 70: the loss is NaN. |")


@pytest.mark.parametrize(("loss", "fails"), [(None, True), (6.2, True), (2.9, False)])
def test_the_next_rate_up_is_named_where_it_fails(loss: float | None, fails: bool) -> None:
    at_4e3 = made.make("A", "relu", 4e-3, TUNING_SEED, loss)
    records = [at_4e3 if r["name"] == at_4e3["name"] else r for r in made.rung_a()]
    line = verdicts.order(View("short", "f00d", tuple(records)))[0]
    assert ("at the next rate up seed 101 fails (ReLU at 4e-3)" in line) == fails
    assert "seeds differ: ReLU's by 0.40" in line


def test_an_optimum_at_the_end_of_its_ladder_is_said() -> None:
    records = [r for r in made.rung_a() if not (r["arm"] == "gelu" and r["tuning"] and r["lr"] < 1e-3)]
    view = View("short", "f00d", tuple(records))
    lines = verdicts.order(view)
    assert "the optimum of GELU is at the end of its ladder" in lines[0]
    assert not any("end of its ladder" in line for line in lines[1:3])  # with norms; the flip
    assert "(at the end of the ladder)" in " ".join(tables.results(view, "A"))


def test_slopes_are_told_apart_one_by_one() -> None:
    opposite = [0.3, -0.3]  # whose mean is 0
    records = made.sloped("per_layer:0.1:nodecay", opposite) + made.sloped("per_layer:0.1:decay", [0.01, 0.01])
    _, *lines = verdicts.slopes(made.view_of(records))
    assert "of 2 slopes 2 told apart from 0 and 2 from the start" in lines[0]
    assert "mean |slope| is 0.3000" in lines[0]
    assert "slopes end larger without decay" in lines[1]
    one = verdicts.slopes(made.view_of(made.sloped("per_layer:0.1:nodecay", opposite, seeds=1)))
    assert one[0].startswith("Preliminary")
    assert "one seed tells no slope apart" in one[0]
    moved = made.sloped("global:0.1:nodecay", [0.3])
    moved[0]["lr"] = 1e-3  # rung A changed its mind on the way: the last rate counts
    assert "not run" not in verdicts.slopes(made.view_of(moved))[0]


def test_survivors_with_numbers_that_are_not_finite() -> None:
    records = made.rung_a()
    for record in (r for r in records if r["arm"] == "gelu"):
        record["pre_activation_std"] = [["NaN", 0.02]] * 3
        record["losses"]["25"] = "NaN"
    view = View("short", "f00d", tuple(records))
    assert "not finite 0.02" in " ".join(tables.mechanism(view, "A"))
    text = " ".join(verdicts.order(view) + differences(view, "A"))
    assert "nan" not in text
    assert "of the run none, " in text


def test_runs_of_other_lengths_are_not_paired() -> None:
    records = made.rung_a()
    for record in records:
        if record["arm"] == "relu" and record["seed"] in (2, 3):
            record["planned_tokens"] *= 2
        if record["arm"] == "relu" and record["seed"] == 4:
            record["val_tokens"] //= 2
    view = View("short", "f00d", tuple(records))
    line = verdicts.order(view)[0]
    assert "(n = 2)" in line
    assert "not paired, as their runs differ in planned or evaluated tokens: seeds 2, 3, 4" in line
    assert "not alike, so not paired: 2, 3, 4" in differences(view, "A")[2]


def test_lost_arms_keep_their_rows() -> None:
    view = made.view_of(lost=everyone("gelu"))
    for table in (tables.mechanism(view, "A"), tables.heads(view, "A")):
        rows = [row for row in table if row.startswith("| GELU |")]
        assert len(rows) == 1
        assert "5 of 5 (48 to 100 %)" in rows[0]
    assert "GELU: no run survived, ReLU 0.0 ± 0.0 %" in verdicts.overloaded(view)[0]
    text = " ".join(verdicts.order(view) + verdicts.overloaded(view) + verdicts.wasted(view))
    assert "no seed of which all four arms survived" in text
    assert "changes by" not in text


def test_a_contradiction_is_said_of_overload_and_flip_too() -> None:
    records = made.rung_a()
    for record in records:
        if record["arm"] in ("gelu", "ln+gelu") and not record["tuning"]:
            level = 0.5 if record["arm"] == "gelu" else 0.9
            other = made.make("A", record["arm"], record["lr"], record["seed"], 2.0, level)
            record["entropy"] = other["entropy"]
        if record["arm"] == "relu" and not record["tuning"]:
            record["val_loss"] += 0.3
    view = View("short", "f00d", tuple(records))
    line, *_, last = verdicts.overloaded(view)
    assert "GELU's overload is not there" in line
    assert "**This contradicts the paper**" in line
    assert "LayerNorm + GELU 8 %, LayerNorm + ReLU 3 %, GELU 58 %, ReLU 23 %" in last
    lines = verdicts.order(view)
    flip = next(line for line in lines if "Norms do not turn" in line)
    assert "**At rates tuned for each arm this contradicts the paper**" in flip
    assert "**the two splits disagree in sign**" in lines[0]  # val_package was left as it was


def test_every_rung_has_its_differences() -> None:
    records = (
        made.scaled(2.45, 2.44)
        + made.sloped("per_layer:0.1:nodecay", [0.1])
        + made.sloped("per_layer:0.1:decay", [0.0])
    )
    records += [made.make("F", "gelu+fp16", 1e-3, seed, 2.6 + 0.1 * seed) for seed in range(1, 6)]
    view = made.view_of(records)
    for rung, rows in (("A", 6), ("B", 5), ("E", 3), ("F", 1)):
        table = differences(view, rung)[2:]
        assert len(table) == rows, rung
        assert all("5: " in row and "52.4 million; 60.0 million; 0.87" in row for row in table)


def test_a_glance_has_the_differences_and_the_common_rate() -> None:
    more = [made.make("A", arm, 2e-3, seed, 2.7) for arm in ("gelu", "ln+gelu") for seed in range(1, 6)]
    table = front.at_a_glance(made.view_of(made.rung_a() + more))
    assert "loss at 2e-3" in table[0]
    assert table[0].count("|") == table[2].count("|") == table[-2].count("|")
    assert "(published: \u22120.090) |  |  | \u22120.099 ± 0.001 (n = 5)" in table[-3]
    assert "| lost at 2e-3 | loss at 2e-3 |" in table[0]
    assert front.at_a_glance(View("short", "none", ())) == []


BETWEEN = {"relu": (2.41, 2.3), "gelu": (2.6, 2.6), "ln+relu": (2.4, 2.4), "ln+gelu": (2.4, 2.4)}


def refined(*arms: str) -> list[dict[str, Any]]:
    """Rung A of `made`, and what rung A2 would find of these arms: ReLU is better at 2.8e-3, the others stay."""
    found = made.rung_a()
    for arm in arms:
        rates = between(1e-3 if arm == "gelu" else 2e-3)
        found += [made.make("A2", arm, lr, TUNING_SEED, x) for lr, x in zip(rates, BETWEEN[arm], strict=True)]
    return found


def test_rates_between_the_ladder_count_with_those_of_the_ladder() -> None:
    view = View("short", "f00d", tuple(refined(*BETWEEN)))
    assert view.own_rate("A2", "relu") == 2.8e-3
    assert view.own_rate("A2", "gelu") == 1e-3
    assert view.is_settled("A2", "relu")
    assert view.own("A2", "gelu") == view.own("A", "gelu")
    assert view.own_rate("A", "relu") == 2e-3  # what was fixed before stays
    assert view.common_rate("A2") is None
    better = [made.make("A2", "relu", 2.8e-3, seed, 2.2 + 0.1 * seed) for seed in range(1, 6)]
    view = View("short", "f00d", (*view.records, *better))
    (line,) = [text for text in verdicts.order(view) if "Without block norms" in text and "steps of \u221a2" in text]
    assert "(added after rung A was seen)" in line
    assert "\u22120.3000 ± 0.0000 (n = 5) nats on val" in line
    assert "rates 2.8e-3 and 1e-3" in line
    assert "common rate" not in line
    assert len([text for text in differences(view, "A2") if text.startswith("| ReLU \u2212 GELU |")]) == 1
    told = [text for text in verdicts.wasted(view) if "steps of \u221a2" in text]
    assert len(told) == 1  # of the others rung A says it
    assert told[0].startswith("ReLU (")


def test_nothing_is_said_of_rates_between_before_all_arms_have_them() -> None:
    view = View("short", "f00d", tuple(refined("relu", "gelu")))
    assert view.own("A2", "relu") == []
    assert [row.split(" | ")[2] for row in tables.results(view, "A2")[2:]] == ["not run"] * 2
    assert not any("steps of" in line for line in front.at_a_glance(view))


@pytest.mark.parametrize("named", [True, False])
def test_rates_between_change_nothing_of_what_was_fixed_before(named: bool) -> None:
    """Of the same settings a result is the same, whatever its rung: by its key alone rung A would move its rate."""
    found = [r | {"fingerprint": "f00d"} for r in refined(*BETWEEN)]
    for record in found:
        cell = Cell(record["rung"], rungs.FREE[record["arm"]], rungs.SHORT_PYTHIA, record["lr"], record["seed"])
        record["key"] = cell.key("f00d")
    results = report.Named(View("short", "f00d", tuple(found))) if named else Results(found, "f00d")
    wanted = plan("short", results)
    assert {cell.name for cell in wanted.cells if cell.rung == "A2"} == {
        f"A2/relu/lr2.8e-3/s{seed}" for seed in range(1, 6)
    }
    assert {cell.name for cell in wanted.cells if cell.rung == "A"} == {f"A/gelu/lr2e-3/s{s}" for s in range(1, 6)}
    assert {cell.lr for cell in wanted.cells if cell.rung == "G"} == {1e-3, 2e-3}
    assert not any(step.rung == "A2" for step in wanted.waiting)


NOT_TURNED = "Norms do not turn the order round as published"


@pytest.mark.parametrize(
    ("free", "normed", "verdict", "change", "agreement"),
    [
        (-0.1, 0.1, "Norms turn the order round", "with the published sign", "they do, the same direction."),
        (0.1, -0.1, "Norms turn the order round", "against the published sign", "this contradicts the paper**"),
        (-0.3, -0.1, "Norms do not turn the order round", "with the published sign", "this contradicts the paper**"),
        (-0.3, 0.0, "That norms turn the order round is not shown", "with the published sign", "neither show nor"),
        (
            0.3,
            0.0,
            f"{NOT_TURNED}: GELU is ahead without them",
            "against the published sign",
            "this contradicts the paper**",
        ),
        (
            0.0,
            -0.3,
            f"{NOT_TURNED}: ReLU is ahead with them",
            "against the published sign",
            "this contradicts the paper**",
        ),
    ],
)
def test_a_flip_is_judged_by_both_signs(free: float, normed: float, verdict: str, change: str, agreement: str) -> None:
    """`free`, `normed`: ReLU - GELU without and with norms; the same at the rates of each arm and at the common one."""
    losses = {"gelu": 2.5, "relu": 2.5 + free, "ln+gelu": 2.0, "ln+relu": 2.0 + normed}
    found = []
    for arm, loss in losses.items():
        for lr in (2e-3, 4e-3)[: 1 + (arm == "gelu")]:
            noise = {seed: 0.1 * seed + 0.001 * (seed - 3) * ("relu" in arm) for seed in range(1, 6)}
            found += [made.make("A", arm, lr, seed, loss + more) for seed, more in noise.items()]
        best = 4e-3 if arm == "gelu" else 2e-3
        for lr in (1e-3, 2e-3, 4e-3, 8e-3):
            near = 0.001 if lr == 2e-3 else 0.5  # the common rate is 2e-3
            found.append(made.make("A", arm, lr, TUNING_SEED, 2.0 if lr == best else 2.0 + near))
    (line,) = [text for text in verdicts.order(View("short", "f00d", tuple(found))) if "order round" in text]
    own, common = line.split(" At the common rate, 2e-3: ")
    assert own.startswith(f"{verdict} (")
    assert change in own
    assert agreement in own
    assert common.startswith(verdict[0].lower() + verdict[1:])
    assert change in common
    assert ("as in the paper" in common) == (free < 0 < normed)
    assert ("contradicts the paper" in common) == ("contradicts" in agreement)
