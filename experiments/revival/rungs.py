"""The rungs of the ladder: which cells each wants next, given the results there are.

A rung is a function of the results that yields cells in order of value and, for what cannot be named yet (a rate that
is still being chosen), how many cells will follow.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from revival.cells import (
    GPT2,
    PREFIX_STEPS,
    PUBLISHED_LR,
    PUBLISHED_WARMUP,
    PYTHIA,
    RATES,
    SHORT_PYTHIA,
    SHORT_STEPS,
    SHORT_T256,
    SHORT_WARM,
    SHORT_WARMUP,
    SMOKE,
    Arm,
    Cell,
    Recipe,
    config_of,
    full,
    gpt2,
    length,
    prefix_final,
    slope_decay,
)
from revival.study import Results, Steps, Study, Waiting, chosen, fixed, later, tuned
from revival.tuning import around, between, common_rate

Rung = Callable[[Results], Steps]


def norms(act: str, norm: str = "none") -> dict[str, Any]:
    return {"model.norm": norm, "model.act": act}


FOUR = tuple(
    Arm(("ln+" if norm == "layernorm" else "") + act, norms(act, norm))
    for norm in ("layernorm", "none")
    for act in ("gelu", "relu")
)
FREE = {arm.name: arm for arm in FOUR}


def variant(base: str, name: str, **keys: Any) -> Arm:
    """An arm with other settings; `__` stands for a dot."""
    return Arm(base + name, FREE[base].keys | {key.replace("__", "."): value for key, value in keys.items()})


def prefixed(prefix: str, arms: Sequence[Arm] = FOUR) -> list[Arm]:
    return [Arm(f"{prefix}:{arm.name}", arm.keys) for arm in arms]


# -- scale smoke: does the machinery run -------------------------------------------------------------------------------


SMOKE_LR = 5e-3


def smoke_cells(seed: int = 1) -> list[Cell]:
    return [Cell("A", arm, SMOKE, SMOKE_LR, seed) for arm in FOUR]


def smoke_a(results: Results) -> Steps:
    for seed in results.seeds:
        yield from smoke_cells(seed)


# -- scale short -------------------------------------------------------------------------------------------------------


def base(arm: str) -> Study:
    """An arm of rung A."""
    return Study("A", FREE[arm], SHORT_PYTHIA, RATES)


def short_a(results: Results) -> Steps:
    """Does ReLU beat GELU without norms at tuned rates, and the other way round with them?"""
    return tuned([base(arm.name) for arm in FOUR], results, common=True)


def short_a2(results: Results) -> Steps:
    """The four arms with half a step on both sides of their optimum; rung A's runs at its rates count here too."""
    rates = {arm: chosen(base(arm), results) for arm in ("relu", "gelu", "ln+relu", "ln+gelu")}
    studies = {arm: Study("A2", FREE[arm], SHORT_PYTHIA, between(rate) if rate else ()) for arm, rate in rates.items()}
    theirs = {arm: results.tuning(base(arm)) for arm in rates}
    for step in tuned([studies[arm] for arm, rate in rates.items() if rate], results):
        if isinstance(step, Waiting) or step.lr not in theirs[step.arm.name]:
            yield step
    if waiting := [studies[arm] for arm, rate in rates.items() if not rate]:
        yield later(waiting, results, "at rates around those that rung A is still choosing")


def short_a3(results: Results) -> Steps:
    """The four arms with half of the run as warm-up, and rates of their own around those of rung A."""
    arms = prefixed("warmup")
    rates = [chosen(base(arm.name), results) for arm in FOUR]
    studies = [
        Study("A3", arm, SHORT_WARM, around(rate or PUBLISHED_LR)) for arm, rate in zip(arms, rates, strict=True)
    ]
    known = [study for study, rate in zip(studies, rates, strict=True) if rate]
    if known:
        yield from tuned(known, results)
    if waiting := [study for study in studies if study not in known]:
        yield later(waiting, results, "at rates around those that rung A is still choosing")


