"""The command: what it refuses, what it writes, and that a sweep survives its worst jobs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from normfree import cli
from normfree.config import Config, flat_keys, resolve
from normfree.data.sources import PythonEnvironment
from normfree.errors import EXIT_CONFIG, EXIT_DATA, EXIT_DIRECTORY, EXIT_DIVERGED, EXIT_INTERRUPTED
from normfree.rules import validate
from normfree.runs import load_run

ROOT = Path(cli.__file__).parent.parent
SMALL = [
    "size=nano", "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "data.seq_len=16",
    "train.batch_size=4", "train.micro_batch_size=2", "train.eval_tokens=64", "diagnostics.every=1",
    "diagnostics.probe_sequences=1", "log.figures=false", "log.tensorboard=false",
]  # fmt: skip


@pytest.fixture
def command(text_folder, monkeypatch):
    """`command("act=relu")` runs the command on the little corpus with a tiny model; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["run.py"])
    texts = ["data=files", f"data.path={text_folder}", "data.tokenizer=bytes"]

    def go(*words, steps=1):
        return cli.main([*texts, *SMALL, f"train.max_steps={steps}", *words])

    return go


def written() -> list[str]:
    return sorted(str(p) for p in Path().rglob("*"))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["act=rleu"], EXIT_CONFIG, ["act=rleu", "Did you mean 'relu'?", "leaky_relu"]),
        (["norm=layrnorm"], EXIT_CONFIG, ["norm=layrnorm", "'layernorm'", "rmsnorm"]),
        (["model=gtp2"], EXIT_CONFIG, ["'gpt2'", "pythia"]),
        (["size=71m"], EXIT_CONFIG, ["size=71m", "'70m'"]),
        (["model.n_hed=3"], EXIT_CONFIG, ["model.n_hed", "'model.n_head'"]),
        (["optim.lr=fast"], EXIT_CONFIG, ["optim.lr", "Float"]),
        (["+model.new=1"], EXIT_CONFIG, ["model.new"]),
        (["~model.norm"], EXIT_CONFIG, ["~model.norm"]),
        (["model=null"], EXIT_CONFIG, ["model"]),
        (["optim.lr=${nope}"], EXIT_CONFIG, ["nope"]),
        (["nan_policy=RAISE"], EXIT_CONFIG, ["nan_policy", "'raise'"]),
        (["run_dir=/dev/null"], EXIT_DIRECTORY, ["run_dir=/dev/null"]),
        (["model.n_embd=1000000", "model.n_layer=64"], 77, ["out of memory", "train.micro_batch_size"]),
        (["optim.lr"], EXIT_CONFIG, ["optim.lr"]),
        (["act=relu", "optim.lr=0", "model.n_embd=17"], EXIT_CONFIG, ["optim.lr=0", "model.n_embd=17", "n_head=2"]),
        (["optim.lr=nan"], EXIT_CONFIG, ["optim.lr=nan"]),
        (["optim.warmup_steps=2"], EXIT_CONFIG, ["optim.warmup_steps=2", "train.max_steps=1"]),
        (["act=relu,gelu"], EXIT_CONFIG, ["act", "-m"]),
        (["-m", "act=relu,gelu", "run_dir=x"], EXIT_CONFIG, ["run_dir"]),
        (["--plugin", "nowhere.py"], EXIT_CONFIG, ["nowhere.py"]),
        (["resume=nowhere"], EXIT_DIRECTORY, ["nowhere", "does not exist"]),
        (["init_from=nowhere"], 66, ["nowhere"]),
        (["model.vocab_size=100"], EXIT_CONFIG, ["model.vocab_size=100", "257"]),
        (["data.path=nowhere.txt"], EXIT_DATA, ["nowhere.txt"]),
        (["data.tokenizer=code9k"], EXIT_DATA, ["code9k", "code8k"]),
        (["train.device=cuda"], EXIT_CONFIG, ["train.device=cuda"]),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(command, capfd, monkeypatch, words, code, says):
    if words == ["train.device=cuda"]:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command(*words) == code
    error = capfd.readouterr().err
    assert "Traceback" not in error
    for word in ["error: ", *says]:
        assert word in error
    assert written() == []


