"""What a run warns of, on series made up for it."""

import warnings

import numpy as np
import pytest

from normfree import heads
from normfree.config import resolve
from normfree.runs import SITES
from normfree.training.alarms import Event, HeadAlarm, ResidualAlarm, first_fault, layers_in_words

FACTOR, WINDOW = 5.0, 32
LARGEST = float(np.finfo(np.float32).max)


@pytest.fixture(autouse=True)
def _no_warnings():
    """An alarm is heard in the middle of a run, where numpy's own warnings would be noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def listen(series, factor=FACTOR, window=WINDOW):
    """The events of a series (steps, n_layer), or (steps,) of a single layer."""
    series = np.asarray(series, dtype=np.float32).reshape(len(series), -1)
    alarm = ResidualAlarm(factor, window, series.shape[1])
    return [event for step, row in enumerate(series) for event in alarm.look(step, row)]


def steps(events):
    return [event.step for event in events]


# -- residuals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1.2, 1.5, 2.0])
def test_growth_that_never_pauses_is_heard_long_before_it_overflows(rate):
    """A window that compared with its own maximum would hear nothing below a factor of 5 from one step to the next."""
    series = rate ** np.arange(200.0)
    events = listen(series[series < LARGEST])
    assert steps(events) == [WINDOW], "as soon as there is a window, and once"
    assert series[events[0].step] < 1e-9 * LARGEST


def test_a_sudden_burst_is_heard_before_it_overflows():
    """200 healthy steps, then the maximum is multiplied by 40 at every step, as in a norm-free model that is lost."""
    series = np.concatenate([np.full(200, 8.0), 8.0 * 40 ** np.arange(1.0, 30)])
    assert steps(listen(series[series < LARGEST])) == [200]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_silent(seed):
    """Maxima of noise, their scale growing tenfold over 2,000 steps."""
    draw = np.random.default_rng(seed)
    noise = np.abs(draw.standard_normal((2000, 4, 64))).max(-1)
    assert listen(noise * np.geomspace(1, 10, 2000)[:, None]) == []


def test_the_threshold_is_the_factor_times_the_median():
    quiet = [1.0] * WINDOW
    assert listen([*quiet, 5.0]) == []
    assert steps(listen([*quiet, 5.01])) == [WINDOW]
    assert listen([*quiet, 5.01], factor=6.0) == []
    assert listen([*quiet[1:], 1000.0]) == [], "before the window is full there is nothing to compare with"


def test_it_fires_once_and_again_after_a_window_within_its_range():
    quiet, loud = [1.0] * WINDOW, [9.0] * 5
    assert steps(listen([*quiet, *loud])) == [WINDOW]
    assert steps(listen([*quiet, *loud, *quiet[1:], *loud])) == [WINDOW], "it had not been away for long enough"
    assert steps(listen([*quiet, *loud, *quiet, *loud])) == [WINDOW, 2 * WINDOW + len(loud)]


def test_a_residual_that_swings_in_and_out_of_its_range_is_one_event():
    assert steps(listen([1.0] * WINDOW + [9.0, 1.0, 1.0] * 100)) == [WINDOW]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_no_warning_and_never_enters_the_window(value):
    series = [1.0] * WINDOW + [value] * 3 + [1.0] * WINDOW + [9.0]
    assert steps(listen(series)) == [len(series) - 1]
    alarm = ResidualAlarm(FACTOR, WINDOW, 1)
    for step, x in enumerate([value, 1.0, value, 2.0]):
        alarm.look(step, np.array([x], dtype=np.float32))
    assert np.concatenate(alarm.recent).tolist() == [1.0, 2.0]


def test_a_layer_that_rings_does_not_hide_another():
    series = np.ones((WINDOW + 3, 4), dtype=np.float32)
    series[WINDOW:, 3] = 9.0
    series[WINDOW + 1 :, 1:3] = [7.0, 8.0]
    first, second = listen(series)
    assert (first.step, first.layer) == (WINDOW, 3)
    assert "in layer 3: up to 9 after layer 3, 9.0 times" in first.text
    assert (second.step, second.layer) == (WINDOW + 1, 1), "the lowest of the new ones"
    assert "in layers 1-2: up to 8 after layer 2, 8.0 times" in second.text


def test_magnitudes_at_the_edge_of_float32_are_compared_like_any_others():
    assert listen([0.9 * LARGEST] * (WINDOW + 5)) == []
    assert steps(listen([1e38] * WINDOW + [3e38], factor=2.0)) == [WINDOW]


def test_of_a_residual_that_was_all_zero_there_is_no_multiple():
    assert listen([0.0] * WINDOW + [1.0]) == []


@pytest.mark.parametrize(
    ("layers", "words"),
    [([4], "layer 4"), ([0, 1], "layers 0-1"), ([0, 1, 2, 5], "layers 0-2, 5"), ([1, 3, 5, 6], "layers 1, 3, 5-6")],
)
def test_layers_in_words(layers, words):
    assert layers_in_words(np.array(layers)) == words


# -- heads ------------------------------------------------------------------------------------------------------------

LAYERS, HEADS, T, WARM_UP = 3, 4, 16, 10
CEILING = heads.entropy_ceiling(T)


@pytest.fixture
def alarm(tiny):
    shape = {"model.n_layer": LAYERS, "model.n_head": HEADS, "optim.warmup_steps": WARM_UP, "train.max_steps": 100}
    return HeadAlarm(resolve(tiny(**shape)))


def arrays(level=0.5, one_minus_max=0.5, max_score=1.0):
    """Those of a record, the same in all heads; levels are shares of the ceiling."""
    values = {"attn_entropy": level * CEILING, "one_minus_max": one_minus_max, "max_score": max_score}
    return {name: np.full((LAYERS, HEADS), value, dtype=np.float32) for name, value in values.items()}


def test_most_heads_of_a_layer_overloaded_are_an_event_once(alarm):
    found = arrays()
    found["attn_entropy"][1, :3] = 0.76 * CEILING  # three of four
    found["attn_entropy"][2, :2] = 0.76 * CEILING  # half of them is not most
    counts, events = alarm.look(WARM_UP, found)
    assert counts["overloaded"].tolist() == [0, 3, 2]
    assert [(e.kind, e.step, e.layer) for e in events] == [("overloaded", WARM_UP, 1)]
    assert events[0].text.startswith(f"step {WARM_UP}: most heads of layer 1 are overloaded")
    assert alarm.look(WARM_UP + 1, found)[1] == []
    alarm.look(WARM_UP + 2, arrays())
    assert alarm.look(WARM_UP + 3, found)[1] == [], "it was said of this layer"
    found["attn_entropy"][2, :3] = 0.76 * CEILING
    assert [e.layer for e in alarm.look(WARM_UP + 4, found)[1]] == [2]


def test_during_warm_up_overloaded_heads_are_counted_and_not_spoken_of(alarm):
    """At the start attention is as even as can be, which says nothing."""
    for step in (0, WARM_UP - 1):
        counts, events = alarm.look(step, arrays(level=0.95))
        assert (counts["overloaded"] == HEADS).all()
        assert events == []
    assert len(alarm.look(WARM_UP, arrays(level=0.95))[1]) == 1


def sharp(max_score, sharp_heads=1):
    """`sharp_heads` heads of layer 1 low and one-hot."""
    found = arrays(max_score=max_score)
    found["attn_entropy"][1, :sharp_heads] = 0.01 * CEILING
    found["one_minus_max"][1, :sharp_heads] = 1e-4
    return found


def test_a_head_collapses_only_while_its_largest_score_rises(alarm):
    scores = [10.0, 10.0, 11.0, 11.0, 12.0]
    seen = [alarm.look(step, sharp(score)) for step, score in enumerate(scores)]
    assert [counts["collapsed"].tolist() for counts, _ in seen] == [[0, n, 0] for n in (0, 0, 1, 0, 1)]
    kinds = [[(e.kind, e.layer) for e in events] for _, events in seen]
    assert kinds == [[], [], [("collapsed", 1)], [], []], "said once"
    assert seen[2][1][0].text.startswith("step 2: 1 head of layer 1 collapsed")


def test_more_collapsed_heads_of_a_layer_are_another_event(alarm):
    seen = [alarm.look(step, sharp(float(step), n)) for step, n in enumerate([1, 1, 1, 3, 2])]
    assert [len(events) for _, events in seen] == [0, 1, 0, 1, 0]
    assert "3 heads of layer 1 collapsed" in seen[3][1][0].text


@pytest.mark.parametrize("change", [{"one_minus_max": 0.01}, {"attn_entropy": 0.3 * CEILING}])
def test_a_sharp_head_that_is_not_one_hot_or_not_low_did_not_collapse(alarm, change):
    for step in range(3):
        found = sharp(float(step))
        for name, value in change.items():
            found[name][:] = value
        assert not alarm.look(step, found)[0]["collapsed"].any()


def stopped_after_every_record(config, series):
    """What is said of (step, arrays) pairs, and the counts, if a new alarm takes over from the record at each."""
    events, record = [], {}
    for step, found in series:
        earlier = {name: (np.array(at), np.stack(values)) for name, (at, values) in record.items()}
        counts, new = HeadAlarm(config, earlier).look(step, found)
        events += new
        for name, value in (counts | {"max_score": found["max_score"]}).items():
            at, values = record.setdefault(name, ([], []))
            at.append(step)
            values.append(value)
    return events, record


def test_a_run_that_is_stopped_after_every_record_says_what_an_uninterrupted_one_does(tiny, alarm):
    shape = {"model.n_layer": LAYERS, "model.n_head": HEADS, "optim.warmup_steps": WARM_UP, "train.max_steps": 100}
    series = []
    for step in range(WARM_UP - 3, WARM_UP + 6):
        found = sharp(max_score=float(step // 2), sharp_heads=step % 3)
        found["attn_entropy"][2] = (0.9 if step % 4 else 0.5) * CEILING
        series.append((step, found))
    seen = [alarm.look(step, found) for step, found in series]
    events, record = stopped_after_every_record(resolve(tiny(**shape)), series)
    for name in ("overloaded", "collapsed"):
        assert np.array_equal(record[name][1], [counts[name] for counts, _ in seen])
    assert events == [event for _, new in seen for event in new]
    assert {event.kind for event in events} == {"overloaded", "collapsed"}


def test_a_nan_head_is_neither(alarm):
    for step in (WARM_UP, WARM_UP + 1):
        counts, events = alarm.look(step, arrays(level=np.nan, one_minus_max=np.nan, max_score=np.nan))
        assert not counts["overloaded"].any()
        assert not counts["collapsed"].any()
        assert events == []


def test_without_the_statistics_it_needs_it_counts_nothing(alarm):
    found = arrays()
    assert set(alarm.look(0, {"attn_entropy": found["attn_entropy"]})[0]) == {"overloaded"}
    assert alarm.look(0, {"max_score": found["max_score"]}) == ({}, [])


# -- the first fault of a run that goes on ----------------------------------------------------------------------------


def seen_at_every_step():
    return {
        "peak": np.ones((4, LAYERS), dtype=np.float32),
        "attn_entropy": np.ones((LAYERS, HEADS), dtype=np.float32),
        "resid_max": np.ones(LAYERS, dtype=np.float32),
    }


@pytest.mark.parametrize(
    ("faults", "layer", "where"),
    [
        ([("resid_max", 1), ("resid_max", 2), ("peak", (0, 2))], 1, "the block's output of layer 1"),
        ([("resid_max", 1), ("peak", (3, 1)), ("peak", (2, 1)), ("peak", (0, 2))], 1, "attn of layer 1"),
        ([("resid_max", 0), ("attn_entropy", (0, 2)), ("peak", (2, 0))], 0, "attn_probs of layer 0"),
    ],
)
def test_the_first_fault_is_the_lowest_layer_and_there_the_first_site(faults, layer, where):
    found = seen_at_every_step()
    for name, place in faults:
        found[name][place] = np.nan
    event = first_fault(7, found, ("q", "k", "attn", "mlp"))
    assert (event.step, event.kind, event.layer) == (7, "non_finite", layer)
    assert where in event.text


def test_a_fault_that_no_layer_shows_is_said_to_lie_elsewhere():
    event = first_fault(7, seen_at_every_step(), ("q", "k", "attn", "mlp"))
    assert event.layer is None
    assert "in the head, the loss, the backward pass or a weight" in event.text


def test_a_fault_that_was_not_looked_for_is_not_said_to_lie_elsewhere():
    event = first_fault(7, {}, ())
    assert event.layer is None
    assert "was not measured" in event.text


@pytest.mark.parametrize("name", ["nan_count", "inf_count"])
def test_without_the_residual_maximum_the_counts_tell(name):
    counts = np.zeros((len(SITES), LAYERS), dtype=np.int64)
    counts[SITES.index("block"), 1:] = 5
    assert first_fault(7, {name: counts}, ()).layer == 1


def test_an_event_is_what_run_json_holds():
    event = Event(3, "overloaded", 1, "words")
    assert event.to_dict() == {"step": 3, "kind": "overloaded", "layer": 1, "text": "words"}
