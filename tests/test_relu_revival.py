"""experiments/relu_revival.py: cells are valid and unique, results are kept and trusted, and lost runs show."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fixtures.make_results as made
import numpy as np
import pytest
from revival import cells, place, process, report, rungs, study, tuning
from revival import records as store
from revival.place import Place
from revival.plan import plan
from revival.statistics import binomial_interval, difference, paired
from revival.tuning import REFINED
from revival.view import View

from normfree.config import DataConfig, OptimConfig
from normfree.errors import UserError

# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 5, 0, 0.521824),
        (1, 5, 0.005051, 0.716418),
        (2, 5, 0.052745, 0.853367),
        (5, 5, 0.478176, 1),
        (3, 20, 0.032071, 0.378927),
    ],
)
def test_the_exact_binomial_interval_has_known_values(k: int, n: int, low: float, high: float) -> None:
    assert binomial_interval(k, n) == pytest.approx((low, high), abs=1e-6)


def test_paired_differences_and_their_interval() -> None:
    found = paired({1: 3.0, 2: 5.0, 3: 7.0, 9: 1.0}, {1: 2.0, 2: 3.0, 3: 4.0, 8: 0.0})
    assert found is not None
    assert found.points == {1: 1.0, 2: 2.0, 3: 3.0}
    assert (found.mean, found.half) == pytest.approx((2.0, 4.3027 / math.sqrt(3)))
    assert (found.sign, found.preliminary) == (0, True)  # 2 ± 2.48
    assert difference(dict.fromkeys(range(5), -1.0)).sign == -1
    assert difference({1: 1.0}).sign == 0
    assert paired({1: 1.0}, {2: 1.0}) is None


# -- rates -------------------------------------------------------------------------------------------------------------


def test_a_ladder_grows_until_its_optimum_is_interior() -> None:
    ladder = (1e-3, 2e-3, 4e-3)
    assert tuning.rates_to_try(ladder, {2e-3: 3.0}) == [1e-3, 4e-3]
    assert tuning.rates_to_try(ladder, {1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5}) == []
    assert tuning.rates_to_try(ladder, {1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.5}) == [8e-3]
    assert tuning.rates_to_try(ladder, {1e-3: 1.0, 2e-3: 2.0, 4e-3: 2.5}) == [5e-4]
    assert tuning.rates_to_try(ladder, {1e-3: 1.0, 2e-3: math.inf, 4e-3: math.inf, 5e-4: 1.1}) == []
    assert tuning.rates_to_try(ladder, dict.fromkeys(ladder, math.inf)) == [5e-4]  # all lost: lower
    assert not tuning.is_interior({1e-3: 1.0, 2e-3: math.inf})


def test_a_ladder_ends_somewhere() -> None:
    found = {1e-3: 9.0, 2e-3: 8.0}
    while rates := tuning.rates_to_try((1e-3, 2e-3), found):
        found |= {rates[0]: 8.0 - len(found)}  # ever better
    assert len(found) == 2 + tuning.MOST_ADDED


def test_the_common_rate_is_one_that_no_arm_lost() -> None:
    arms = [{1e-3: 2.0, 2e-3: 1.0, 8e-3: 0.1}, {1e-3: 2.0, 2e-3: math.inf}]
    assert tuning.common_rate(arms) == 1e-3
    assert tuning.common_rate([{1e-3: math.inf}]) is None


# -- cells -------------------------------------------------------------------------------------------------------------


def test_every_cell_is_valid_and_unique() -> None:
    for scale in rungs.LADDER:
        named = (
            report.Named(View("short", "f00d", tuple(made.rung_a()))) if scale == "short" else study.Results([], None)
        )
        named.seeds = (1,)
        found = plan(scale, named)
        assert found.cells
        assert not any("rung A" in step.why for step in found.waiting)
        names = [cell.name for cell in found.cells]
        assert len(set(names)) == len(names)
        arms: dict[str, set[tuple[str, str]]] = {}
        for cell in found.cells:
            if cell.rung in REFINED:  # which has the arms of another rung
                continue
            arms.setdefault(replace(cell, lr=1e-3, seed=1).settings, set()).add((cell.rung, cell.arm.name))
        assert [shared for shared in arms.values() if len(shared) > 1] == []  # a result is never of two arms
        for cell in found.cells:
            config = cells.config_of(cell)  # the real validation
            assert (config.train.max_steps, config.seed) == (cell.recipe.steps, cell.seed)
            assert config.train.batch_size * (config.data.seq_len or 0) == cell.recipe.tokens_a_step
            assert config.train.eval_tokens == cell.recipe.tuning_tokens


def test_the_words_of_a_cell_are_its_configuration() -> None:
    """A cell composes its recipe once and sets the rest itself: the same as what run.py makes of all its words."""
    named = report.Named(View("short", "f00d", tuple(made.rung_a())))
    chosen = plan("short", named, ["C/faithful_prefix:ln+relu/*/s1", "E/global:0.25:nodecay/*/s1"])
    for cell in {cell.arm.name: cell for cell in chosen.cells}.values():
        whole = cells.check_overrides(list(cell.words), multirun=False)
        assert whole is not None
        config = cells.config_of(cell)
        config.name = whole.name  # made of what was typed; it changes nothing
        assert cells.resolve(whole) == config
        assert cells.weights_hash(config) == cell.settings


def test_the_prefix_is_the_published_schedule() -> None:
    published = OptimConfig(lr=1e-3, warmup_steps=1613, schedule="linear", lr_final=1e-4)
    found = plan("short", study.Results([], None), ["C/faithful_prefix:gelu/*/s1"]).cells
    ours = cells.config_of(found[0]).optim
    steps = cells.PREFIX_STEPS
    for step in range(steps):
        expected = cells.learning_rate(step, cells.PUBLISHED_STEPS, published)
        assert cells.learning_rate(step, steps, ours) == pytest.approx(expected, rel=1e-12)
    tuned = plan("short", study.Results([], None), ["C/tuned*"]).cells[0]
    assert tuned.recipe.tokens == rungs.SHORT_PYTHIA.tokens == 52_428_800  # the sizes compare at one length
    assert cells.config_of(tuned).optim.warmup_steps == cells.SHORT_WARMUP


def test_longer_sequences_are_read_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published recipe at T = 256: half the steps, half the warm-up, and a text cut into chunks of 256."""
    found = plan("full", study.Results([], None, (1,)), ["A", "G"]).cells
    assert {cell.recipe.tokens for cell in found} == {32260 * 512 * 128}
    optim = [cells.config_of(cell).optim.warmup_steps for cell in found]
    assert optim == [1613] * 4 + [806] * 4

    def prepare(data: DataConfig, say: object) -> SimpleNamespace:
        return SimpleNamespace(fingerprint=f"f00d{data.seq_len}")

    monkeypatch.setattr(place, "prepare", prepare)
    where = place.find("full", None, found)
    tasks = [process.task_of(cell, where) for cell in found]
    assert [task["place"] for task in tasks] == [["data.fingerprint=f00d128"]] * 4 + [["data.fingerprint=f00d256"]] * 4
    results = study.Results([], where.fingerprint, (1,), where.by_length)
    assert [task["key"] for task in tasks] == [cell.key(f"f00d{128 * (1 + (cell.rung == 'G'))}") for cell in found]
    assert [task["key"] for task in tasks] == [results.key(cell) for cell in found]