WIDTH, STD = 512, 0.02  # of Pythia-70M, and of its initial embeddings, whose RMS is therefore .02
EMBED_SCALES = (round(math.sqrt(WIDTH), 3), round(1 / STD, 3))
NO_BIAS = {"model__bias__mlp_fc": False, "model__bias__mlp_proj": False}
MECHANISM = {  # arm of rung A -> arms made of it
    "gelu": (
        *(variant("gelu", f"+embed{scale:g}", model__embed_scale=scale) for scale in EMBED_SCALES),
        *(variant("gelu", f"+beta{beta}", model__act_beta=float(beta)) for beta in (10, 60)),
        variant("gelu", "-ffbias", **NO_BIAS),
        variant("gelu", "+depth", model__init__depth_scaled=True),
    ),
    "relu": (
        *(variant("relu", f"+embed{scale:g}", model__embed_scale=scale) for scale in EMBED_SCALES),
        variant("relu", "-ffbias", **NO_BIAS),
        variant("relu", "+depth", model__init__depth_scaled=True),
    ),
    "ln+gelu": (variant("ln+gelu", f"+embed{EMBED_SCALES[0]:g}", model__embed_scale=EMBED_SCALES[0]),),
}


AT_COMMON = ("+embed", "+beta")  # what changes the scale is run at rung A's common rate as well


def short_b(results: Results) -> Steps:
    """Is it the scale of the input? Pythia has biases in its feed-forward layers, so the arm takes them away.

    At each arm's own rate, then, where only the scale differs, at the common rate of rung A.
    """
    studies: list[Study] = []
    waiting: list[Study] = []
    for arm, variants in MECHANISM.items():
        rate = chosen(base(arm), results)
        found = [Study("B", other, SHORT_PYTHIA, around(rate or PUBLISHED_LR)) for other in variants]
        (studies if rate else waiting).extend(found)
    if studies:
        yield from tuned(studies, results)
    if waiting:
        yield later(waiting, results, "at rates around those that rung A is still choosing")
    common = common_rate([results.tuning(base(arm.name)) for arm in FOUR])
    scaled = [s for s in studies if any(part in s.arm.name for part in AT_COMMON) and not s.arm.name.startswith("ln+")]
    if common is not None:
        yield from fixed([(study, common) for study in scaled], results)


def short_c(results: Results) -> Steps:
    """GPT-2 124M: the published schedule up to a tenth of it, and rates tuned at the length of rung A."""
    prefix = gpt2(length(PREFIX_STEPS, PUBLISHED_WARMUP) | {"optim.lr_final": prefix_final(PREFIX_STEPS)}, PREFIX_STEPS)
    own = gpt2(length(SHORT_STEPS, SHORT_WARMUP), SHORT_STEPS)
    faithful = [Study("C", arm, prefix, ()) for arm in prefixed("faithful_prefix")]
    yield from fixed([(study, PUBLISHED_LR) for study in faithful], results)
    yield from tuned([Study("C", arm, own, around(PUBLISHED_LR)) for arm in prefixed("tuned")], results)


COLLAPSE_STEPS = PUBLISHED_WARMUP  # the published warm-up, all of it


def short_d(results: Results) -> Steps:
    """The softmax-only model: stopped at its first bad step and looked at, and the original's NaN figure."""
    recipe = gpt2(length(COLLAPSE_STEPS, COLLAPSE_STEPS) | {"diagnostics.watch": "all"}, COLLAPSE_STEPS)
    stopped = Arm("stopped:identity", norms("identity") | {"nan_policy": "raise"})
    regardless = Arm("paper_nan:identity", norms("identity") | {"nan_policy": "log", "train.precision": "fp16"})
    yield from fixed([(Study("D", arm, recipe, ()), PUBLISHED_LR) for arm in (stopped, regardless)], results)


