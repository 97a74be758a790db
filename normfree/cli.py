"""The command line: compose, check, look at the data, and only then import torch and train.

Only this file and words.py, which looks at what was typed, know Hydra. A user's mistake ends here as one message on
stderr and an exit code.
"""

import contextlib
import io
import json
import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from normfree.config import Config, flat_keys, resolve, resolve_vocabulary
from normfree.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DIRECTORY, EXIT_INTERRUPTED, EXIT_OK, UserError, say
from normfree.identity import weights_settings
from normfree.kinds import shown
from normfree.plugins import load_plugin
from normfree.records import write_atomically
from normfree.rules import KEYS, cross_faults, validate, value_faults
from normfree.runs import is_checkpoint, is_evaluation, is_run, load_run
from normfree.words import CONF, Typed, groups, help_text, lists, parse, read, split_words, values_of

PROCESS_VARIABLE = "NORMFREE_PROCESS"  # the process that was started; others are workers of a parallel sweep
PLUGINS_VARIABLE = "NORMFREE_PLUGINS"  # how `--plugin` reaches the processes of a parallel sweep

_plugins: dict[str, dict[str, str]] = {}


# -- composing --------------------------------------------------------------------------------------------------------


def _compose(words: list[str]) -> DictConfig:
    """conf/ and the words, with Hydra's own node; nothing of it has been acted on. Raises UserError."""
    if not ConfigStore.instance().repo.get("schema.yaml"):
        ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3", job_name="run"):
            return compose("config", overrides=words, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"conf/ cannot be composed: {' '.join(lines[:4])}") from error


def _behaviour(cfg: DictConfig) -> dict[str, Any]:
    """What decides how Hydra itself acts: where it writes, what it logs, calls, and sets in the environment."""
    node: Any = OmegaConf.to_container(cfg.hydra, resolve=False)
    chosen = {name: choice for name, choice in node["runtime"]["choices"].items() if name.startswith("hydra/")}
    job = {name: node["job"][name] for name in ("chdir", "config", "env_set", "env_copy")}
    return {k: v for k, v in node.items() if k not in ("runtime", "overrides", "job")} | {"job": job, "chosen": chosen}


@cache
def _plain_behaviour(words: tuple[str, ...]) -> dict[str, Any]:
    return _behaviour(_compose(list(words)))


def _preset_faults(cfg: DictConfig) -> list[str]:
    """A file in conf/ says what a run is, and no more: it looks nothing up, and leaves Hydra as it is."""
    typed = tuple(cfg.hydra.overrides.hydra)
    wanted, found = _plain_behaviour(typed), _behaviour(cfg)
    other = [f"hydra.{name}" for name in found if found[name] != wanted.get(name)]
    faults = (
        [f"{', '.join(other)}: set by a file in conf/. Presets are settings of a run, not of Hydra."] if other else []
    )
    values: Any = OmegaConf.to_container(cfg, resolve=False)
    for name, value in _leaves({k: v for k, v in values.items() if k != "hydra"}):
        if isinstance(value, str) and ("${" in value or value == "???"):
            faults.append(f"{name}={shown(value)}: a value in a file in conf/ is written out, not looked up.")
    return faults


def _leaves(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(values, dict | list):
        return [(prefix, values)]
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    return [leaf for key, value in pairs for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))]


def to_config(cfg: DictConfig, choices: Any) -> Config:
    """The composed configuration as our dataclasses, with the run's name filled in."""
    with open_dict(cfg):
        cfg.pop("hydra", None)
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    if config.name is None:
        config.name = f"{choices['model']}-{choices['size']}-{config.model.norm}-{config.model.act}"
    return config


def check_overrides(words: list[str], multirun: bool) -> Config | None:
    """The configuration that the words mean; None for a sweep, of which the values that all jobs share are looked at.

    Raises one `UserError` with everything that is wrong: words, presets, values and rules between them. Writes nothing.
    """
    typed = read(words, multirun)
    problems = list(typed.problems)
    config = None
    try:
        cfg = _compose(typed.plain())
        found = _preset_faults(cfg)
        for word in typed.swept_groups():
            found += _preset_faults(_compose([*typed.plain(), word]))
        problems += dict.fromkeys(found)
        if not found:
            config = to_config(cfg, cfg.hydra.runtime.choices)
            problems += dict(value_faults(config)).values() if multirun else _config_faults(config, typed)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return None if multirun else config


def _config_faults(config: Config, typed: Typed) -> list[str]:
    """Of the words without fault. With a file of conf/ unknown, rules between keys would blame the wrong ones."""
    faults = dict(value_faults(config))
    between = config.resume is None and not typed.bad.intersection(groups())
    return [*faults.values(), *(cross_faults(config, set(faults) | typed.bad) if between else ())]


# -- one job ----------------------------------------------------------------------------------------------------------