def test_scale_is_looked_at_where_rates_are_equal_too() -> None:
    """At rates of its own an arm that may take a higher one is ahead by that; rung A's common rate takes it out."""
    named = report.Named(View("short", "f00d", tuple(made.rung_a())))
    found = [cell for cell in plan("short", named, ["B"]).cells if not cell.tuning]
    assert {cell.lr for cell in found} == {2e-3}
    assert {cell.arm.name for cell in found} == {
        *("gelu+embed22.627", "gelu+embed50", "gelu+beta10", "gelu+beta60", "relu+embed22.627", "relu+embed50")
    }
    assert len(found) == 6 * 5


def test_the_longer_warm_up_is_all_that_rung_a3_changes() -> None:
    named = report.Named(View("short", "f00d", tuple(made.rung_a())))
    cell = next(c for c in plan("short", named, ["A3/warmup:relu"]).cells if c.lr == 2e-3)
    ours, theirs = cells.config_of(cell), cells.config_of(rungs.base("relu").cell(2e-3, cell.seed))
    assert cells.LONG_WARMUP / ours.train.max_steps == cells.PUBLISHED_WARMUP / cells.PREFIX_STEPS
    assert ours.optim.warmup_steps == cells.LONG_WARMUP != theirs.optim.warmup_steps
    ours.optim.warmup_steps = theirs.optim.warmup_steps
    assert ours == theirs


