"""Who takes turns in `speed.py`: the models of each case, a turn of ours and of a peer, and the clock."""

import time
from pathlib import Path

import torch
import yaml
from speed_peers import Peer
from speed_report import OURS

from normfree.config import Config, resolve, resolve_vocabulary
from normfree.data.batches import Batches
from normfree.data.packing import Corpus
from normfree.training.loop import Trainer

GPT2_MODELS = ("ln", "none", "ln-plain", "none-plain", "peer-ln", "peer-none")
# case: (batch, T, files of conf/ that say what the model is, the models)
CASES: dict[str, tuple[int, int, tuple[str, ...], tuple[str, ...]]] = {
    "512x128": (512, 128, ("model/gpt2", "size/124m"), (*GPT2_MODELS, "original")),
    "64x1024": (64, 1024, ("model/gpt2", "size/124m"), GPT2_MODELS),
    "pythia-128": (512, 128, ("model/pythia", "size/70m"), ("ln", "none")),
    "pythia-256": (256, 256, ("model/pythia", "size/70m"), ("ln", "none")),
    "355m": (128, 128, ("model/gpt2", "size/355m"), ("ln", "none")),
    "cpu": (16, 128, ("model/gpt2", "size/nano"), ("ln", "none", "peer-ln", "peer-none")),
}
VOCABULARY, USED = 50304, 50257  # GPT-2's, rounded up; the rows between take no probability
PEER_STEPS, ORIGINAL_STEPS, ORIGINAL_MICRO = 10, 4, 128  # steps of a turn
CONF = Path(__file__).parents[1] / "conf"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def configuration(case: str, model: str) -> Config:
    """Settings of one model of a case, ours or the peer's."""
    batch, T, files, _ = CASES[case]
    config = Config()
    for file in files:
        for key, value in yaml.safe_load((CONF / f"{file}.yaml").read_text()).items():
            assert hasattr(config.model, key), key
            setattr(config.model, key, value)
    if "none" in model:
        config.model.norm, config.model.act = "none", "relu"
    config.train.batch_size, config.data.seq_len, config.train.max_steps = batch, T, 10**6
    config.optim.lr = 1e-4  # safe: a lost run would measure NaN
    if case == "cpu":
        config.train.precision = "fp32"
    else:
        config.model.vocab_size, config.model.vocab_used = VOCABULARY, USED
        config.train.precision, config.train.compile = "bf16", True
    if model.endswith("-plain"):
        config.train.fast = False
    return resolve(config)


class Ours:
    """The trainer, as `python run.py` runs it."""

    def __init__(self, config: Config, corpus: Corpus, device: torch.device) -> None:
        self.trainer = Trainer(config, corpus, Path("unused"), device)
        self.steps = config.diagnostics.every
        self.micro = config.train.micro_batch_size or config.train.batch_size
        self.step = 0

    def run(self) -> None:
        trainer = self.trainer
        for _ in range(self.steps):
            trainer.train_step(self.step, trainer.due(self.step))
            trainer.mailbox.settled()
            self.step += 1

    def check(self) -> None:
        """The steps were finite, and the hooks fired."""
        self.trainer.mailbox.settled(everything=True)
        self.trainer.recorder.unpack(self.trainer.recorder.flat().cpu())
        assert int(self.trainer.flag.bad_steps) == 0, "the steps were not finite: their time means nothing"

    def data_ms(self) -> float:
        """Milliseconds that the host spends on one batch."""
        synchronize()
        began = time.perf_counter()
        for step in range(self.steps):
            self.trainer.micro_batch(self.trainer.batches.rows(step))
        return 1000 * (time.perf_counter() - began) / self.steps


class Theirs:
    """A peer."""

    def __init__(self, peer: Peer, steps: int) -> None:
        self.peer, self.steps, self.check = peer, steps, peer.check

    @property
    def micro(self) -> int:
        return self.peer.micro

    def run(self) -> None:
        self.peer.run(self.steps)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(entrant: Ours | Theirs) -> float:
    """Of a step, over one turn."""
    synchronize()
    began = time.perf_counter()
    entrant.run()
    synchronize()
    seconds = time.perf_counter() - began
    entrant.check()
    return 1000 * seconds / entrant.steps


def matrix_rate(repeats: int = 20, size: int = 8192) -> float:
    """FLOP/s of a bf16 product of random matrices."""
    a, b = torch.randn(2, size, size, device=DEVICE).bfloat16()
    for _ in range(3):
        a @ b
    synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - began)


def profile(entrant: Ours | Theirs) -> dict[str, float]:
    """Milliseconds a step of every kernel (on the CPU: operator), over one turn, the longest first."""
    on_gpu = DEVICE.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        entrant.run()
        synchronize()
    events = found.key_averages()
    times = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in events}
    return {name: us / 1000 / entrant.steps for name, us in sorted(times.items(), key=lambda item: -item[1]) if us}


def entrant(case: str, name: str, corpus: Corpus, device: torch.device) -> Ours | Theirs:
    """A model of a case. A peer's `micro` may still be changed."""
    config = configuration(case, name)
    resolve_vocabulary(config, corpus.tokenizer.n_vocab)
    if name in OURS:
        return Ours(config, corpus, device)
    original = name == "original"
    batches = Batches(corpus.tokens("train"), config.data.seq_len or 0, config.train.batch_size, config.seed)
    peer = Peer(config, batches, device, original)
    if original:
        peer.micro = min(ORIGINAL_MICRO, peer.micro)
    return Theirs(peer, ORIGINAL_STEPS if original else PEER_STEPS)
