"""Text from a trained model.

    python -m normfree.generate RUN --prompt "def " [--tokens N] [--temperature X] [--top-k K] [--seed S] [--no-cache]

RUN is a run directory (then its newest good checkpoint speaks) or one of its checkpoints.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.data.tokenizer import Tokenizer, load_tokenizer
from normfree.errors import EXIT_DIVERGED, EXIT_OK, UserError
from normfree.model import KVCache, Transformer
from normfree.model.losses import head_logits
from normfree.plugins import load_plugins


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Draw one id a row from logits (B, V): int64 (B, 1), on the CPU. Temperature 0 takes the largest.

    Computed in float64 on the CPU, so that a seed gives the same text on every device, but for rounding of the logits.
    """
    logits = logits.double().cpu()
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    values, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, K)
    probabilities = ((values - values[:, :1]) / temperature).softmax(dim=-1)
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


def _next_logits(model: Transformer, ids: Tensor, cache: KVCache | None) -> Tensor:
    """Logits (B, V) of the token after ids (B, T). Positions that the cache holds are not computed again."""
    window = ids[:, -model.config.block_size :]
    if cache is not None:
        window = window[:, cache.length :]
    hidden = model.hidden(window, cache)[:, -1]  # (B, C)
    logits = head_logits(hidden, model.head_weight, model.vocab_used)
    if not torch.isfinite(logits[:, : model.vocab_used]).all():
        raise UserError(
            "the model's logits are not finite (NaN or Inf), so no token can be drawn: training has diverged. "
            "The run's nan_count and inf_count show where it began; an earlier checkpoint may still be sound.",
            EXIT_DIVERGED,
        )
    return logits


def _prompt(model: Transformer, prompt_ids: Tensor | list[int]) -> Tensor:
    """Checked ids (B, T) on the model's device."""
    ids = torch.as_tensor(prompt_ids, dtype=torch.int64, device=model.wte.weight.device)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.size(1) == 0:
        raise UserError("the prompt is empty: generation needs at least one token to start from.")
    if ids.min() < 0 or ids.max() >= model.vocab_used:
        raise UserError(
            f"the prompt holds ids from {int(ids.min())} to {int(ids.max())}, but the model knows 0 to "
            f"{model.vocab_used - 1}: it was made with another tokenizer."
        )
    return ids


def _check_options(max_new_tokens: int, temperature: float, top_k: int | None, seed: int) -> None:
    if max_new_tokens < 0:
        raise UserError(f"tokens={max_new_tokens} is negative.")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature={temperature} must be a number of at least 0 (0: always the likeliest token).")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} must be at least 1.")
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"seed={seed} must be from -2^63 to 2^64 - 1.")


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_ids: Tensor | list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    use_cache: bool = True,
    n_ids: int | None = None,
) -> Tensor:
    """Continue prompt_ids (B, T), or one list of ids, by `max_new_tokens`: int64 (B, T + max_new_tokens).

    Ids that only pad the vocabulary are never drawn, nor those from `n_ids` on. Past `block_size` tokens the window
    slides: each token then sees the last `block_size` ones, from position 0 on, and is computed without the cache (a
    slid window moves every position, so nothing cached would hold). The global random state and the model's mode are
    left as they were.
    Raises `UserError` on a bad option or prompt, and on logits that are not finite.
    """
    _check_options(max_new_tokens, temperature, top_k, seed)
    ids = _prompt(model, prompt_ids)
    generator = torch.Generator().manual_seed(seed)
    cache = model.new_cache(ids.size(0), model.wte.weight.dtype) if use_cache else None
    training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if ids.size(1) > model.config.block_size:
                cache = None
            logits = _next_logits(model, ids, cache)[..., :n_ids]
            ids = torch.cat((ids, sample(logits, temperature, top_k, generator).to(ids.device)), dim=1)
    finally:
        model.train(training)
    return ids


# ----------------------------------------------------------------------------------------------------------------------


def run_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer of the run that a checkpoint belongs to."""
    return load_tokenizer(checkpoint.resolve().parent.parent / "tokenizer")


def complete(model: Transformer, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, **options: Any) -> str:
    """The prompt and its continuation as text. An empty prompt starts where a document does, after end-of-text."""
    start = tokenizer.encode_batch([prompt])[0].tolist() or [tokenizer.end_of_text]
    ids = generate(model, start, max_new_tokens, n_ids=tokenizer.n_vocab, **options)[0].tolist()
    return prompt + tokenizer.decode(ids[len(start) :])


def check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave the option out to compute on the CPU.")


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m normfree.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", metavar="RUN", type=Path, help="a run directory or a checkpoint")
    p.add_argument("--prompt", default="", help="start of the text (default: the start of a document)")
    p.add_argument("--tokens", type=int, default=100, metavar="N", help="tokens to generate (default: 100)")
    p.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest token (default: 0.8)")
    p.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens (default: all)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text (default: 0)")
    p.add_argument("--no-cache", action="store_true", help="compute every position anew for each token (slow)")
    p.add_argument("--plugin", action="append", default=[], metavar="FILE.py", help="choices of your own, as in run.py")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. A user's mistake is one message and its exit code."""
    from normfree.training.checkpoint import find_checkpoint, load_model  # training imports this module

    a = _parser().parse_args(argv)
    options = {"temperature": a.temperature, "top_k": a.top_k, "seed": a.seed, "use_cache": not a.no_cache}
    try:
        check_device(a.device)
        load_plugins(a.plugin)
        checkpoint = find_checkpoint(a.run)
        model = load_model(checkpoint, device=a.device)
        print(complete(model, run_tokenizer(checkpoint), a.prompt, a.tokens, **options))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