def test_slopes_are_decayed_by_the_published_total() -> None:
    ours = OptimConfig(lr=2e-3, warmup_steps=200, schedule="linear", lr_final=1e-4)
    total = cells.slope_decay(ours, 800) * sum(cells.learning_rate(step, 800, ours) for step in range(800))
    assert total == pytest.approx(1.61, abs=0.01)  # facts of the authors' code: the sum of rates is about 16.1


def test_embeddings_start_with_the_rms_that_their_scale_undoes() -> None:
    from normfree.model import Transformer, init_weights

    config = cells.config_of(rungs.base("gelu").cell(1e-3, 1)).model
    config.n_layer, config.vocab_size = 1, 4096
    model = Transformer(config)
    init_weights(model, 1)
    rms = float(model.wte.weight.detach().square().mean().sqrt())
    assert rms * rungs.EMBED_SCALES[1] == pytest.approx(1, abs=0.01)


# -- what is next ------------------------------------------------------------------------------------------------------


def test_rates_come_first_then_seeds_then_the_common_rate() -> None:
    records = made.rung_a()
    tuned = [record for record in records if record["tuning"]]
    first = plan("short", report.Named(View("short", "f00d", ())), ["A"])
    assert len(first.cells) == 4 * 5
    assert all(cell.tuning for cell in first.cells)
    second = plan("short", report.Named(View("short", "f00d", tuple(tuned))), ["A"])
    own, common = second.cells[:20], second.cells[20:]
    assert [cell.seed for cell in own] == [seed for seed in (1, 2, 3, 4, 5) for _ in range(4)]
    assert {(cell.arm.name, cell.lr) for cell in own} == {(a, 1e-3 if a == "gelu" else 2e-3) for a in made.LOSSES}
    assert {(cell.arm.name, cell.lr) for cell in common} == {("gelu", 2e-3)}  # the others' own
    third = plan("short", report.Named(View("short", "f00d", tuple(records))), ["A"])
    assert (third.cells, len(third.done)) == (common, 20 + 20)  # runs that chose rates are done too


def test_a_result_counts_for_its_settings_seed_and_corpus_only(tmp_path: Path) -> None:
    cell = rungs.smoke_cells()[0]
    known = {"key": cell.key("f00d"), "tuning": False, "lr": cell.lr}
    for fingerprint, seeds, n in (("f00d", (1,), 3), ("beef", (1,), 4), ("f00d", (2,), 4)):
        assert len(plan("smoke", study.Results([known], fingerprint, seeds)).cells) == n
    for name in ("tuning_tokens", "report_tokens", "head_sequences"):  # what a result says of the same weights
        assert replace(cell, recipe=replace(cell.recipe, **{name: 64})).key("f00d") != known["key"]
    for name in cells.MEASURING:
        other = replace(cell, recipe=replace(cell.recipe, keys=cell.recipe.keys | {name: 4}))
        assert (other.settings, other.key("f00d") == known["key"]) == (cell.settings, False)
    assert plan("smoke", study.Results([], None, (1,)), ["A/ln*"]).cells[0].name.startswith("A/ln+gelu/")
    path = store.path_of(tmp_path, "smoke", "A")
    path.parent.mkdir()
    path.write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is no result"):
        store.read(tmp_path, "smoke")


# -- a real cell -------------------------------------------------------------------------------------------------------


def perform(tmp_path: Path, text_folder: Path, *words: str) -> dict[str, Any]:
    """A cell of scale smoke on a little text, in this process: what the child process does."""
    from revival.cell import perform

    where = Place((f"data.path={text_folder}", "data.source=files", "model.n_layer=2", *words), "f00d")
    task = process.task_of(rungs.smoke_cells()[3], where) | {"tuning_tokens": 1024, "report_tokens": 1024}
    return perform(task, tmp_path / "runs", keep=False)


def fault(step: int) -> str:
    return f"debug.inject={{step:{step},module:blocks.1.mlp.fc,phase:forward,value:nan}}"