@pytest.mark.parametrize("content", [b"", b"x = 1\n", b"caf\xe9 = 1\n" * 400])
def test_bad_files_are_named(command, capfd, tmp_path, content):
    """Empty, shorter than a block, not UTF-8."""
    bad = tmp_path / "elsewhere.txt"
    bad.write_bytes(content)
    assert command(f"data.path={bad}", "data.source=files") == EXIT_DATA
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert "elsewhere.txt" in error or "data.path" in error or "data.seq_len" in error
    assert written() == ["elsewhere.txt"]


def test_the_main_command_from_another_folder(text_folder, tmp_path, cache_dir):
    """As a user types it, in a process of its own; Hydra writes nothing into the folder."""
    words = ["model=normfree", "act=relu", "data=files", f"data.path={text_folder}", "data.tokenizer=bytes", *SMALL]
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words, "train.max_steps=2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("normfree-nano-none-relu-")
    assert run_dir.name.endswith("-s1")
    assert "no block norms, final norm kept" in done.stderr
    status = load_run(run_dir).status
    assert status["status"] == "finished"
    assert status["command"].startswith("python run.py model=normfree act=relu")


def test_resume_extends_and_refuses_what_changes_the_weights(command, capfd):
    assert command("run_dir=r", steps=2) == 0
    assert cli.main(["resume=r", "train.max_steps=4"]) == 0
    assert load_run("r").status["last_step"] == 4
    assert load_run("r").entropy_steps.tolist() == [0, 1, 2, 3]
    capfd.readouterr()
    assert cli.main(["resume=r", "optim.lr=0.5"]) == EXIT_CONFIG
    assert "optim.lr" in capfd.readouterr().err
    assert cli.main(["resume=r", "model=pythia"]) == EXIT_CONFIG
    assert cli.main(["resume=r", "train.max_steps=1"]) == EXIT_CONFIG


def test_an_extended_run_equals_one_of_that_length(command):
    fixed = ["optim.warmup_steps=1", "optim.schedule=constant"]
    assert command("run_dir=long", *fixed, steps=4) == 0
    assert command("run_dir=short", *fixed, steps=2) == 0
    assert cli.main(["resume=short", "train.max_steps=4"]) == 0
    one, two = (load_run(name).checkpoints[-1][1] / "model.safetensors" for name in ("long", "short"))
    assert one.read_bytes() == two.read_bytes()


def test_an_interrupted_command_goes_on(command, capfd, monkeypatch):
    from normfree.training.loop import Trainer

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command("run_dir=r", steps=2) == EXIT_INTERRUPTED
    error = capfd.readouterr().err
    assert "goes on" in error
    assert "Traceback" not in error
    assert load_run("r").status["status"] == "interrupted"
    assert command("run_dir=r", steps=2) == 0
    assert load_run("r").status["status"] == "finished"


def test_a_sweep_keeps_going(command, capfd):
    """Four jobs, two of them refused: the others finish, and the table and the exit code say so."""
    assert command("-m", "model=gpt2,normfree", "optim.lr=1e-3,-1") == EXIT_CONFIG
    error = capfd.readouterr().err
    assert error.count("finished") >= 2
    assert error.count("refused") == 2
    assert len(list(Path("runs").glob("*-s1"))) == 2
    assert written()[0] == "runs"


def test_a_sweep_names_every_run_and_reason_whole(tmp_path, capsys):
    run_dir, swept = "runs/gpt2-nano-" + "x" * 90 + "-s1", "data.path=" + "y" * 60
    told = {"status": "finished", "exit_code": 0, "run_dir": run_dir, "metric": 1.5, "overrides": [swept, "act=relu"]}
    refused = told | {"status": "refused", "run_dir": None, "metric": None, "reason": "optim.lr=-1 is outside (0, 1]."}
    for number, job in enumerate((told, refused | {"overrides": ["act=relu"], "exit_code": EXIT_CONFIG})):
        (tmp_path / f"job-{number}.json").write_text(json.dumps(job))
    assert cli._sweep_summary(tmp_path, 3) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert f"job 0: {run_dir}" in said.splitlines()
    assert "job 1: optim.lr=-1 is outside (0, 1]." in said.splitlines()
    assert said.count("y") == 60, "folded, not cut"
    assert "…" not in said
    assert "not begun" in said