def slope_arm(scope: str, start: float, name: str, **keys: Any) -> Arm:
    own = {"model.act_scope": scope, "model.act_slope": start}
    return Arm(f"{scope}:{start:g}:{name}", norms("learnable_leaky_relu") | own | keys)


def short_e(results: Results) -> Steps:
    """Do learned slopes go to zero without decay? One slope for all layers, or one a layer; at ReLU's own best rate."""
    rate = chosen(base("relu"), results)
    optim = config_of(base("relu").cell(rate or PUBLISHED_LR, 1)).optim
    decay = float(f"{slope_decay(optim, SHORT_PYTHIA.steps):.6g}")
    decays: dict[str, dict[str, Any]] = {
        "nodecay": {"optim.decay_slopes": False},
        "decay": {"optim.decay_slopes": decay},
    }
    arms = [
        slope_arm(scope, start, name, **keys)
        for name, keys in decays.items()
        for scope in ("global", "per_layer")
        for start in (0.01, 0.1, 0.25)
    ]
    yield from fixed([(Study("E", arm, SHORT_PYTHIA, ()), rate) for arm in arms], results)


# Depth-scaled initial values are one more: rung B has them, at rates of their own.
DEVIATIONS: dict[str, dict[str, Any]] = {
    "-finalnorm": {"model__final_norm": "none"},
    "+dropout": {"model__dropout__embed": 0.1},
    "+fp16": {"train__precision": "fp16"},
}


def short_f(results: Results) -> Steps:
    """The final norm, and what the original did otherwise, one at a time, at the base arm's own best rate."""
    found = [
        (Study("F", variant(arm, name, **keys), SHORT_PYTHIA, ()), chosen(base(arm), results))
        for name, keys in DEVIATIONS.items()
        for arm in ("gelu", "relu")
    ]
    yield from fixed(found, results)


def short_g(results: Results) -> Steps:
    """T = 256, as many tokens a step, at the rates of T = 128."""
    found = [Study("G", arm, SHORT_T256, ()) for arm in prefixed("t256")]
    rates = [chosen(base(arm.name), results) for arm in FOUR]
    yield from fixed(list(zip(found, rates, strict=True)), results)


# -- scale full: the published recipe ----------------------------------------------------------------------------------

FULL_PYTHIA, FULL_GPT2, FULL_T256 = full(PYTHIA, 0.045), full(GPT2, 0.1), full(PYTHIA, 0.09, 256)


def _published(rung: str, recipe: Recipe, arms: Sequence[Arm], results: Results) -> Steps:
    return fixed([(Study(rung, arm, recipe, ()), PUBLISHED_LR) for arm in arms], results)


def full_a(results: Results) -> Steps:
    return _published("A", FULL_PYTHIA, FOUR, results)


def full_c(results: Results) -> Steps:
    return _published("C", FULL_GPT2, prefixed("faithful"), results)


def full_d(results: Results) -> Steps:
    keys = {"nan_policy": "log", "train.precision": "fp16"}
    return _published("D", FULL_GPT2, [Arm("paper_nan:identity", norms("identity") | keys)], results)


def full_e(results: Results) -> Steps:
    """With the decay of the authors' code, and without."""
    decays = {"nodecay": {"optim.decay_slopes": False}, "decay": {"optim.decay_slopes": True}}
    scopes = ("global", "per_layer")
    arms = [slope_arm(scope, 0.01, name, **keys) for name, keys in decays.items() for scope in scopes]
    return _published("E", FULL_GPT2, arms, results)


def full_g(results: Results) -> Steps:
    return _published("G", FULL_T256, prefixed("t256"), results)


LADDER: dict[str, dict[str, Rung]] = {
    "smoke": {"A": smoke_a},
    "short": {
        "A": short_a,
        "A2": short_a2,
        "A3": short_a3,
        "B": short_b,
        "C": short_c,
        "D": short_d,
        "E": short_e,
        "F": short_f,
        "G": short_g,
    },
    "full": {"A": full_a, "C": full_c, "D": full_d, "E": full_e, "G": full_g},
}
