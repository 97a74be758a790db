"""The peers of `speed.py`: GPT-2 of transformers, in a plain loop on the GPU and under its own Trainer on the CPU.

Both get the trainer's batches. Labels are the inputs, so the model's own loss is used, which shifts them itself.
"""

import importlib.util
import math
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from normfree.config import Config
from normfree.data.batches import Batches
from normfree.training import machine
from normfree.training.step import micro_batches

ACT_TO_GPT2 = {"gelu_tanh": "gelu_new", "relu": "relu"}


def gpt2(config: Config, attention: str) -> nn.Module:
    """The same model in transformers; norm=none takes the blocks' norms out and leaves the final one, as ours does."""
    model = config.model
    assert model.vocab_size is not None, "the configuration is not resolved"
    settings = GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.block_size,
        activation_function=ACT_TO_GPT2[model.act],
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_embd=model.n_embd,
    )
    torch.manual_seed(config.seed)
    peer = GPT2LMHeadModel._from_config(settings, attn_implementation=attention)
    if model.norm == "none":
        for block in peer.transformer.h:
            block.ln_1 = block.ln_2 = nn.Identity()
    return peer.train()


class Peer:
    """A training step of transformers' GPT-2: forward, backward, clip, fused AdamW; `micro` sequences a pass."""

    def __init__(self, config: Config, batches: Batches, device: torch.device, original: bool = False) -> None:
        """`original`: materialised attention maps that are returned too, not compiled."""
        self.config, self.batches, self.device = config, batches, device
        self.micro = config.train.batch_size
        self.extra = {"output_attentions": True} if original else {}
        self.model = gpt2(config, "eager" if original else "sdpa").to(device)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        compiled = not original and machine.choose_compile(config, device)
        self.forward: Callable[..., Any] = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.step = 0
        self.loss = torch.zeros(())  # of the last micro-batch, over their number

    def train_step(self) -> None:
        parts = self.config.train.batch_size // self.micro
        for idx, _ in micro_batches(self.batches.rows(self.step), parts, self.device):
            with machine.autocast(self.device, self.config.train.precision):
                loss = self.forward(input_ids=idx, labels=idx, use_cache=False, **self.extra).loss / parts
            loss.backward()
            self.loss = loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.train_step()

    def check(self) -> None:
        assert math.isfinite(float(self.loss)), "the peer's loss is not finite: its time means nothing"


# -- the CPU -----------------------------------------------------------------------------------------------------------


class Rows(Dataset):
    """The sequences of the first `steps` batches."""

    def __init__(self, batches: Batches, steps: int) -> None:
        self.rows = torch.from_numpy(np.concatenate([batches.rows(step)[:, :-1] for step in range(steps)]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class Blocks(TrainerCallback):
    """Times the Trainer in blocks of `steps` steps; `between` runs after each, off the clock, and may end it."""

    def __init__(self, steps: int, between: Callable[[float], bool]) -> None:
        self.steps, self.between = steps, between

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            ms = 1000 * (time.perf_counter() - self.began) / self.steps
            control.should_training_stop |= self.between(ms)
            self.began = time.perf_counter()


def train_with_trainer(
    config: Config, batches: Batches, steps: int, blocks: int, between: Callable[[float], bool]
) -> None:
    """Train GPT-2 with transformers' Trainer, fp32 on the CPU; `between(ms a step)` after every block of `steps`.

    Where it returns true, training ends.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise SystemExit("transformers' Trainer needs accelerate, which is missing: pip install accelerate")
    optim = config.optim
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=steps * blocks,
            per_device_train_batch_size=config.train.batch_size,
            learning_rate=optim.lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            max_grad_norm=optim.grad_clip,
            seed=config.seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=gpt2(config, "sdpa"),
            args=arguments,
            train_dataset=Rows(batches, steps * blocks),
            callbacks=[Blocks(steps, between)],
        )
        outcome = trainer.train()
    assert math.isfinite(outcome.training_loss), "the peer's loss is not finite: its time means nothing"