def test_twelve_compiled_jobs_in_one_process(command, capfd):
    """One refused and one diverged among them; compile caches of one job must not starve the next."""
    words = ["-m", "train.compile=true", "seed=1,2,3", "optim.lr=1e-3,2e-3,-1,1e3", "optim.grad_clip=0"]
    words += ["train.deterministic=false", "diagnostics.watch=off", "diagnostics.every=0"]  # the smallest graph
    code = command(*words, "model=normfree", "optim.warmup_steps=0", "train.checkpoint_every=0", steps=4)
    (folder,) = Path("runs/.sweeps").iterdir()
    jobs = [json.loads(path.read_text()) for path in folder.glob("job-*.json")]
    statuses = [job["status"] for job in jobs]
    assert len(jobs) == 12
    assert statuses.count("refused") == 3
    assert statuses.count("diverged") == 3
    assert statuses.count("finished") == 6
    assert code in (EXIT_CONFIG, EXIT_DIVERGED)
    assert all(load_run(job["run_dir"]).status["compiled"] for job in jobs if job["run_dir"])


@pytest.mark.parametrize("option", ["--help", "--cfg=all"])
def test_a_listing_whose_reader_has_gone_ends_quietly(option):
    """`python run.py --help | head -3`, in the worst case: nobody reads, and every line is written by itself."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-u", str(ROOT / "run.py"), option]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


# -- conf/ ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def composed():
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield lambda *words: compose("config", overrides=list(words))


def test_normfree_is_gpt2_with_one_key_changed(composed):
    one, two = (
        {k: v for k, v, _ in flat_keys(cli.OmegaConf.to_object(composed(f"model={m}")))} for m in ("gpt2", "normfree")
    )
    assert {k: (one[k], two[k]) for k in one if one[k] != two[k]} == {"model.norm": ("layernorm", "none")}


def test_the_family_keeps_its_own_choices(composed):
    assert composed("model=pythia").model.act == "gelu"
    assert composed("model=gpt2").model.act == "gelu_tanh"
    assert composed("model=pythia", "act=relu").model.act == "relu"
    assert composed("norm=layernorm", "model=normfree").model.norm == "layernorm"


def test_typed_choices_win_over_a_preset(composed):
    config = composed("experiment=paper_gpt2", "act=relu", "model=normfree", "data=python_stdlib", "size=nano")
    assert (config.model.act, config.model.norm, config.data.source, config.model.n_layer) == (
        "relu", "none", "python_stdlib", 4,
    )  # fmt: skip


CHOICES = [(group, name) for group, names in sorted(cli.groups().items()) for name in names]
TRAINED = [c for c in CHOICES if c[0] not in ("data", "size")]  # every size is built, on meta, in tests/model


def test_all_groups_are_there():
    assert {group for group, _ in CHOICES} == {"model", "size", "norm", "act", "data", "experiment"}


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_file_composes_to_valid_settings(composed, group, name):
    config = cli.OmegaConf.to_object(composed(f"{group}={name}", "data.path=x"))
    validate(config)
    validate(resolve(config))


@pytest.mark.parametrize("source", ["python_stdlib", "python_environment"])
def test_the_built_in_texts_train(source, monkeypatch, tmp_path):
    packages = PythonEnvironment(Config().data)._roots()
    (site,) = [root for root in packages if (root / "hydra").is_dir()]  # this environment; to read it all takes long
    shutil.copytree(site / "hydra", tmp_path / "few" / "hydra")
    monkeypatch.setattr(PythonEnvironment, "_roots", lambda self: [tmp_path / "few"])
    monkeypatch.setattr(sys, "argv", ["run.py"])
    words = ["data.tokenizer=bytes", "data.max_documents=40", *SMALL, "train.max_steps=1"]
    assert cli.main([f"data={source}", *words]) == 0


@pytest.mark.parametrize(("group", "name"), TRAINED)
def test_every_choice_trains_a_step_at_nano(command, text_folder, group, name):
    assert command(f"{group}={name}", "optim.warmup_steps=0") == 0