def resumed_config(config: Config, typed: list[str]) -> Config:
    """The configuration of the run that `resume` names, with what was typed beside it."""
    assert config.resume is not None
    run = load_run(config.resume)
    if is_evaluation(run):
        raise UserError(
            f"resume={config.resume} is an evaluation of {run.status.get('subject')}: nothing was trained there. Name "
            "the run.",
            EXIT_DIRECTORY,
        )
    given = {plugin["sha256"] for plugin in _plugins.values()}
    if missing := [p["path"] for p in run.status.get("plugins", []) if p["sha256"] not in given]:
        raise UserError(
            f"resume={config.resume}: that run used plug-ins; give the same files, with the contents they had: "
            f"{' '.join(f'--plugin {path}' for path in missing)}"
        )
    saved = run.config
    ours = {name: value for name, value, _ in flat_keys(config)}
    theirs = {name: value for name, value, _ in flat_keys(saved)}
    names = [name for name in dict.fromkeys(o.key_or_group for o in parse(typed)[0]) if name != "resume"]
    bound = {"seed", "run_dir", *weights_settings(saved)}
    for name in KEYS.keys() & set(names):
        _set(saved, name, ours[name])
    bound |= set(weights_settings(saved))  # what was typed may make a key matter, as spike_sigma does itself
    refused = [f"{name} is a choice of that run" for name in names if name not in KEYS]
    refused += [
        f"{name}: {shown(ours[name])}, not {shown(theirs[name])}"
        for name in names
        if name in bound - {"train.max_steps"} and ours[name] != theirs[name]
    ]
    done = theirs["train.max_steps"]
    if saved.train.max_steps < done:
        refused.append(f"train.max_steps: {saved.train.max_steps}, less than its {done}")
    if refused:
        raise UserError(
            f"resume={config.resume}: these cannot change now (here, not there):\n  " + "\n  ".join(refused) + "\nWith "
            "resume, only a larger train.max_steps and keys that leave the weights alone can be given. Start a new run "
            "instead (or init_from=...)."
        )
    saved.run_dir = saved.resume = config.resume
    return saved


def _set(config: Config, name: str, value: Any) -> None:
    *sections, leaf = name.split(".")
    target: Any = config
    for section in sections:
        target = getattr(target, section)
    setattr(target, leaf, value)


def run_config(config: Config) -> Any:
    """Check, look at the data, import torch, train: returns the `RunResult`."""
    validate(config)
    config = resolve(config)
    validate(config)
    # What can be seen in a second is refused before text is tokenised, which can take hours.
    goes_on = config.run_dir is not None and is_run(config.run_dir)
    origin = None if config.init_from is None or goes_on else Path(config.init_from)
    if origin is not None and not (is_run(origin) or is_checkpoint(origin)):
        raise UserError(f"init_from={origin} is neither a run directory nor a checkpoint.", EXIT_CHECKPOINT)
    if origin is not None and is_run(origin) and is_evaluation(load_run(origin)):
        raise UserError(f"init_from={origin} is an evaluation, which has no weights. Name the run.", EXIT_CHECKPOINT)
    if config.train.device == "cuda":
        from normfree.training.machine import choose_device

        choose_device(config)
    from normfree.data.packing import prepare
    from normfree.data.tokenizer import require_same_tokenizer

    corpus = prepare(config.data, lambda text: print(text, file=sys.stderr))
    if origin is not None:
        run_dir = origin.resolve().parent.parent if is_checkpoint(origin) else origin
        require_same_tokenizer(f"init_from={origin}", run_dir / "tokenizer", corpus.tokenizer)
    resolve_vocabulary(config, corpus.tokenizer.n_vocab)
    config.data.fingerprint = corpus.fingerprint
    from normfree.training.session import train

    return train(config, corpus, list(_plugins.values()))


def _load_plugins() -> None:
    """Once a process: also in the workers of a parallel sweep, which inherit the variable that `main` sets."""
    for path in json.loads(os.environ.get(PLUGINS_VARIABLE) or "[]"):
        if path not in _plugins:
            _plugins[path] = load_plugin(path)


def _outcome(status: str, exit_code: int, run_dir: Any = None, metric: float | None = None, **more: Any) -> dict:
    return {"status": status, "exit_code": exit_code, "run_dir": run_dir and str(run_dir), "metric": metric, **more}


def _run(config: Config, typed: list[str]) -> Any:
    _load_plugins()
    return run_config(config if config.resume is None else resumed_config(config, typed))


