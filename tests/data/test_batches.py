"""A batch is a pure function of (seed, step), and an epoch is a permutation of the blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.data.batches import AHEAD, IGNORED, Batches, evaluation_rows, permute
from normfree.errors import UserError

TOKENS = np.arange(37 * 5 + 1, dtype=np.uint16)  # 37 blocks of 5, and the last one's target


def order(n: int, seed: int = 1, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(n), n, seed, np.full(n, epoch))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_an_epoch_is_a_bijection(n: int) -> None:
    for seed, epoch in [(0, 0), (1, 3), (2**63 - 1, 10**6)]:
        assert sorted(order(n, seed, epoch)) == list(range(n))


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(order(50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    assert tuple(range(50)) not in orders


def test_orders_look_like_chance() -> None:
    """Each block stands at each place about equally often, and neighbours are not kept together."""
    n, draws = 10, 4000
    orders = permute(np.tile(np.arange(n), draws), n, 3, np.repeat(np.arange(draws), n)).reshape(draws, n)
    counts = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    chi_squared = ((counts - draws / n) ** 2 / (draws / n)).sum()
    assert chi_squared < 135  # 81 degrees of freedom: exceeded once in ten thousand
    successors = np.mean(np.diff(orders, axis=1) == 1)
    assert abs(successors - 1 / n) < 0.01


def test_the_order_is_part_of_a_run() -> None:
    """A change of the permutation would silently give old seeds other batches."""
    assert order(10, seed=1).tolist() == [9, 1, 3, 5, 6, 8, 0, 2, 7, 4]


def test_rows_depend_on_nothing_but_seed_and_step() -> None:
    one, other = Batches(TOKENS, 5, 8, seed=1), Batches(TOKENS, 5, 8, seed=1)
    forwards = [one.rows(step) for step in range(20)]
    for step in reversed(range(20)):
        np.testing.assert_array_equal(other.rows(step), forwards[step])
    assert not np.array_equal(forwards[0], Batches(TOKENS, 5, 8, seed=2).rows(0))


def test_steps_that_are_worked_out_together_are_those_of_each_alone() -> None:
    """Forwards, backwards and over the edge of what is kept; a batch may also be larger than that."""
    for batch_size in (300, AHEAD + 5):
        batches = Batches(np.arange(10**5), 8, batch_size, seed=4)
        edge = max(1, AHEAD // batch_size)
        for step in (edge - 1, edge, 0, 3 * edge + 1, edge, edge - 1):
            samples = step * batch_size + np.arange(batch_size)
            alone = permute(samples % batches.n_blocks, batches.n_blocks, 4, samples // batches.n_blocks)
            np.testing.assert_array_equal(batches.indices(step), alone)


@pytest.mark.parametrize("batch_size", [1, 8, 37, 100])
def test_each_epoch_has_each_block_once(batch_size: int) -> None:
    batches = Batches(TOKENS, 5, batch_size, seed=4)
    assert batches.n_blocks == 37
    steps = -(-37 * 4 // batch_size)
    seen = np.concatenate([batches.indices(step) for step in range(steps)])
    epochs = [seen[37 * e : 37 * (e + 1)].tolist() for e in range(4)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert batches.epoch(0) == 0
    assert batches.epoch(37) == batch_size


def test_a_row_is_a_block_and_its_next_token() -> None:
    batches = Batches(TOKENS, 5, 8, seed=1)
    rows = batches.rows(3)
    assert rows.dtype == np.int64
    assert rows.shape == (8, 6)
    for row, block in zip(rows, batches.indices(3), strict=True):
        np.testing.assert_array_equal(row, TOKENS[block * 5 : block * 5 + 6])
        np.testing.assert_array_equal(row[:-1] + 1, row[1:])  # these tokens count upwards: targets are inputs, shifted


def test_chunks_have_no_next_token() -> None:
    tokens = np.arange(40, dtype=np.uint16)
    batches = Batches(tokens, 5, 4, seed=1, chunk_len=5)
    assert batches.n_blocks == 8  # the last token of the split is in a block, too
    rows = batches.rows(0)
    assert rows.shape == (4, 6)
    assert (rows[:, -1] == IGNORED).all()
    np.testing.assert_array_equal(rows[:, 0], batches.indices(0) * 5)


def test_large_corpora_cost_no_memory() -> None:
    n = 10**12
    assert len(set(permute(np.arange(1000), n, 1, np.zeros(1000, dtype=np.int64)).tolist())) == 1000


def test_evaluation_is_the_first_blocks_in_order() -> None:
    np.testing.assert_array_equal(evaluation_rows(TOKENS, 5, 15), TOKENS[np.arange(3)[:, None] * 5 + np.arange(6)])
    assert len(evaluation_rows(TOKENS, 5, 1)) == 1
    assert len(evaluation_rows(TOKENS, 5, 10**9)) == 37
    assert (evaluation_rows(TOKENS, 5, 10, chunk_len=5)[:, -1] == IGNORED).all()


def test_too_little_text_is_an_error_that_names_the_key() -> None:
    for call in (lambda: Batches(TOKENS[:5], 5, 8, seed=1), lambda: evaluation_rows(TOKENS[:5], 5, 100)):
        with pytest.raises(UserError, match=r"data\.seq_len=5: one block needs 6 tokens, and the corpus has 5"):
            call()
    with pytest.raises(UserError, match=r"data\.seq_len=5, but .* chunks of 4"):
        Batches(TOKENS, 5, 8, seed=1, chunk_len=4)


# -- any corpus, block, batch, accumulation, seed and place to go on from ----------------------------------------------


@st.composite
def runs(draw: st.DrawFn) -> dict[str, int]:
    micro, accumulation = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    seq_len = draw(st.integers(1, 9))
    return {
        "n_tokens": draw(st.integers(seq_len + 1, 200)),
        "seq_len": seq_len,
        "batch_size": micro * accumulation,
        "micro": micro,
        "seed": draw(st.integers(0, 2**63 - 1)),
        "steps": draw(st.integers(1, 12)),
        "at": draw(st.integers(0, 11)),
    }


def batches_of(run: dict[str, int]) -> Batches:
    tokens = np.arange(run["n_tokens"], dtype=np.uint16)
    return Batches(tokens, run["seq_len"], run["batch_size"], run["seed"])


def check_run(run: dict[str, int]) -> None:
    whole = batches_of(run)
    order = np.concatenate([whole.indices(step) for step in range(run["steps"])])
    assert 0 <= order.min() <= order.max() < whole.n_blocks
    for epoch in range(0, len(order) - whole.n_blocks + 1, whole.n_blocks):
        assert sorted(order[epoch : epoch + whole.n_blocks]) == list(range(whole.n_blocks))
    assert len(set(order[len(order) // whole.n_blocks * whole.n_blocks :])) == len(order) % whole.n_blocks

    at = run["at"] % run["steps"]
    again = batches_of(run)
    tail = [again.indices(step) for step in range(at, run["steps"])]
    np.testing.assert_array_equal(np.concatenate(tail), order[at * run["batch_size"] :])

    rows = again.rows(at)
    np.testing.assert_array_equal(rows[:, 1:], rows[:, :-1] + 1)  # targets are inputs, one token on
    np.testing.assert_array_equal(rows[:, 0], tail[0] * run["seq_len"])
    parts = rows.reshape(-1, run["micro"], rows.shape[1])  # micro-batches are slices of the batch, in order
    np.testing.assert_array_equal(np.concatenate(list(parts)), rows)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(run=runs())
def test_any_run_sees_each_block_once_an_epoch_and_goes_on_where_it_was(run: dict[str, int]) -> None:
    check_run(run)


def test_an_order_that_repeats_a_block_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: drawing with replacement looks the same for a step."""

    def careless(positions: np.ndarray, n: int, seed: int, epochs: np.ndarray) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, n, len(positions))

    monkeypatch.setattr("normfree.data.batches.permute", careless)
    with pytest.raises(AssertionError):
        check_run({"n_tokens": 50, "seq_len": 3, "batch_size": 4, "micro": 2, "seed": 1, "steps": 9, "at": 3})
