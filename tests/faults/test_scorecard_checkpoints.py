"""Checkpoints: whatever kills the writer, fills the disk or flips a bit, a good one stays, and a bad one is refused."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from crashes import Operations, file_size_limit, in_child
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from normfree.config import Config, DataConfig, ModelConfig, resolve
from normfree.errors import EXIT_CHECKPOINT, UserError
from normfree.model import Transformer, init_weights
from normfree.records import RunWriter
from normfree.runs import MANIFEST, load_run
from normfree.training import checkpoint as ckpt
from normfree.training import store
from normfree.training.optimizer import build_optimizer

KILLED = -9


def make_model(config: Config, step: int) -> tuple[Transformer, torch.optim.Optimizer]:
    """A model whose every bit follows from `step`."""
    model = Transformer(config.model)
    init_weights(model, seed=step)
    optimizer = build_optimizer(model, config.optim)
    for i, p in enumerate(model.parameters()):
        optimizer.state[p] = {name: torch.full_like(p, step + i / 8) for name in ("exp_avg", "exp_avg_sq")}
    return model, optimizer


def save(run_dir: Path, step: int, steps: int = 10) -> bool:
    """`steps` changes the settings, and so the bytes, but no weight."""
    config = ckpt_config(steps)
    return ckpt.save_checkpoint(run_dir, step, config, *make_model(config, step), {"scale": torch.ones(())})


def ckpt_config(steps: int = 10) -> Config:
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "vocab_size": 64}
    config = resolve(Config(name="small", model=ModelConfig(**shape), data=DataConfig(seq_len=8)))
    config.train.max_steps = steps
    return config


@pytest.fixture
def run_dir(tmp_path):
    """A run with one checkpoint, of step 1."""
    folder = tmp_path / "run"
    writer = RunWriter(folder)
    writer.config(ckpt_config())
    writer.close()
    save(folder, 1)
    return folder


def holds(checkpoint: Path, step: int) -> bool:
    """Whether the checkpoint loads, and has the bits of `step`."""
    config = ckpt_config()
    model, optimizer = make_model(config, step + 1000)
    if ckpt.load_training_state(model, optimizer, {"scale": torch.zeros(())}, checkpoint) != step:
        return False
    wanted, moments = make_model(config, step)
    pairs = zip(model.parameters(), wanted.parameters(), strict=True)
    return all(
        a.equal(b) and all(optimizer.state[a][k].equal(moments.state[b][k]) for k in ("exp_avg", "exp_avg_sq"))
        for a, b in pairs
    )


def names(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


# -- killed at every operation ----------------------------------------------------------------------------------------


def next_checkpoint(run_dir: Path) -> None:
    save(run_dir, 2)
    ckpt.prune(run_dir, keep=1)


def same_step_again(run_dir: Path) -> None:
    """As when a run is resumed at a step, and diverges there: its only checkpoint is replaced."""
    save(run_dir, 1, steps=20)


def deaths(work, run_dir: Path, tmp_path: Path, every: int = 1) -> tuple[int, list[Path]]:
    """Kill `work` at each of its operations on the disk: how many there are, and the runs without a good checkpoint."""
    lost = []
    for last in range(1, 1000, every):
        copy = tmp_path / f"killed-{last}"
        shutil.copytree(run_dir, copy)
        code = in_child(lambda copy=copy, last=last: (Operations(copy, last), work(copy)))
        assert code in (0, KILLED)
        store.sweep(copy)  # as a run that goes on does first
        good = ckpt.newest_good(copy)
        if good is None or not holds(good[1], good[0]):
            lost.append(copy)
            continue
        work(copy)
        assert len(names(copy)) == 1, "what the killed process left is still there"
        shutil.rmtree(copy)
        if code == 0:
            return last - 1, lost
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("work", [next_checkpoint, same_step_again])
def test_killed_at_any_operation_a_good_checkpoint_is_left(run_dir, tmp_path, work):
    count, lost = deaths(work, run_dir, tmp_path)
    assert count > 25, "every file, write, fsync and rename is to be among them"
    assert not lost


def test_a_writer_in_place_is_caught(run_dir, tmp_path, monkeypatch):
    """The control: of a writer that overwrites, the same deaths lose the run."""

    def in_place(run_dir, step, contents):
        target = run_dir / "checkpoints" / f"step-{step:08d}"
        for path in target.iterdir():
            path.unlink()
        digests = {name: store._write_file(target / name, data) for name, data in contents}
        store._write_file(target / MANIFEST, store.manifest(step, digests))

    monkeypatch.setattr(ckpt, "write", in_place)
    _, lost = deaths(same_step_again, run_dir, tmp_path, every=2)
    assert len(lost) > 2


def test_deleting_before_writing_is_caught(run_dir, tmp_path):
    """Another control: the old checkpoint goes before the new one has come."""

    def hasty(run_dir):
        shutil.rmtree(run_dir / "checkpoints" / "step-00000001", ignore_errors=True)
        next_checkpoint(run_dir)

    _, lost = deaths(hasty, run_dir, tmp_path, every=4)
    assert len(lost) > 2


# -- a disk that takes no more ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 700, 4000])
def test_a_full_disk_leaves_the_older_checkpoints(run_dir, size):
    """With a limit on the size of files: part of a file is written, then EFBIG."""
    with (
        file_size_limit(size),
        pytest.raises(ckpt.NotSaved, match="step-00000002 could not be written: File too large"),
    ):
        save(run_dir, 2)
    assert names(run_dir) == ["step-00000001"]
    assert holds(run_dir / "checkpoints" / "step-00000001", 1)
    next_checkpoint(run_dir)  # space has come back
    assert names(run_dir) == ["step-00000002"]


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("work", [next_checkpoint, same_step_again])
def test_any_call_that_fails_leaves_the_older_checkpoints(run_dir, monkeypatch, call, fault, work):
    original, allowed = getattr(os, call), {"write": 3, "fsync": 5, "rename": 0, "mkdir": 0}[call]

    def failing(*args, **keys):
        nonlocal allowed
        allowed -= 1
        if allowed == -1:
            raise OSError(fault, os.strerror(fault))
        return original(*args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(ckpt.NotSaved, match=os.strerror(fault)):
            work(run_dir)
    assert names(run_dir) == ["step-00000001"]
    assert holds(run_dir / "checkpoints" / "step-00000001", 1)


def test_what_the_disk_did_not_keep_gets_no_name(run_dir, monkeypatch):
    """A write that says yes and keeps something else is found when the files are read back."""
    original = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: original(handle, bytes(len(data))))
    with pytest.raises(ckpt.NotSaved, match="is damaged"):
        save(run_dir, 2)
    assert names(run_dir) == ["step-00000001"]


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run, opened once for many mutations; each puts back what it changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    RunWriter(folder).config(ckpt_config())
    save(folder, 1)
    save(folder, 2)
    return folder


def content(checkpoint: Path) -> tuple:
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    return manifest, *((checkpoint / name).read_bytes() for name in store.FILES)


def same_meaning(checkpoint: Path, meaning: tuple) -> bool:
    """White space in the manifest means nothing."""
    try:
        return content(checkpoint) == meaning
    except ValueError:
        return False


@settings(
    deadline=None, derandomize=True, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from([*store.FILES, MANIFEST]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused_or_means_the_same(whole, name, place, bit):
    checkpoint = whole / "checkpoints" / "step-00000002"
    path = checkpoint / name
    before, meaning = path.read_bytes(), content(checkpoint)
    data = bytearray(before)
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        if name == MANIFEST and same_meaning(checkpoint, meaning):
            assert ckpt.newest_good(whole)[0] == 2
        else:
            with pytest.raises(UserError, match="is damaged") as caught:
                ckpt.verify(checkpoint)
            assert caught.value.exit_code == EXIT_CHECKPOINT
            assert ckpt.newest_good(whole)[0] == 1, "an older one is used"
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", [*store.FILES, MANIFEST])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99, None])
def test_a_file_cut_short_or_missing_is_refused(whole, name, share):
    checkpoint = whole / "checkpoints" / "step-00000002"
    before = (checkpoint / name).read_bytes()
    try:
        if share is None:
            (checkpoint / name).unlink()
        else:
            (checkpoint / name).write_bytes(before[: int(share * len(before))])
        with pytest.raises(UserError, match="is damaged"):
            ckpt.verify(checkpoint)
        assert ckpt.find_checkpoint(whole).name == "step-00000001"
    finally:
        (checkpoint / name).write_bytes(before)


def test_safetensors_alone_would_not_notice(run_dir):
    """The control: the same flips, loaded without the digests."""
    path = run_dir / "checkpoints" / "step-00000001" / "model.safetensors"
    before, noticed = path.read_bytes(), 0
    for place in range(len(before) - 500, len(before), 10):
        data = bytearray(before)
        data[place] ^= 16
        path.write_bytes(data)
        load_file(path)
        with pytest.raises(UserError, match="is damaged"):
            ckpt.verify(path.parent)
        noticed += 1
    assert noticed == 50


def test_other_files_beside_are_never_opened(run_dir):
    checkpoint = run_dir / "checkpoints" / "step-00000001"
    (checkpoint / "optimizer.pt").write_bytes(b"no pickle is ever read")
    (checkpoint / "notes").mkdir()
    assert holds(checkpoint, 1)


def test_a_manifest_cannot_name_fewer_files(run_dir):
    checkpoint = run_dir / "checkpoints" / "step-00000001"
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    manifest["files"].pop("optimizer.safetensors")
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"sha256": store._own_digest(manifest)}))
    with pytest.raises(UserError, match="its list of files"):
        ckpt.verify(checkpoint)


def test_a_checkpoint_of_the_first_format_loads(run_dir):
    checkpoint = run_dir / "checkpoints" / "step-00000001"
    files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
    (checkpoint / MANIFEST).write_text(json.dumps({"format": 1, "step": 1, "sha256": files}))
    assert holds(checkpoint, 1)


def test_odd_bits_come_back(run_dir):
    """NaN with a payload, -0.0, the smallest number; and what is not finite is never good."""
    config = ckpt_config()
    model, optimizer = make_model(config, 3)
    bits = torch.tensor([0x7FC0BEEF, -0x80000000, 0x00000001, 0x7F7FFFFF], dtype=torch.int32)
    with torch.no_grad():
        next(model.parameters()).view(torch.int32).view(-1)[:4] = bits
    assert not ckpt.save_checkpoint(run_dir, 3, config, model, optimizer, {})
    saved = load_file(run_dir / "checkpoints" / "step-00000003" / "model.safetensors")
    name = next(name for name, _ in model.named_parameters())
    assert saved[name].view(torch.int32).view(-1)[:4].equal(bits)
    assert ckpt.newest_good(run_dir)[0] == 1
    assert ckpt.newest_good(run_dir, finite=False)[0] == 3


# -- which one --------------------------------------------------------------------------------------------------------


def test_neither_times_nor_links_nor_names_say_which_is_newest(run_dir):
    checkpoints = run_dir / "checkpoints"
    save(run_dir, 2)
    os.utime(checkpoints / "step-00000001", (4e9, 4e9))
    (checkpoints / "step-00000098").symlink_to("step-00000001")
    (checkpoints / "step-00000099").symlink_to("nowhere")
    shutil.copytree(checkpoints / "step-00000001", checkpoints / "step-00000097")
    assert ckpt.newest_good(run_dir) == (2, checkpoints / "step-00000002")


def test_the_last_good_one_goes_only_when_a_newer_one_was_read(run_dir):
    for step in (2, 3):
        save(run_dir, step)
        (run_dir / "checkpoints" / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    ckpt.prune(run_dir, keep=1)
    assert names(run_dir) == ["step-00000001", "step-00000003"]
    save(run_dir, 4)
    ckpt.prune(run_dir, keep=1)
    assert names(run_dir) == ["step-00000004"]


def test_nothing_is_deleted_where_none_is_whole(run_dir):
    save(run_dir, 2)
    for path in (run_dir / "checkpoints").iterdir():
        (path / "config.yaml").write_text("")
    ckpt.prune(run_dir, keep=1)
    assert names(run_dir) == ["step-00000001", "step-00000002"]


def test_the_best_is_kept(run_dir):
    for step, loss in ((1, 4.0), (2, 3.0), (3, 3.5), (4, float("nan")), (5, 3.0), (6, 9.0)):
        save(run_dir, step)
        ckpt.prune(run_dir, keep=2)
        ckpt.note_best(run_dir, step, loss)
    assert names(run_dir) == ["best.json", "step-00000002", "step-00000005", "step-00000006"]
    assert ckpt.best_good(run_dir) == (2, run_dir / "checkpoints" / "step-00000002")
    assert ckpt.find_checkpoint(run_dir, best=True).name == "step-00000002"
    assert ckpt.find_checkpoint(run_dir).name == "step-00000006"


@pytest.mark.parametrize("damage", ["pointer", "weights", "replaced", "gone"])
def test_the_best_is_never_taken_on_trust(run_dir, damage):
    checkpoints = run_dir / "checkpoints"
    ckpt.note_best(run_dir, 1, 4.0)
    save(run_dir, 2)
    if damage == "pointer":
        (checkpoints / "best.json").write_text('{"step": 2, "val')
    elif damage == "weights":
        (checkpoints / "step-00000001" / "model.safetensors").write_bytes(b"")
    elif damage == "replaced":
        same_step_again(run_dir)
    else:
        shutil.rmtree(checkpoints / "step-00000001")
    assert ckpt.best_good(run_dir) is None
    with pytest.raises(UserError, match="noted as its best"):
        ckpt.load_model(run_dir, best=True)
    ckpt.note_best(run_dir, 2, 5.0)
    assert (ckpt.best_good(run_dir) is None) == (damage == "weights"), "a lower loss than that one's would be needed"


def test_a_checkpoint_that_is_not_finite_is_never_the_best(run_dir):
    config = ckpt_config()
    model, optimizer = make_model(config, 2)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = torch.inf
    assert not ckpt.save_checkpoint(run_dir, 2, config, model, optimizer, {})
    ckpt.note_best(run_dir, 2, 1.0)
    assert ckpt.best_good(run_dir) is None
    assert load_run(run_dir).checkpoints[-1][0] == 2
