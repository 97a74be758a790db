"""docs/relu-revival.md and its figures, from whatever part of the results is there. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

from normfree.records import write_atomically
from revival import (
    budget,
    figures,
    figures_rates,
    figures_scale,
    figures_seeds,
    front,
    overview,
    prose,
    tables,
    words,
)
from revival.cases import CASES
from revival.cells import PUBLISHED_T, SHORT_PYTHIA, Cell
from revival.differences import differences
from revival.plan import plan
from revival.records import RESULTS
from revival.study import Results
from revival.tuning import REFINED
from revival.verdicts import QUESTIONS
from revival.view import FAR, SCALES, View, views

NOT_RUN = ": not run."


class Named(Results):
    """Results by name alone: what was trained under a cell's name, whatever its settings were."""

    def __init__(self, view: View | None) -> None:
        records = view.records if view else ()
        named = [record | {"key": record["name"]} for record in records]
        for rung, other in REFINED.items():
            ours = [record for record in records if record["rung"] == other]
            named += [r | {"key": r["name"].replace(f"{other}/", f"{rung}/", 1)} for r in ours]
        super().__init__(named, view.fingerprint if view else None)

    def key(self, cell: Cell) -> str:
        return cell.name


def write(out: Path, docs: Path) -> Path:
    """Draw the figures and write the page; returns its path."""
    folder = docs / "figures" / "relu_revival"
    found = views(out)
    lines = [_intro(out), *overview.rungs(), *_answers(found), _method(found)]
    for view in found:
        lines += _scale(view, folder, docs)
    cell = SHORT_PYTHIA
    commands = prose.COMMANDS.format(training=cell.steps * cell.step_seconds, all=cell.seconds)
    lines += [*_costs(found), *_not_run(found), commands]
    path = docs / "relu-revival.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(lines).rstrip() + "\n")
    return path


def _method(found: Sequence[View]) -> str:
    head_tokens = SHORT_PYTHIA.head_sequences * PUBLISHED_T
    return prose.METHOD.format(far=FAR, unigram=_unigram(found), head_tokens=head_tokens)


def _intro(out: Path) -> str:
    """What the page is made of, without a machine's paths where it is the study's own."""
    if out.resolve() != RESULTS:
        return prose.INTRO.format(out=f" --out {out}", folder=out)
    return prose.INTRO.format(out="", folder=RESULTS.relative_to(Path(__file__).resolve().parents[2]).as_posix())


def _unigram(found: Sequence[View]) -> str:
    """Of the tokens that are reported: ` (6.84)`."""
    known = {f"{r['unigram_entropy']:.2f}" for view in _studies(found) for r in view.records if "unigram_entropy" in r}
    return f" ({', '.join(sorted(known))} on val)" if known else ""


def _studies(found: Sequence[View]) -> list[View]:
    """Scale smoke shows that the machinery runs; nothing follows from it."""
    return [view for view in found if view.scale != "smoke"]


def _answers(found: Sequence[View]) -> list[str]:
    lines = ["## Answers", ""]
    if not _studies(found):
        return [*lines, "Not run: there is no result of scale short or full yet.", ""]
    for view in _studies(found):
        lines += [f"Scale {view.scale}, corpus `{view.fingerprint[:12]}`. {prose.LEGEND}", "", *front.at_a_glance(view)]
        for question, answer in QUESTIONS.items():
            lines += [f"**{question}**", "", *(f"- {line}" for line in _gathered(answer(view))), ""]
    return lines


def _gathered(lines: Sequence[str]) -> list[str]:
    """What was not run is one line, the last."""
    ran = [line[0].upper() + line[1:] for line in lines if not line.endswith(NOT_RUN)]
    missing = [line.removesuffix(NOT_RUN) for line in lines if line.endswith(NOT_RUN)]
    if not ran:
        return ["Not run."]
    return ran + ([f"Not run: {'; '.join(missing)}."] if missing else [])


def _scale(view: View, folder: Path, docs: Path) -> list[str]:
    lines = [f"## Results: scale {view.scale}, corpus `{view.fingerprint[:12]}`", "", _provenance(view), ""]
    if view.scale == "smoke":
        lines += [
            "Little models and a few steps: a check that the machinery runs. **Nothing follows from these numbers.**",
            "",
        ]
    for rung in view.rungs():
        note = [prose.NOTES[rung], ""] if rung in prose.NOTES else []
        title = prose.TITLES[rung] if view.scale != "smoke" else "Four arms of a nano model, at one rate"
        lines += [f"### {title}", "", *note, *_rung(view, rung), *_figures(view, rung, folder, docs)]
    return lines


def _provenance(view: View) -> str:
    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(record[name] or "unknown") for record in view.records))

    torch = ", ".join(dict.fromkeys(record["versions"]["torch"] for record in view.records))
    hours = budget.gpu_seconds(view.records) / 3600
    n = len(view.records)
    ran = f"{n} {'cell' if n == 1 else 'cells'}, {hours:.1f} hours of {all_of('device')}; PyTorch {torch}"
    return f"{ran}; {all_of('precision')}; tokenizer {all_of('tokenizer')}; commits {all_of('commit')}."