def _note(path: Path, outcome: dict[str, Any]) -> None:
    """Keep how a job stands; where the disk is full, the sweep goes on and its table lacks it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(outcome) + "\n")
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror}); the sweep goes on", file=sys.stderr)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _sweep_job(cfg: DictConfig) -> float | None:
    """One job of a sweep; it notes how it ended instead of raising, so that the others go on."""
    hydra_config = HydraConfig.get()
    typed = list(hydra_config.overrides.task)
    path = Path(hydra_config.sweep.dir) / f"job-{hydra_config.job.num}.json"
    begun = _outcome("interrupted", 1, reason="its process was killed or stopped")  # unless it comes to its end
    _note(path, begun | {"overrides": typed})
    try:
        result = _run(to_config(cfg, hydra_config.runtime.choices), typed)
        outcome = _outcome(result.status, result.exit_code, result.run_dir, result.metric)
    except UserError as error:
        _fail(error)
        outcome = _outcome("refused", error.exit_code, reason=str(error))
    except (Exception, SystemExit) as error:  # code that exits ends its own job
        traceback.print_exc()
        outcome = _outcome("crashed", 1, reason=repr(error))
    _note(path, outcome | {"overrides": typed})
    if outcome["status"] == "preempted" and os.environ.get(PROCESS_VARIABLE) == str(os.getpid()):
        raise SystemExit(outcome["exit_code"])  # the whole sweep was asked to stop; a parallel job only itself
    return outcome["metric"]


# -- the command ------------------------------------------------------------------------------------------------------


def _fail(error: UserError) -> int:
    print("\n".join(f"error: {line}" if i == 0 else f"       {line}" for i, line in enumerate(str(error).split("\n"))),
          file=sys.stderr)  # fmt: skip
    return error.exit_code


def _sweep_summary(folder: Path, number_of_jobs: int) -> int:
    """Print how every job of a sweep ended; 0 where all finished, else the first other exit code."""
    from rich.console import Console
    from rich.table import Column, Table

    columns = "job", "status", "val/loss", Column("overrides", overflow="fold")
    table = Table(*columns, title="sweep", title_justify="left")
    jobs = {int(path.stem.removeprefix("job-")): json.loads(path.read_text()) for path in folder.glob("job-*.json")}
    common = set.intersection(*(set(job["overrides"]) for job in jobs.values())) if len(jobs) > 1 else set()
    for number, job in sorted(jobs.items()):
        loss = "-" if job["metric"] is None or job["metric"] != job["metric"] else f"{job['metric']:.4f}"
        swept = " ".join(word for word in job["overrides"] if word not in common)
        table.add_row(str(number), job["status"], loss, swept)
    for number in sorted(set(range(number_of_jobs)) - set(jobs)):
        table.add_row(str(number), "not begun", "-", "-")
    console = Console(stderr=True, markup=False)
    console.print(table)
    for number, job in sorted(jobs.items()):  # beside the table, where a path is whole and can be copied
        console.print(f"job {number}: {job['run_dir'] or job.get('reason', '-')}", soft_wrap=True, highlight=False)
    return next((job["exit_code"] for _, job in sorted(jobs.items()) if job["exit_code"]), EXIT_OK)


@contextlib.contextmanager
def _printed_at_once() -> Iterator[None]:
    """What is printed inside goes out in one piece, by `say`."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        say(text.getvalue(), end="")


def main(argv: list[str] | None = None) -> int:
    """`python run.py ...`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ[PROCESS_VARIABLE] = str(os.getpid())
    os.environ["NORMFREE_COMMAND"] = shlex.join(["python", "run.py", *argv])
    if "--help" in argv or "-h" in argv:
        say(help_text())
        return EXIT_OK
    try:
        options, words, plugins = split_words(argv)
        os.environ[PLUGINS_VARIABLE] = json.dumps(plugins)
        _load_plugins()
        multirun = "-m" in options or "--multirun" in options
        config = check_overrides(words, multirun)
        if options:
            return _with_hydra(options, words, multirun)
        assert config is not None
        return _run(config, words).exit_code
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception:
        traceback.print_exc()
        return 1


def _with_hydra(options: list[str], words: list[str], multirun: bool) -> int:
    """A sweep, or one of Hydra's own options, such as --cfg job."""
    folder = Path("runs/.sweeps") / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{os.getpid()}"
    if multirun:
        words = [*words, f"hydra.sweep.dir={folder}"]
    swept = [override for override in parse(words)[0] if override.is_sweep_override()]
    jobs = math.prod(sum(1 for _ in values_of(override)) for override in swept)
    sys.argv = [sys.argv[0], *options, *words]
    try:
        with _printed_at_once() if lists(options) else contextlib.nullcontext():
            _sweep_job()
    except (SystemExit, KeyboardInterrupt) as stop:
        if multirun and folder.is_dir():
            _sweep_summary(folder, jobs)
        if isinstance(stop, KeyboardInterrupt):
            raise
        return stop.code if isinstance(stop.code, int) else EXIT_CONFIG
    return _sweep_summary(folder, jobs) if multirun else EXIT_OK
