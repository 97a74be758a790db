"""The rungs of the study at a glance, for a reader of its page who knows none of their names."""

import textwrap
from dataclasses import dataclass

from revival import words
from revival.cells import GPT2, PUBLISHED_T, PYTHIA, Recipe
from revival.rungs import LADDER
from revival.study import Results, Waiting

ASKED = {
    "A": "Does ReLU beat GELU without norms, at tuned rates, and the other way round with them?",
    "A2": "Does the answer hold between the rates? Added after rung A was seen",
    "A3": "Does the answer hang on the warm-up? Added after rungs A to C were seen",
    "B": "Is it scale, of the embeddings or of the activation's input?",
    "C": "The same as A: does it hold for a larger model, at the published schedule and at tuned rates?",
    "D": "What becomes of the model without norms and activation?",
    "E": "Do learned slopes of leaky ReLU go to zero?",
    "F": "What do the final norm and the original's deviations do, one at a time?",
    "G": "The same as A: does it hold for sequences twice as long?",
}
MODELS: dict[tuple[str, ...], str] = {
    PYTHIA: "Pythia-70M's dimensions",
    GPT2: "GPT-2's dimensions",
}  # by the first words of a recipe
FOUR = "LayerNorm or no block norms, GELU or ReLU"
ARMS = {
    "A": FOUR,
    "A2": f"{FOUR}; rates half a step below and above rung A's, and rung A's own",
    "A3": f"`warmup:`, half of the run instead of a quarter; each {FOUR}",
    "B": "GELU and ReLU with embeddings x \u221ad or x 50, without feed-forward biases, or with depth-scaled initial "
    "values; GELU(10x)/10 and GELU(60x)/60; LayerNorm + GELU with embeddings x \u221ad",
    "C": f"`faithful_prefix:`, the first tenth of the published schedule at its rate, and `tuned:`; each {FOUR}",
    "D": "`stopped:` at the first bad step; `paper_nan:`, fp16, which nothing stops",
    "E": "one slope for all layers or one a layer, start 0.01, 0.1 or 0.25, no decay or decay of the original's total",
    "F": "GELU and ReLU with no final norm, embedding dropout .1, or fp16",
    "G": FOUR,
}
EXAMPLES = ("ln+relu", "gelu+embed22.627", "relu-ffbias", "per_layer:0.01:nodecay")
NAMES = (
    "How names are read: a cell is one training run, rung/arm/peak rate/seed: `A/gelu/lr1e-3/s1`. An arm is an "
    "activation, with `ln+` before it where the blocks have norms (no block has one elsewhere), and behind it what was "
    "changed; a recipe of its own "
    "stands before a colon (`faithful_prefix:`, at scale full `faithful:`; `tuned:`, `warmup:`, `stopped:`, "
    "`paper_nan:`, `t256:`). So {examples}."
)


@dataclass(frozen=True)
class Rung:
    """`recipes`: of each cell; `arms`: each once. In the order of the ladder."""

    recipes: tuple[Recipe, ...]
    arms: tuple[str, ...]

    @property
    def shape(self) -> list[str]:
        """Model, T, tokens a cell."""
        models = [MODELS[recipe.groups[:1]] for recipe in self.recipes]
        lengths = [str(recipe.keys.get("data.seq_len", PUBLISHED_T)) for recipe in self.recipes]
        tokens = [words.millions(recipe.tokens) for recipe in self.recipes]
        return [" and ".join(dict.fromkeys(parts)) for parts in (models, lengths, tokens)]


def rung_of(scale: str, rung: str) -> Rung:
    """What a rung is made of, whatever has been trained."""
    recipes: list[Recipe] = []
    arms: list[str] = []
    for step in LADDER[scale][rung](Results([], None)):
        recipes.append(step.recipe)
        arms += step.arms if isinstance(step, Waiting) else [step.arm.name]
    return Rung(tuple(recipes), tuple(dict.fromkeys(arms)))


def rungs() -> list[str]:
    """The table of the rungs, and how names are read."""
    rows = []
    for rung in LADDER["short"]:
        ours = rung_of("short", rung)
        rows.append([rung, ASKED[rung], *ours.shape, f"{len(ours.arms)}: {ARMS[rung]}", _full(rung, ours)])
    columns = ("rung", "question", "model", "T", "tokens a cell", "arms", "at scale full")
    names = NAMES.format(examples="; ".join(f"`{arm}` is {words.arm_words(arm)}" for arm in EXAMPLES))
    return ["## The rungs", "", *words.table(columns, rows), "", *textwrap.wrap(names, 120, break_on_hyphens=False), ""]


def _full(rung: str, short: Rung) -> str:
    """How the rung differs where the published recipe is trained."""
    if rung not in LADDER["full"]:
        return "not there"
    full = rung_of("full", rung)
    model, _, tokens = full.shape
    other = f"{model}, " if model != short.shape[0] else ""
    fewer = f", {len(full.arms)} of the {len(short.arms)} arms" if len(full.arms) < len(short.arms) else ""
    return f"{other}{tokens}{fewer}"
