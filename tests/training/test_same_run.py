"""Which run a command means: its directory, what keeps another one out of it, and the weights that it begins with."""

import shutil

import pytest

from normfree.cli import run_config
from normfree.data.tokenizer import load_tokenizer
from normfree.errors import EXIT_CHECKPOINT, EXIT_DIRECTORY, UserError
from normfree.identity import weights_hash
from normfree.training.session import alone
from plotting.seeds import group


def test_the_directory_name_follows_what_can_change_the_weights(tiny):
    base = weights_hash(tiny())
    assert weights_hash(tiny(**{"optim.lr": 2e-2})) != base
    assert weights_hash(tiny(**{"data.seq_len": 8})) != base
    for name, value in {"seed": 5, "log.every": 3, "train.eval_every": 1, "train.device": "cpu"}.items():
        assert weights_hash(tiny(**{name: value})) == base, name


@pytest.mark.parametrize(("policy", "matters"), [("raise", False), ("skip", False), ("rollback", True)])
def test_how_often_there_is_a_checkpoint_matters_where_a_run_may_go_back_to_one(tiny, policy, matters):
    often, seldom = (weights_hash(tiny(nan_policy=policy, **{"train.checkpoint_every": n})) for n in (5, 10))
    assert (often != seldom) == matters


def test_keys_that_name_nothing_keep_no_run_from_being_the_same(train_tiny):
    """`rollback.*` under nan_policy=raise is in no hash; the directory's own check asked for it all the same."""
    train_tiny()
    again = train_tiny(**{"rollback.steps": 5, "debug.inject.value": "inf"})
    assert again.status["last_step"] == 6
    other = {"nan_policy": "rollback", "train.checkpoint_every": 2}
    train_tiny("back", **other)
    with pytest.raises(UserError, match="train.checkpoint_every: 3, not 2"):
        train_tiny("back", **other | {"train.checkpoint_every": 3})


def test_a_finished_run_without_checkpoints_cannot_be_made_longer(train_tiny):
    """It began anew, over the record that was there."""
    run = train_tiny()
    shutil.rmtree(run.directory / "checkpoints")
    before = (run.directory / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="has no checkpoint any more") as caught:
        train_tiny(resume=str(run.directory), **{"train.max_steps": 9})
    assert caught.value.exit_code == EXIT_CHECKPOINT
    assert (run.directory / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused_and_nothing_is_touched(train_tiny, tiny, tmp_path):
    run = train_tiny()
    before = {p: p.stat().st_mtime_ns for p in run.directory.rglob("*")}
    with pytest.raises(UserError, match=r"optim.lr: 0.5, not 0.01") as caught:
        run_config(tiny(run_dir=str(tmp_path / "run"), **{"optim.lr": 0.5}))
    assert caught.value.exit_code == EXIT_DIRECTORY
    assert {p: p.stat().st_mtime_ns for p in run.directory.rglob("*")} == before


def test_a_folder_of_other_files_is_refused(tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="no run"):
        run_config(tiny(run_dir=str(tmp_path / "mine")))
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_one_process_a_directory(tiny, tmp_path):
    with alone(tmp_path / "run"), pytest.raises(UserError, match="in use"):
        run_config(tiny(run_dir=str(tmp_path / "run")))


def test_a_run_s_tokenizer_can_be_chosen_by_its_folder(train_tiny):
    """So other text is trained on from its weights, with a tokenizer that was trained, too."""
    source = train_tiny("source", **{"data.tokenizer": "trained", "data.vocab_size": 300})
    folder = source.directory / "tokenizer"
    again = train_tiny("again", init_from=str(source.directory), **{"data.tokenizer": str(folder)})
    assert load_tokenizer(again.directory / "tokenizer").fingerprint == load_tokenizer(folder).fingerprint
    with pytest.raises(UserError, match=f"Choose its own: data.tokenizer={folder}"):
        train_tiny("other", init_from=str(source.directory))


def test_seeds_that_began_at_other_weights_are_no_samples_of_one_configuration(train_tiny):
    """The run that init_from names may have been made longer in between."""
    source = train_tiny("source")
    first = train_tiny("first", init_from=str(source.directory))
    again = train_tiny("again", init_from=str(source.directory), seed=2)
    assert group([first, again])[0].count == "2 seeds"
    assert first.status["origin"]["checkpoint"].endswith("step-00000006")
    train_tiny("source", resume=str(source.directory), **{"train.max_steps": 9})
    other = train_tiny("other", init_from=str(source.directory), seed=3)
    with pytest.raises(UserError, match="an init_from of other contents"):
        group([first, again, other])


def test_init_from_starts_with_those_weights(train_tiny):
    source = train_tiny("source", **{"train.max_steps": 40})
    again = train_tiny("again", init_from=str(source.directory))
    assert again.metrics["train/loss"].iloc[0] < source.metrics["train/loss"].iloc[0] - 1
    with pytest.raises(UserError, match="does not fit"):
        train_tiny("misfit", init_from=str(source.directory), **{"model.n_layer": 1})


def test_a_changed_plugin_makes_another_run(tiny, tmp_path):
    from normfree.config import resolve, resolve_vocabulary
    from normfree.data.packing import prepare
    from normfree.training.session import train

    def go(sha256):
        config = resolve(tiny(run_dir=str(tmp_path / "run")))
        corpus = prepare(config.data)
        resolve_vocabulary(config, corpus.tokenizer.n_vocab)
        return train(config, corpus, [{"path": "mine.py", "sha256": sha256}])

    assert go("a").status == "finished"
    with pytest.raises(UserError, match="plug-ins"):
        go("b")
