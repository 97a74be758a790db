"""The command line: compose, check, look at the data, and only then import torch and train.

The only file besides run.py that knows Hydra. A user's mistake ends here as one message on stderr and an exit code.
"""

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normfree.config import (
    Config,
    flat_keys,
    help_lines,
    resolve,
    resolve_vocabulary,
)
from normfree.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_OK, UserError, unknown
from normfree.plugins import load_plugin
from normfree.rules import CHOICES, validate
from normfree.runs import is_checkpoint, is_run

CONF = Path(__file__).resolve().parent.parent / "conf"
PROCESS_VARIABLE = "NORMFREE_PROCESS"  # the process that was started; others are workers of a parallel sweep
PLUGINS_VARIABLE = "NORMFREE_PLUGINS"  # how `--plugin` reaches the processes of a parallel sweep
KEYS = {name: weights for name, _, weights in flat_keys(Config())}
SECTIONS = {name[: m.start()] for name in KEYS for m in re.finditer(r"\.", name)}

OPTIONAL = ("norm", "act", "experiment")  # groups that null leaves to the family

_plugins: dict[str, dict[str, str]] = {}


# -- checking what was typed ------------------------------------------------------------------------------------------


def groups() -> dict[str, list[str]]:
    """What can be chosen as a file: group -> names."""
    return {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()}


def _values(override: Override) -> Iterator[Any]:
    if override.is_sweep_override():
        try:
            yield from override.sweep_iterator()
        except HydraException:
            return  # a range or glob is expanded, and checked, by Hydra
    else:
        yield override.value()


def unknown_key(name: str, known: list[str]) -> str:
    """The key that was probably meant, and the keys of its section; all of them would fill a page."""
    section = name.rpartition(".")[0]
    siblings = [key for key in known if key.rpartition(".")[0] == section] or sorted(SECTIONS)
    close = get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown key {name!r}.{hint} There are: {', '.join(siblings)} (all keys: python run.py --help)."


def _override_problems(override: Override) -> Iterator[str]:
    name = override.key_or_group
    if name.split(".")[0].split("/")[0] == "hydra":
        return
    if override.is_add() or override.is_delete() or override.package is not None:
        yield f"{override.input_line}: keys are neither added nor removed here; write key=value."
        return
    choices = groups()
    if name in choices:
        for value in _values(override):
            if not (value is None and name in OPTIONAL) and str(value) not in choices[name]:
                own = f" Your own is typed model.{name}={value}." if value in CHOICES.get(f"model.{name}", ()) else ""
                yield f"{name}={value}: " + unknown(name, value, choices[name]) + own
    elif name not in KEYS and name not in SECTIONS:
        yield unknown_key(name, [*KEYS, *choices])
    else:
        for value in _values(override):
            if isinstance(value, str) and ("${" in value or value == "???"):
                yield f"{name}={value}: write the value itself."
                continue
            try:
                OmegaConf.update(OmegaConf.structured(Config), name, value)
            except OmegaConfBaseException as error:
                yield f"{name}={value}: {str(error).splitlines()[0]}"


def check_overrides(words: list[str], multirun: bool) -> None:
    """Raise one `UserError` with everything that is wrong with `key=value` words, before Hydra sees them."""
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise UserError(f"not of the form key=value: {str(error).splitlines()[0]}") from error
    problems = [problem for override in overrides for problem in _override_problems(override)]
    swept = [o.key_or_group for o in overrides if o.is_sweep_override()]
    if swept and not multirun:
        problems.append(f"{', '.join(swept)}: several values are a sweep; add -m (python run.py -m ...).")
    if multirun and any(o.key_or_group == "run_dir" and not o.is_sweep_override() for o in overrides):
        problems.append("run_dir: the jobs of a sweep cannot share one directory. Leave it null: each names its own.")
    if problems:
        raise UserError("\n".join(problems))


# -- one job ----------------------------------------------------------------------------------------------------------


def compose_config(cfg: DictConfig) -> Config:
    """The composed configuration as our dataclasses, with the run's name filled in."""
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    if config.name is None:
        choices = HydraConfig.get().runtime.choices
        config.name = f"{choices['model']}-{choices['size']}-{config.model.norm}-{config.model.act}"
    return config


