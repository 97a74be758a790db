"""The arithmetic of `speed.py`: FLOPs of a token, kernels by class, what is wanted, and the table. No torch here."""

import re
from collections.abc import Iterator
from statistics import median
from typing import Any

from normfree.config import ModelConfig

# Classes of kernels by name: the first pattern that is found in it. A fused kernel has the names of all its parts.
FUSED = r"^triton_(poi|red|per)_fused_"
_MOVES = "_to_copy|clone|cat|copy|transpose|permute|view|reshape|slice|split|t|expand|unsqueeze|squeeze"
KERNEL_CLASSES = {
    "memory fills": r"Memset|FillFunctor|^triton_poi_fused_(new_)?(zeros|full)(_like)?_\d+$",
    "attention": rf"^(?!{FUSED}).*(flash|fmha|sdpa|attention)|^_(short|long)_(forward|backward)",
    "loss": r"(?i)softmax|nll_loss|cross_entropy|logsumexp|_xent",
    "entropy and counts": rf"^_(entropy_forward|summarize_\w+|count\w*)$|isnan|isinf|{FUSED}(?!.*add_).*vector_norm",
    "optimizer": r"(?i)adam|multi_tensor_apply|lpnorm",  # and the clip
    "matrix products": rf"(?i)^(?!{FUSED}).*(gemm|gemv|nvjet|cutlass|xmma|splitk|triton_tem_|matmul|_mm|_product)",
    "copies and casts": rf"Memcpy|CatArray|copy_kernel|^triton_poi_fused_((_|(?<=fused_))({_MOVES}))+_\d+$",
    # Where the residual stream's peak is taken with an addition to it, the addition is what costs.
    "element-wise": rf"triton_poi|elementwise|index|embedding|{FUSED}(?!.*layer_norm).*add_.*vector_norm",
    "reductions": r"triton_(red|per)|reduce_kernel|sort|scan",  # layer norms, bias gradients
    "other": "",
}

LABELS = {
    "ln": "LayerNorm + GELU",
    "none": "no norm + ReLU",
    "ln-plain": "LayerNorm + GELU, fast=false",
    "none-plain": "no norm + ReLU, fast=false",
    "peer-ln": "transformers, LayerNorm + GELU",
    "peer-none": "transformers, stripped + ReLU",
    "original": "transformers, the original's way",
}
OURS = ("ln", "none", "ln-plain", "none-plain")
# (ours, against): the least ratio that is wanted, by case.
RATIOS: dict[tuple[str, str], dict[str, float]] = {
    ("ln", "peer-ln"): {"512x128": 1.10, "64x1024": 1.10, "cpu": 1.3},
    ("none", "peer-none"): {"512x128": 1.15, "64x1024": 1.12, "cpu": 1.3},
    ("none", "peer-ln"): {"512x128": 1.25, "64x1024": 1.20},  # what a user gains by the change
    ("none", "original"): {"512x128": 3.8},
    ("none", "ln"): {},
    ("ln", "ln-plain"): {},
    ("none", "none-plain"): {},
}
LEAST_MFU = {("512x128", "none"): 0.66, ("64x1024", "none"): 0.66}
MOST_GIB = {("512x128", "ln"): 20.0, ("512x128", "none"): 20.0}
MOST_DATA = 0.01  # share of a step
LONGEST, NAME = 40, 100  # kernels of a profile that a file keeps, and characters of their names


def flops_per_token(model: ModelConfig, T: int) -> int:
    """6 N + 12 L C T, N = 12 L C^2 + V C: forward and backward, embeddings looked up, attention over all T keys."""
    L, C, V = model.n_layer, model.n_embd, model.vocab_size
    assert V is not None, "the configuration is not resolved"
    return 6 * (12 * L * C * C + V * C) + 12 * L * C * T


def kernel_class(name: str) -> str:
    return next(label for label, pattern in KERNEL_CLASSES.items() if re.search(pattern, name))


def kernel_classes(kernels: dict[str, float]) -> dict[str, float]:
    """Milliseconds of each class, from those of each kernel."""
    times = dict.fromkeys(KERNEL_CLASSES, 0.0)
    for name, ms in kernels.items():
        times[kernel_class(name)] += ms
    return times


def kept(row: dict[str, Any]) -> dict[str, Any]:
    """What a file of results has of a case: of each profile the classes, and its longest kernels by short names."""
    profiles = row.get("kernels", {})
    classes = {of: kernel_classes(found) for of, found in profiles.items()}
    return row | {"kernels": {of: _longest(found) for of, found in profiles.items()}, "kernel_classes": classes}


def _longest(kernels: dict[str, float]) -> dict[str, float]:
    times: dict[str, float] = {}
    for name, ms in kernels.items():  # kernels that differ in what is cut off are one
        times[name[:NAME]] = times.get(name[:NAME], 0.0) + ms
    return dict(sorted(times.items(), key=lambda item: -item[1])[:LONGEST])


