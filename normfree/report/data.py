"""What the figures of the page draw, of one run: plain lists, dictionaries and packed arrays."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from normfree.config import DEFAULT_SEQ_LEN
from normfree.errors import EXIT_DIRECTORY, UserError
from normfree.heads import entropy_ceiling
from normfree.records import ArrayInfo
from normfree.report.packing import MAX_LAYER_RECORDS, MAX_RECORDS, kept_records, pack, thinned
from normfree.runs import SITES, TIMES, Run, is_lost, lost_at

SOURCES = ("probe", "train")  # the fixed validation probe in eval mode; the training batch
# The sites of one layer in the order in which they are computed.
EXECUTION = ("q", "k", "v", "attn_probs", "attn", "mlp_hidden", "mlp", "block")
OVER_HEADS = {"max_score": "largest"}  # how (layer, head) becomes (layer,); every other statistic: the mean
WITH_HEADS = ("attn_entropy", "effective_width")  # drawn head by head elsewhere
MAX_SNAPSHOTS = 6
MAX_POSITIONS = 64


def seq_len(run: Run) -> int:
    """T, the tokens of a training sequence; it sets the ceiling of the entropies."""
    T = run.config.data.seq_len
    return T if T is not None else min(run.config.model.block_size, DEFAULT_SEQ_LEN)


def run_data(run: Run, label: str) -> dict[str, Any]:
    """Everything the scripts know of a run; whatever was not recorded is absent or empty."""
    T = seq_len(run)
    counts, first = _counts(run)
    found = fault(run)
    near = [found["step"]] if found else []
    near += [place["step"] for place in first.values()]
    return {
        "label": label,
        "T": T,
        "ceiling": entropy_ceiling(T),
        "n_layer": run.config.model.n_layer,
        "n_head": run.config.model.n_head,
        "status": str(run.status.get("status", "unknown")),
        "lost": is_lost(run),
        "lost_at": lost_at(run) if is_lost(run) else None,
        "fault": found,
        "first": first,
        "events": events(run),
        "scalars": _scalars(run),
        "entropy": {source: _entropy(run, source, near) for source in SOURCES if _has(run, source, "attn_entropy")},
        "counts": _packed_counts(counts, near),
        "layers": _layers(run, near),
        "snapshots": _snapshots(run),
    }


def fault(run: Run) -> dict[str, Any] | None:
    """The first non-finite value as the trainer traced it, with the layer its module belongs to (None: outside)."""
    found = run.status.get("fault")
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        return None
    block = re.match(r"blocks\.(\d+)\b", str(found.get("module", "")))
    words = {name: str(found[name]) for name in ("phase", "module", "tensor", "value", "text") if name in found}
    return {"step": found["step"], "layer": int(block[1]) if block else None, **words}


def events(run: Run) -> list[dict[str, Any]]:
    """What the trainer wrote down as it happened, by step."""
    found = run.status.get("events")
    rows = (
        [e for e in found if isinstance(e, dict) and isinstance(e.get("step"), int)] if isinstance(found, list) else []
    )
    kept = [
        {"step": e["step"], "layer": e.get("layer"), "kind": str(e.get("kind", "")), "text": str(e.get("text", ""))}
        for e in rows
    ]
    return sorted(kept, key=lambda e: e["step"])


def array(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a recorded array, or an error that names the damaged file."""
    with _naming(run, name):
        return run.array(name)


def info(run: Run, name: str) -> ArrayInfo:
    """Axes and unit of a recorded array, or an error that names the damaged file."""
    with _naming(run, name):
        return run.info(name)


@contextmanager
def _naming(run: Run, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.directory}/arrays/{name} cannot be read: {error!r}", EXIT_DIRECTORY) from error


def _name(source: str, name: str) -> str:
    return f"probe_{name}" if source == "probe" else name


def _has(run: Run, source: str, name: str) -> bool:
    return run.has(_name(source, name)) and len(array(run, _name(source, name))[0]) > 0


def _kept(steps: np.ndarray, values: np.ndarray, near: Sequence[int], most: int = MAX_RECORDS) -> dict[str, Any]:
    """Records for the page; `of` is how many there were."""
    index = kept_records(steps, near, most)
    return {"steps": pack(steps[index]), "values": pack(values[index]), "of": len(steps)}


def _scalars(run: Run) -> dict[str, Any]:
    """Every curve of metrics.jsonl, times aside (`of`: its points before thinning)."""
    curves = {}
    for name in sorted({key for key in run.metrics.columns if key not in ("step", "seconds")}):
        steps, values = _numbers(run, name)
        if len(steps) < 2 and name in TIMES:
            continue
        x, y = thinned(steps, values)
        if len(x):
            curves[name] = {"steps": pack(x), "values": pack(y), "of": len(steps)}
    return curves