def resumed_config(config: Config, typed: list[str]) -> Config:
    """The configuration of the run that `resume` names, with what was typed beside it."""
    from normfree.runs import load_run

    assert config.resume is not None
    saved = load_run(config.resume).config
    ours = {name: value for name, value, _ in flat_keys(config)}
    theirs = {name: value for name, value, _ in flat_keys(saved)}
    for override in OverridesParser.create().parse_overrides(typed):
        name = override.key_or_group
        if name == "resume":
            continue
        allowed = name == "train.max_steps" or (name in KEYS and not KEYS[name] and name not in ("run_dir", "seed"))
        if not allowed and (name not in KEYS or ours[name] != theirs[name]):
            was = f" is {theirs[name]!r} in that run" if name in theirs else " is a choice of that run"
            raise UserError(
                f"resume={config.resume}: {name}{was} and cannot change now. With resume, only train.max_steps and "
                "keys that leave the weights alone can be given. Start a new run instead (or init_from=...)."
            )
        *sections, leaf = name.split(".")
        target: Any = saved
        for section in sections:
            target = getattr(target, section)
        setattr(target, leaf, ours[name])
    done = theirs["train.max_steps"]
    if saved.train.max_steps < done:
        raise UserError(f"resume={config.resume}: train.max_steps={saved.train.max_steps} is less than its {done}.")
    saved.run_dir = saved.resume = config.resume
    return saved


def run_config(config: Config) -> Any:
    """Check, look at the data, import torch, train: returns the `RunResult`."""
    validate(config)
    config = resolve(config)
    validate(config)
    # What can be seen in a second is refused before text is tokenised, which can take hours.
    if config.init_from is not None and not (is_run(config.init_from) or is_checkpoint(config.init_from)):
        raise UserError(f"init_from={config.init_from} is neither a run directory nor a checkpoint.", EXIT_CHECKPOINT)
    if config.train.device == "cuda":
        from normfree.training.machine import choose_device

        choose_device(config)
    from normfree.data.packing import prepare

    corpus = prepare(config.data, lambda text: print(text, file=sys.stderr))
    resolve_vocabulary(config, corpus.tokenizer.n_vocab)
    config.data.fingerprint = corpus.fingerprint
    from normfree.training.session import train

    return train(config, corpus, list(_plugins.values()))


def _load_plugins() -> None:
    """Once a process: also in the workers of a parallel sweep, which inherit the variable that `main` sets."""
    for path in filter(None, os.environ.get(PLUGINS_VARIABLE, "").split(os.pathsep)):
        if path not in _plugins:
            _plugins[path] = load_plugin(path)


def _outcome(status: str, exit_code: int, run_dir: Any = None, metric: float | None = None, **more: Any) -> dict:
    return {"status": status, "exit_code": exit_code, "run_dir": run_dir and str(run_dir), "metric": metric, **more}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _job(cfg: DictConfig) -> float | None:
    """One job. A sweep's job notes how it ended instead of raising, so that the others go on."""
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode == RunMode.MULTIRUN
    typed = list(hydra_config.overrides.task)
    try:
        _load_plugins()
        config = compose_config(cfg)
        if config.resume is not None:
            config = resumed_config(config, typed)
        result = run_config(config)
    except UserError as error:
        if not multirun:
            raise SystemExit(_fail(error)) from None
        _fail(error)
        outcome = _outcome("refused", error.exit_code, reason=str(error))
    except Exception as error:
        if not multirun:
            raise
        import traceback

        traceback.print_exc()
        outcome = _outcome("crashed", 1, reason=repr(error))
    else:
        if not multirun:
            if result.exit_code:
                raise SystemExit(result.exit_code)
            return result.metric
        outcome = _outcome(result.status, result.exit_code, result.run_dir, result.metric)
    path = Path(hydra_config.sweep.dir) / f"job-{hydra_config.job.num}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(outcome | {"overrides": typed}) + "\n")
    if outcome["status"] == "preempted" and os.environ.get(PROCESS_VARIABLE) == str(os.getpid()):
        raise SystemExit(outcome["exit_code"])  # the whole sweep was asked to stop; a parallel job only itself
    return outcome["metric"]


# -- the command ------------------------------------------------------------------------------------------------------