def test_a_cell_is_trained_evaluated_and_kept(tmp_path: Path, text_folder: Path) -> None:
    """With a bad step at its end, which is left out."""
    record = perform(tmp_path, text_folder, "train.eval_tokens=1024", fault(19))
    store.append(store.path_of(tmp_path, "smoke", "A"), record)
    (kept,) = store.read(tmp_path, "smoke")
    assert (kept["name"], kept["status"]) == ("A/relu/lr5e-3/s1", "finished")
    assert str(tmp_path) not in json.dumps(kept)
    assert kept["val_loss"] < kept["unigram_entropy"]
    assert kept["tuning_loss"] == kept["losses"]["100"] < kept["losses"]["25"]
    assert kept["bad_steps"] == 1
    assert len(kept["entropy"]) == len(kept["heads"]["uniform"]) == 2
    clock = kept["clock"]
    assert sum(clock.values()) == pytest.approx(kept["seconds"], abs=0.3)
    assert min(clock.values()) >= 0
    assert 0 < clock["first_steps"] + clock["training"] < kept["seconds"]
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_that_knows_less_than_frequencies_is_lost(tmp_path: Path, text_folder: Path) -> None:
    words = ("train.max_steps=2", "optim.warmup_steps=0", "train.eval_every=1", "train.eval_tokens=1024")
    record = perform(tmp_path, text_folder, *words)
    assert record["status"] == "lost"
    assert "is not below the unigram entropy" in record["lost"]["why"]


def test_a_run_that_diverges_is_lost_where_it_did(tmp_path: Path, text_folder: Path) -> None:
    record = perform(tmp_path, text_folder, "train.eval_tokens=1024", "nan_policy=raise", fault(3))
    assert (record["status"], record["lost"]["step"]) == ("lost", 3)
    assert "blocks.1.mlp.fc" in record["lost"]["account"]
    assert str(tmp_path) not in json.dumps(store.plain(record))
    assert record["losses"]["100"] is None
    assert record["bad_steps"] == 1


def test_weights_that_are_lost_are_a_result(tmp_path: Path, text_folder: Path) -> None:
    """A NaN in the last step but one, gone on from, with too few passes of the probe left for ten in a row."""
    record = perform(tmp_path, text_folder, "train.eval_tokens=1024", "nan_policy=log", fault(18))
    assert (record["status"], record["bad_steps"]) == ("lost", 2)
    assert record["lost"]["why"].startswith("final validation loss is not finite")


def test_uniform_attention_is_the_mean_of_values(tmp_path: Path) -> None:
    """Replacing a head by uniform attention, against a model whose keys of that head are zero."""
    import torch
    from revival.heads import cost_of_heads

    from normfree.config import ModelConfig
    from normfree.model import Transformer, init_weights
    from normfree.training.evaluation import evaluate_loss

    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=32, norm="none")
    model = Transformer(config)
    init_weights(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    rows = np.random.default_rng(0).integers(0, 32, (6, 13))
    found = cost_of_heads(model, rows, rows, np.array([[9.0, 0.0], [9.0, 0.0]]))
    before = evaluate_loss(model, rows, 64, "fp32")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[16 + 8 : 16 + 16] = 0  # keys of head 1: every score is 0
    assert found["uniform"][1, 1] == pytest.approx(evaluate_loss(model, rows, 64, "fp32") - before, abs=1e-5)
    assert abs(found["uniform"][1, 1]) > 1e-4
    assert found["overloaded"] == 2
    after = np.array([evaluate_loss(model, row[None], 1, "fp32") for row in rows])
    model.load_state_dict(weights)
    changes = after - [evaluate_loss(model, row[None], 1, "fp32") for row in rows]
    assert found["uniform_error"][1, 1] == pytest.approx(np.std(changes, ddof=1) / len(rows) ** 0.5, rel=1e-3)
    assert found["all_uniform_error"] > 0
    assert found["all_uniform"] != pytest.approx(found["uniform"][0, 0], abs=1e-6)


@pytest.mark.parametrize("model", ["gpt2", "pythia"])
def test_what_lies_below_a_head_is_computed_once_and_is_the_same(model: str) -> None:
    import torch
    from revival import heads

    from normfree.config import ModelConfig
    from normfree.model import Transformer, init_weights
    from normfree.training.evaluation import evaluate_loss

    shape = {"n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 32, "norm": "none"}
    family = {"positions": "rotary", "parallel_residual": True} if model == "pythia" else {}
    transformer = Transformer(ModelConfig(**shape, **family))
    init_weights(transformer, 1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(4)
    rows = np.random.default_rng(0).integers(0, 32, (heads.BATCH + 6, 13))
    pattern = heads.uniform_attention(12, torch.device("cpu")).expand(3, 2, 12, 12)
    found = heads.with_one_replaced(transformer, rows, pattern)
    plain = evaluate_loss(transformer, rows, heads.BATCH, "fp32")
    for layer, head in np.ndindex(3, 2):
        with heads.replaced(transformer, [(layer, head)], pattern):
            whole = evaluate_loss(transformer, rows, heads.BATCH, "fp32")
        assert found[layer, head].mean() == pytest.approx(whole, rel=1e-6)
        assert abs(whole - plain) > 1e-5