def _numbers(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        return run.series(name)
    except (ValueError, TypeError):  # words, not numbers: a plug-in's own record, which is no curve
        return np.zeros(0, np.int64), np.zeros(0)


def _entropy(run: Run, source: str, near: Sequence[int]) -> dict[str, Any]:
    return _kept(*array(run, _name(source, "attn_entropy")), near)


# ----------------------------------------------------------------------------------------------- NaN and Inf


def _counts(run: Run) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Counts of the training batches (else of the probe), and where the first NaN, Inf, or either was counted."""
    for source in reversed(SOURCES):
        if _has(run, source, "nan_count"):
            break
    else:
        return None, {}
    steps, nan = array(run, _name(source, "nan_count"))
    sites = [SITES[i] if i < len(SITES) else f"site {i}" for i in range(nan.shape[1])]
    counts = {"source": source, "sites": sites, "steps": steps, "nan": nan}
    for kind in ("inf_count", "elements"):
        if _has(run, source, kind):
            other, values = array(run, _name(source, kind))
            if np.array_equal(other, steps):
                counts[kind.removesuffix("_count")] = values
    both = nan + counts["inf"] if "inf" in counts else nan
    kinds: dict[str, np.ndarray] = {"both": both}
    for kind in ("nan", "inf"):
        if kind in counts:
            kinds[kind] = np.asarray(counts[kind])
    first = {kind: _first(steps, values, sites) for kind, values in kinds.items()}
    return counts, {kind: place for kind, place in first.items() if place}


def _first(steps: np.ndarray, values: np.ndarray, sites: Sequence[str]) -> dict[str, Any] | None:
    """The first record with a count: its lowest layer, and there the site that is computed first.

    Values that are not finite travel upwards, so that is where the record has them first.
    """
    bad = np.flatnonzero(values.any(axis=(1, 2)))
    if not len(bad):
        return None
    record = values[bad[0]]
    layer = int(np.flatnonzero(record.any(axis=0))[0])
    order = [site for site in EXECUTION if site in sites] + [site for site in sites if site not in EXECUTION]
    site = next(site for site in order if record[sites.index(site), layer])
    return {"step": int(steps[bad[0]]), "layer": layer, "site": site, "count": int(record[sites.index(site), layer])}


def _packed_counts(counts: dict[str, Any] | None, near: Sequence[int]) -> dict[str, Any] | None:
    if counts is None:
        return None
    index = kept_records(counts["steps"], near)
    packed = {"source": counts["source"], "sites": counts["sites"], "of": len(counts["steps"])}
    for name in ("steps", "nan", "inf", "elements"):
        if name in counts:
            packed[name] = pack(counts[name][index])
    return packed


# ---------------------------------------------------------------------------------------- statistics by layer


def _layers(run: Run, near: Sequence[int]) -> dict[str, Any]:
    """Every statistic with one number a layer, or one a head, which is reduced to one a layer; a plug-in's too."""
    found = {}
    for recorded in run.array_names:
        source = "probe" if recorded.startswith("probe_") else "train"
        name = recorded.removeprefix("probe_")
        axes = info(run, recorded).axes
        if axes not in (("layer",), ("layer", "head")) or name in WITH_HEADS or not _has(run, source, name):
            continue
        if source == "probe" and run.has(name):
            continue  # the training batch is what the step computed with
        steps, values = array(run, recorded)
        how = None
        if axes == ("layer", "head"):
            how = OVER_HEADS.get(name, "mean")
            values = over_heads(values, how)
        kept = _kept(steps, values, near, MAX_LAYER_RECORDS)
        found[name] = {"source": source, "how": how, "unit": info(run, recorded).unit, **kept}
    return found


def over_heads(values: np.ndarray, how: str) -> np.ndarray:
    """(records, n_layer, n_head) to (records, n_layer): mean or largest over the heads that are not NaN, else NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of the layers that are NaN throughout
        wide = values.astype(np.float64)
        reduced = np.nanmax(wide, axis=-1) if how == "largest" else np.nanmean(wide, axis=-1)
    return reduced.astype(np.float32)


# --------------------------------------------------------------------------------------------------- snapshots


def _snapshots(run: Run) -> dict[str, Any] | None:
    """The rare, detailed records of the probe (else of the training batch): a few of them, the last included."""
    names = ("position_entropy", "entropy_quantiles", "effective_width")
    found: dict[str, Any] = {}
    for name in names:
        source = next((s for s in SOURCES if _has(run, s, name)), None)
        if source is None:
            continue
        steps, values = array(run, _name(source, name))
        index = kept_records(steps, most=MAX_SNAPSHOTS)
        found[name] = {"source": source, "of": len(steps), "steps": pack(steps[index])}
        if name == "position_entropy":
            positions = spaced_positions(values.shape[-1])
            found[name]["positions"] = pack(positions)
            found[name]["values"] = pack(over_heads(np.moveaxis(values[index][..., positions], 2, 3), "mean"))
        else:
            found[name]["values"] = pack(values[index])
    return found or None


def spaced_positions(T: int) -> np.ndarray:
    """At most MAX_POSITIONS of the query positions 0 .. T - 1, evenly spaced in their logarithm, both ends included."""
    if T <= MAX_POSITIONS:
        return np.arange(T)
    return np.unique(np.geomspace(1, T, MAX_POSITIONS).round().astype(np.int64)) - 1
