"""The words of a command, options and `key=value`: everything wrong with them is found before Hydra acts on any."""

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normfree.config import Config, help_lines
from normfree.errors import UserError, unknown
from normfree.kinds import shown
from normfree.rules import CHOICES, KEYS

CONF = Path(__file__).resolve().parent.parent / "conf"
SECTIONS = {name[: m.start()] for name in KEYS for m in re.finditer(r"\.", name)}
LONGEST_SWEEP = 10_000  # jobs

# Hydra's options that are passed on. Others would read configurations from elsewhere, or a pickled job.
FLAGS = {"-m", "--multirun", "--resolve", "--hydra-help", "--version"}
VALUED = {"-c", "--cfg", "-p", "--package", "-i", "--info"}
LISTINGS = {"-c", "--cfg", "-i", "--info", "--hydra-help", "--version"}

USAGE = """\
python run.py [model=...] [size=...] [norm=...] [act=...] [data=...] [experiment=...] [key=value ...]
python run.py -m key=a,b ...          a sweep; in parallel with hydra/launcher=joblib
python run.py --plugin FILE.py ...    with norms, activations or statistics of your own"""
HYDRAS_OWN = "Hydra's own options: --hydra-help"


@dataclass
class Typed:
    """What was typed: the overrides without fault, the keys of the others, and what is wrong, one entry a fault."""

    good: list[Override] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def plain(self) -> list[str]:
        """The words that are the same for all jobs of a sweep."""
        return [o.input_line for o in self.good if not o.is_sweep_override() and o.input_line]

    def swept_groups(self) -> Iterator[str]:
        """Each choice of a file in a sweep, as a word."""
        choices = groups()
        for override in self.good:
            if override.is_sweep_override() and override.key_or_group in choices:
                for value in values_of(override):
                    yield f"{override.key_or_group}={value}"


def groups() -> dict[str, list[str]]:
    """What can be chosen as a file: group -> names."""
    return {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()}