def _rung(view: View, rung: str) -> list[str]:
    parts = [("At each arm's own rate:", tables.results(view, rung))]
    common = view.common_rate(rung)
    if common is not None:
        title = f"At the common rate, {words.rate_name(common)} (lowest sum over arms, none lost):"
        parts.append((title, tables.results(view, rung, common)))
    parts += [
        ("Paired differences:", differences(view, rung)),
        ("Loss against peak rate, seed 101, on the tokens that choose rates:", tables.rates(view, rung)),
        ("Inside:", tables.mechanism(view, rung) if rung in ("A", "B") else []),
        ("What replacing heads' attention costs (nats):", tables.heads(view, rung)),
        ("", tables.lost_runs(view, rung)),
        ("", tables.bad_steps(view, rung)),
    ]
    lines: list[str] = []
    for title, table in parts:
        if table:
            lines += [*([title, ""] if title else []), *table, ""]
    accounts = [r for r in view.reported(rung, "stopped:identity") if (r["lost"] or {}).get("account")]
    if accounts:
        lines += [
            "The flight recorder's account of the first of them:",
            "",
            "```",
            accounts[0]["lost"]["account"].rstrip(),
        ]
        lines += ["```", ""]
    return lines


def _figures(view: View, rung: str, folder: Path, docs: Path) -> list[str]:
    """The pictures of a rung, drawn now."""
    drawn: list[tuple[str, Path]] = []
    T = next(record["T"] for record in view.records if record["rung"] == rung)
    for name, path in figures_rates.loss_against_rate(view, rung, folder).items():
        drawn.append((_caption(name), path))
    for prefix in (prefix for four, prefix, _ in CASES if four == rung):
        for name, path in figures.maps(view, rung, folder, prefix).items():
            drawn.append((_caption(name, T) + (f" ({prefix.rstrip(':')})" if prefix else ""), path))
    for draw in (figures_seeds.seeds, figures_scale.mechanism, figures.heads, figures.trajectories):
        drawn += [(_caption(name), path) for name, path in draw(view, rung, folder).items()]
    return [line for words_, path in drawn for line in (f"![{words_}]({path.relative_to(docs).as_posix()})", "")]


def _caption(name: str, T: int = PUBLISHED_T) -> str:
    theirs = T == PUBLISHED_T
    return {
        "rates": "Loss against peak learning rate, on the seed and the tokens that rates are chosen by",
        "maps": "Entropy of every head at the end, one seed" + ", with the published maps (GPT-2 124M)" * theirs,
        "ranges": "Share of heads in each quarter of the ceiling, one seed"
        + ", with the shares in the published maps" * theirs,
        "layers": "Entropy by layer over steps, one seed",
        "seeds": "Every seed's loss at its arm's own rate",
        "heads": "Change of loss when a head's attention is replaced, against its entropy (grey: overloaded), heads of "
        "all seeds",
        "spread": "Spread of pre-activations by layer, one line per run; no panel where all runs were lost",
        "left": "Share of heads that have left the ceiling over steps, one line per run",
        "slopes": "Learned slopes over steps",
        "nan": "NaN or Inf over steps",
    }[name]


def _costs(found: Sequence[View]) -> list[str]:
    text = [
        '"Expected" is the recipe\'s estimate for a cell alone on an H200; a call with `--budget-minutes` begins no',
        "cell that would end later. A cell that shares a GPU takes longer, and counts with its part of the time. The",
        "first steps end when both graphs are compiled.",
    ]
    return ["## What it costs", "", *text, "", *budget.costs(found), ""]


def _latest(found: Sequence[View], scale: str) -> View | None:
    """The results that count as run: on the last text; at scale full on any, as each length has a text of its own."""
    ours = [view for view in found if view.scale == scale]
    if scale == "full" and ours:
        return View(scale, ours[-1].fingerprint, tuple(record for view in ours for record in view.records))
    return ours[-1] if ours else None


def _not_run(found: Sequence[View]) -> list[str]:
    """What the ladder still asks for, by name."""
    lines = ["## Not run", ""]
    for scale in SCALES:
        if scale == "smoke":
            continue
        rest = plan(scale, Named(_latest(found, scale)))
        cells = [cell for cell in rest.cells if not cell.tuning]
        for rung in dict.fromkeys(cell.rung for cell in rest.cells):
            names = dict.fromkeys(f"{c.arm.name} at {words.rate_name(c.lr)}" for c in cells if c.rung == rung)
            tuning = sum(cell.tuning for cell in rest.cells if cell.rung == rung)
            n = sum(cell.rung == rung for cell in cells)
            text = f"{n} runs ({'; '.join(names)})" if names else ""
            parts = [text, f"{tuning} runs that choose rates" if tuning else ""]
            lines.append(f"- {scale}, rung {rung}: {' and '.join(part for part in parts if part)}")
        lines += [f"- {scale}, rung {w.rung}: about {w.cells} runs; {w.why}" for w in rest.waiting]
        for key, needy in rest.impossible.items():
            lines.append(f"- {scale}: needs the setting `{key}`: {', '.join(cell.name for cell in needy)}")
    return [*lines, ""]