def summarize(row: dict[str, Any]) -> None:
    """Add to each model of a case its median `ms`, `tokens_per_second` and, where the rate was measured, `mfu`."""
    tokens = row["batch"] * row["T"]
    for model in row["models"].values():
        model["ms"] = median(model["turns_ms"])
        model["tokens_per_second"] = 1000 * tokens / model["ms"]
        if row.get("rates"):
            model["mfu"] = row["flops_per_token"] * model["tokens_per_second"] / median(row["rates"])


def ratio(row: dict[str, Any], ours: str, against: str) -> float:
    """How many times as fast: round by round, so that a drift of the clock cancels; their median."""
    times = row["models"][ours]["turns_ms"], row["models"][against]["turns_ms"]
    return median(theirs / own for own, theirs in zip(*times, strict=True))


def comparisons(row: dict[str, Any]) -> Iterator[tuple[str, str | None, float | None, float | None]]:
    """(ours, against, ratio, least wanted) of a case; of ours without a counterpart, the name alone."""
    models = row["models"]
    pairs = [(ours, against) for ours, against in RATIOS if ours in models and against in models]
    if row["case"] == "cpu":  # only a model and its peer took turns
        pairs = [(ours, against) for ours, against in pairs if against == f"peer-{ours}"]
    for name in [name for name in OURS if name in models]:
        for pair in [pair for pair in pairs if pair[0] == name]:
            yield *pair, ratio(row, *pair), RATIOS[pair].get(row["case"])
        if not any(name in pair for pair in pairs):
            yield name, None, None, None


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def models_table(row: dict[str, Any]) -> Iterator[str]:
    """Every model of a case by itself."""
    yield f"{row['case']:10}  {'model':32} {'ms':>8} {'tokens/s':>10} {'MFU':>5} {'GiB':>5}  sequences a pass"
    for name, model in row["models"].items():
        yield (
            f"{'':10}  {LABELS[name]:32} {model['ms']:8.2f} {model['tokens_per_second']:10,.0f} "
            f"{number(model.get('mfu'), 3):>5} {number(model.get('gib'), 1):>5}  {model['micro_batch']}"
        )


def classes_table(row: dict[str, Any]) -> Iterator[str]:
    """Milliseconds a step by kernel class, of the models that were profiled."""
    classes = {name: kernel_classes(kernels) for name, kernels in row.get("kernels", {}).items()}
    if not classes:
        return
    yield f"{row['case']:10}  {'kernels, ms a step':24}" + "".join(f"{LABELS[name]:>30}" for name in classes)
    for label in (*KERNEL_CLASSES, "sum"):
        times = [sum(found.values()) if label == "sum" else found[label] for found in classes.values()]
        yield f"{'':10}  {label:24}" + "".join(f"{ms:30.2f}" for ms in times)


def limits_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Ours against the peers and against what is wanted."""
    yield (
        f"{'case':10}  {'ours':28} {'against':32} {'ours ms':>8} {'peer ms':>8} {'ratio':>6}  {'wanted':14} "
        f"{'tokens/s':>10} {'MFU':>5} {'GiB':>5}"
    )
    for row in rows:
        for ours, against, times, wanted in comparisons(row):
            model = row["models"][ours]
            peer = row["models"][against]["ms"] if against else None
            text = "-" if wanted is None or times is None else f">= {wanted:.2f} {verdict(times >= wanted)}"
            yield (
                f"{row['case']:10}  {LABELS[ours]:28} {LABELS[against] if against else '-':32} {model['ms']:8.2f} "
                f"{number(peer, 2):>8} {number(times, 3):>6}  {text:14} {model['tokens_per_second']:10,.0f} "
                f"{number(model.get('mfu'), 3):>5} {number(model.get('gib'), 1):>5}"
            )
    for row in rows:
        yield from other_limits(row)


def other_limits(row: dict[str, Any]) -> Iterator[str]:
    """MFU, memory and the data loader, one line each."""
    case = row["case"]
    for name, model in row["models"].items():
        least, most = LEAST_MFU.get((case, name)), MOST_GIB.get((case, name))
        if least is not None and "mfu" in model:
            met = verdict(model["mfu"] >= least)
            yield f"{case:10}  {LABELS[name]}: MFU {model['mfu']:.3f}, wanted >= {least}: {met}"
        if most is not None and "gib" in model:
            met = verdict(model["gib"] <= most)
            yield f"{case:10}  {LABELS[name]}: {model['gib']:.1f} GiB, wanted <= {most:g}: {met}"
    if row.get("sustained_rates"):
        rate, sustained = (median(row[key]) / 1e12 for key in ("rates", "sustained_rates"))
        shares = [row["models"][name]["mfu"] for name in OURS if name in row["models"]]
        of = [f"{share * rate / sustained:.3f}" for share in shares]
        yield (
            f"{case:10}  matrix product: {rate:.0f} TFLOP/s, of which MFU is a share; {sustained:.0f} sustained, "
            f"of which ours are {', '.join(of)}"
        )
    fastest = min((row["models"][name]["ms"] for name in OURS if name in row["models"]), default=None)
    if fastest is not None and "data_ms" in row:
        share = row["data_ms"] / fastest
        yield f"{case:10}  data loading {100 * share:.2f} % of a step, wanted <= 1: {verdict(share <= MOST_DATA)}"