def _fail(error: UserError) -> int:
    print("\n".join(f"error: {line}" if i == 0 else f"       {line}" for i, line in enumerate(str(error).split("\n"))),
          file=sys.stderr)  # fmt: skip
    return error.exit_code


# Hydra's options that take a value; its parser wants every option before every key=value.
VALUED = {"-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir",
          "-i", "--info", "-sc", "--shell-completion", "--experimental-rerun"}  # fmt: skip


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """(options with their values, key=value words), wherever the user put them."""
    options, words, rest = [], [], iter(argv)
    for word in rest:
        if not word.startswith("-"):
            words.append(word)
            continue
        options.append(word)
        if word in VALUED:
            options += [value for value in [next(rest, None)] if value is not None]
    return options, words


def _take_plugins(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split `--plugin FILE` (or `--plugin=FILE`) off the command line."""
    rest, paths, words = [], [], iter(argv)
    for word in words:
        if word == "--plugin":
            path = next(words, None)
            if path is None:
                raise UserError("--plugin needs a file: --plugin my_norm.py")
            paths.append(path)
        elif word.startswith("--plugin="):
            paths.append(word.removeprefix("--plugin="))
        else:
            rest.append(word)
    return rest, [str(Path(path).resolve()) for path in paths]


def _sweep_summary(folder: Path) -> int:
    """Print how every job of a sweep ended; 0 where all finished, else the first other exit code."""
    from rich.console import Console
    from rich.table import Table

    table = Table("job", "status", "val/loss", "overrides", "run", title="sweep", title_justify="left")
    jobs = {int(path.stem.removeprefix("job-")): json.loads(path.read_text()) for path in folder.glob("job-*.json")}
    common = set.intersection(*(set(job["overrides"]) for job in jobs.values())) if len(jobs) > 1 else set()
    for number, job in sorted(jobs.items()):
        loss = "-" if job["metric"] is None or job["metric"] != job["metric"] else f"{job['metric']:.4f}"
        swept = " ".join(word for word in job["overrides"] if word not in common)
        table.add_row(str(number), job["status"], loss, swept, job["run_dir"] or job.get("reason", "-"))
    Console(stderr=True, markup=False).print(table)
    return next((job["exit_code"] for _, job in sorted(jobs.items()) if job["exit_code"]), EXIT_OK)


def print_help() -> None:
    """Usage, choices and every key with its default and meaning."""
    print("python run.py [model=...] [size=...] [norm=...] [act=...] [data=...] [experiment=...] [key=value ...]")
    print("python run.py -m key=a,b ...          a sweep; in parallel with hydra/launcher=joblib")
    print("python run.py --plugin FILE.py ...    with norms, activations or statistics of your own\n\nChoices")
    for name, choices in sorted(groups().items()):
        print(f"  {name:11} {', '.join(choices)}")
    print("\nKeys (* changes the weights)")
    for line in help_lines():
        print("  " + line)
    print("\nHydra's own options: --hydra-help")


def main(argv: list[str] | None = None) -> int:
    """`python run.py ...`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ[PROCESS_VARIABLE] = str(os.getpid())
    os.environ["NORMFREE_COMMAND"] = shlex.join(["python", "run.py", *argv])
    if "--help" in argv or "-h" in argv:
        print_help()
        return EXIT_OK
    try:
        argv, plugins = _take_plugins(argv)
        os.environ[PLUGINS_VARIABLE] = os.pathsep.join(plugins)
        _load_plugins()
        options, words = split_words(argv)
        multirun = "-m" in options or "--multirun" in options
        check_overrides(words, multirun)
    except UserError as error:
        return _fail(error)
    folder = Path("runs/.sweeps") / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{os.getpid()}"
    if multirun:
        words = [*words, f"hydra.sweep.dir={folder}"]
    sys.argv = [sys.argv[0], *options, *words]
    if not ConfigStore.instance().repo.get("schema.yaml"):
        ConfigStore.instance().store(name="schema", node=Config)
    try:
        _job()
    except SystemExit as stop:
        if multirun and folder.is_dir():
            _sweep_summary(folder)
        return stop.code if isinstance(stop.code, int) else EXIT_CONFIG
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    return _sweep_summary(folder) if multirun else EXIT_OK