def split_words(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(Hydra's options with their values, key=value words, plug-ins), wherever the user put them."""
    argv, plugins = _take_plugins(argv)
    options, words, rest = [], [], iter(argv)
    for word in rest:
        name = word.partition("=")[0]
        if not word.startswith("-"):
            words.append(word)
        elif word in FLAGS or name in VALUED:
            options += [word] if "=" in word or word in FLAGS else [word, *islice(rest, 1)]
        else:
            close = get_close_matches(name, sorted(FLAGS | VALUED | {"--plugin", "--help"}), n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UserError(
                f"unknown option {word:.100}.{hint} Settings are words, key=value, and presets are files in conf/."
            )
    return options, words, plugins


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


def lists(options: list[str]) -> bool:
    """Whether one of Hydra's options prints something in place of training."""
    return bool(LISTINGS.intersection(option.partition("=")[0] for option in options))


def help_text() -> str:
    """Usage, choices and every key with its default and meaning."""
    choices = [f"  {name:11} {', '.join(names)}" for name, names in sorted(groups().items())]
    keys = [f"  {line}" for line in help_lines()]
    return "\n".join([USAGE, "", "Choices", *choices, "", "Keys (* changes the weights)", *keys, "", HYDRAS_OWN])


def parse(words: list[str]) -> tuple[list[Override], list[str]]:
    """(overrides, what is wrong with the words that are none)."""
    overrides = []
    words, problems = _together(words)
    for word in words:
        try:
            overrides.append(_parser().parse_override(word))
        except (HydraException, ValueError):
            problems.append(_refusal(word))
        except RecursionError:
            problems.append(f"{word:.100}: too many brackets in brackets.")
    return overrides, problems


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def read(words: list[str], multirun: bool) -> Typed:
    """Look at every word by itself; of `multirun`, at what a sweep may say. Reads no file but the names in conf/."""
    overrides, problems = parse(words)
    typed = Typed(problems=problems)
    for override in overrides:
        found = list(_faults(override))
        if override.is_sweep_override() and not multirun:
            found.append(f"{override.key_or_group}: several values are a sweep; add -m (python run.py -m ...).")
        if multirun and override.key_or_group == "run_dir" and not override.is_sweep_override():
            found.append("run_dir: the jobs of a sweep cannot share one directory. Leave it null: each names its own.")
        typed.problems += found
        if found:
            typed.bad.add(override.key_or_group)
        else:
            typed.good.append(override)
    jobs = math.prod(sum(1 for _ in values_of(o)) for o in typed.good if o.is_sweep_override())
    if jobs > LONGEST_SWEEP:
        typed.problems.append(f"a sweep of {jobs} jobs is more than {LONGEST_SWEEP}.")
    return typed


# -- one word ---------------------------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _said(name: str, value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else shown(value)
    return f"{name}={text:.100}"


def values_of(override: Override) -> Iterator[Any]:
    """The value, or all values of a sweep, as plain Python. Raises HydraException for what cannot be enumerated."""
    if override.is_sweep_override():
        yield from (_plain(value) for value in override.sweep_iterator())
    else:
        yield override.value()


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value.text if isinstance(value, QuotedString) else value


def _sweep_fault(override: Override) -> str | None:
    """A sweep that never ends, or cannot be enumerated."""
    sweep = override.value()
    if isinstance(sweep, RangeSweep):
        count = (sweep.stop - sweep.start) / sweep.step if sweep.step else math.nan  # type: ignore[operator]
        if not count <= LONGEST_SWEEP:  # NaN is no count
            return f"a range of more than {LONGEST_SWEEP} values, or without end."
    if isinstance(sweep, IntervalSweep):
        return "an interval has no values to go through; name them, or give a range."
    try:
        next(values_of(override), None)
    except HydraException as error:
        return f"name the values ({_first_line(error)})."
    return None


def unknown_key(name: str, known: list[str]) -> str:
    """The key that was probably meant, and the keys of its section; all of them would fill a page."""
    section = name.rpartition(".")[0]
    siblings = [key for key in known if key.rpartition(".")[0] == section] or sorted(SECTIONS)
    close = get_close_matches(name[:100], known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown key {name[:100]!r}.{hint} There are: {', '.join(siblings)} (all keys: python run.py --help)."


def _faults(override: Override) -> Iterator[str]:
    name = override.key_or_group
    if override.is_add() or override.is_delete() or override.package is not None:
        yield f"{override.input_line}: keys are neither added nor removed here; write key=value."
        return
    if not name:
        yield f"{override.input_line:.100}: the key is missing; write key{override.input_line:.100}."
        return
    if override.is_sweep_override() and (fault := _sweep_fault(override)):
        yield f"{name}: {fault}"
        return
    choices = groups()
    if re.split(r"[./]", name)[0] == "hydra":
        yield from _hydra_faults(override)
    elif name in choices:
        for value in values_of(override):
            if value is None:
                yield f"{name}=null: leave the word out, and nothing is chosen from conf/{name}."
            elif str(value) not in choices[name]:
                known = isinstance(value, str) and value in CHOICES.get(f"model.{name}", ())
                own = f" Your own is typed model.{name}={value}." if known else ""
                yield f"{_said(name, value)}: " + unknown(name, value, choices[name]) + own
    elif name not in KEYS and name not in SECTIONS:
        yield unknown_key(name, [*KEYS, *choices])
    else:
        for value in values_of(override):
            yield from _value_faults(name, value)


def _value_faults(name: str, value: Any) -> Iterator[str]:
    if _looks_up(value):
        yield f"{_said(name, value)}: write the value itself."
        return
    if name in SECTIONS:
        yield from _section_faults(name, value)
        return
    try:
        OmegaConf.update(OmegaConf.structured(Config), name, value)
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        yield f"{_said(name, value)}: {_first_line(error)}"


def _section_faults(name: str, value: Any) -> Iterator[str]:
    """Of several keys in braces, `debug.inject={step:20,module:wte}`: each is looked at like a word of its own."""
    if not isinstance(value, dict):
        yield f"{_said(name, value)}: {_of_section(name)}"
        return
    for key, part in value.items():
        path = f"{name}.{key}"
        if "." in str(key):
            yield f"{name}={{{key}:...}}: write {path}=VALUE, a word of its own."
        elif path in KEYS or path in SECTIONS:
            yield from _value_faults(path, part)
        else:
            yield unknown_key(path, list(KEYS))


def _of_section(name: str) -> str:
    return f"a section of keys; there are: {', '.join(key for key in KEYS if key.startswith(f'{name}.'))}."


def _looks_up(value: Any) -> bool:
    """Whether a value, or part of it, is to be taken from somewhere else: a key, the environment, a resolver."""
    if isinstance(value, dict):
        return any(_looks_up(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return any(_looks_up(item) for item in value)
    return isinstance(value, str) and ("${" in value or value == "???")


def _hydra_faults(override: Override) -> Iterator[str]:
    """Of Hydra's own settings the launcher is taken: it decides where the jobs of a sweep run, and nothing else."""
    name = override.key_or_group
    key = re.fullmatch(r"hydra\.launcher\.[a-z]\w*", name)
    if name != "hydra/launcher" and not key:
        yield f"{name}: of Hydra's settings only hydra/launcher=NAME and hydra.launcher.KEY=value can be given."
    elif override.is_sweep_override():
        yield f"{name}: one value for the whole sweep."
    elif _looks_up(override.value()) or not isinstance(override.value(), str | int | float | bool | None):
        yield f"{name}: write the value itself, one number or name."
    elif not key and not re.fullmatch(r"\w+", str(override.value())):
        yield f"{name}={override.value()}: the name of a launcher is needed, such as joblib."


# -- words that are no settings ---------------------------------------------------------------------------------------


def _together(words: list[str]) -> tuple[list[str], list[str]]:
    """The words, those of a setting with spaces around its = made one; and what is wrong with each of those."""
    whole, problems = [], []
    while words:
        count = _spaced(*words[:3])
        typed, word = " ".join(words[:count]), "".join(words[:count])
        if count == 1 or not word.endswith("="):
            whole.append(word)
        if count > 1:
            meant = f"{word}VALUE" if word.endswith("=") else shlex.quote(word)
            problems.append(f"{typed:.100}: write {meant:.100}, without spaces around =.")
        words = words[count:]
    return whole, problems


def _spaced(first: str, second: str = "", third: str = "=") -> int:
    """How many of three words in a row are one setting with spaces around its =; 1: the first is a word by itself."""
    if first and "=" not in first:
        if second == "=":
            return 2 if "=" in third else 3
        return 2 if second.startswith("=") else 1
    return 2 if first.find("=") == len(first) - 1 > 0 and second and "=" not in second else 1


def _refusal(word: str) -> str:
    """What is wrong with a word that Hydra cannot take apart, and what was probably meant."""
    name, sign, value = (part.strip() for part in word.partition("="))
    if not sign:
        return f"{word:.100}: {_bare(word)}"
    if not (name in KEYS or name in SECTIONS or name in groups() or name.startswith("hydra")):
        return unknown_key(name, [*KEYS, *groups()])
    plain = f"{name}={value.lstrip('= ')}"
    if plain != word and _taken(plain) is not None:
        spaces = "" if value.startswith("=") else ", without spaces around ="
        return f"{word:.100}: write {shlex.quote(plain):.100}{spaces}."
    if value.startswith(("[", "{")):
        return f"{word:.100}: a list is written [a,b] and several keys {{key:value}}, closed and without = inside."
    quoted = '{}="{}"'.format(name, value.replace('"', '\\"'))
    hint = f", in quotes of its own: {shlex.quote(quoted)}" if len(value) < 60 and _taken(quoted) == value else "."
    return f"{word:.100}: the value cannot be read. Write text with a sign in it such as ( {{ = or a quote{hint}"


def _taken(word: str) -> Any:
    """The value that Hydra reads in a word; None where it cannot."""
    try:
        return _parser().parse_override(word).value()
    except (HydraException, ValueError, RecursionError):
        return None


def _bare(word: str) -> str:
    """What was probably meant by a word without =."""
    choices = groups()
    key = re.fullmatch(r"([\w./]+)[:\s]\s*(\S.*)", word)
    if key and (key[1] in KEYS or key[1] in choices):
        return f"write {shlex.quote(f'{key[1]}={key[2]}'):.100}."
    if word in KEYS or word in choices:
        names = ", ".join(choices.get(word) or CHOICES.get(word, ()))
        return f"a key without a value; write {word}=VALUE{names and f' ({names})'}."
    if word in SECTIONS:
        return _of_section(word)
    meant = {name: f"{group}={name}" for group, names in choices.items() for name in names}
    if word in meant:
        return f"write {meant[word]}."
    meant |= {name: f"{name}=VALUE" for name in [*KEYS, *choices]}
    close = get_close_matches(word[:100], list(meant), n=1) if len(word) > 2 else []  # to a letter, all are near
    hint = f" Did you mean {meant[close[0]]}?" if close else ""
    return f"a setting is written key=value, a value with spaces in quotes.{hint} (All keys: python run.py --help)"
