"""From the command to the first step, cold and warm: python experiments/start_up.py [--out FILE.json] [key=value ...]

The same job twice, with caches of Python's byte code, of compiled kernels and of tokens that are empty at first: the
second start finds them. Two steps each; the clock stops when the first one is in `metrics.jsonl`. The job is GPT-2 124M
without norms on a GPU, 512 sequences of 128 tokens a step; without one, the default job.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from normfree.training.provenance import provenance, versions

RUN = Path(__file__).parents[1] / "run.py"
SHORT = ["train.max_steps=2", "log.every=1", "log.figures=false", "train.eval_every=0", "train.checkpoint_every=0"]
ON_GPU = ["size=124m", "data.seq_len=128", "train.batch_size=512"]
LIMIT = 600  # seconds


def first_step(directory: Path, overrides: list[str], environment: dict[str, str]) -> float:
    """Seconds until the first training step of the job is recorded in `directory`. SystemExit where it never is."""
    command = [sys.executable, str(RUN), "model=normfree", "act=relu", *SHORT, *overrides, f"run_dir={directory}"]
    began = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        while job.poll() is None and time.perf_counter() - began < LIMIT:
            metrics = directory / "metrics.jsonl"
            if metrics.exists() and "train/loss" in metrics.read_text():
                seconds = time.perf_counter() - began
                job.communicate()
                return seconds
            time.sleep(0.05)
        job.kill()
        raise SystemExit(f"the job recorded no step:\n{job.communicate()[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the job, as of run.py")
    options = parser.parse_args()
    overrides = [*(ON_GPU if torch.cuda.is_available() else []), *options.overrides]
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "PYTHONPYCACHEPREFIX": "python"}
        environment = os.environ | {name: f"{folder}/{cache}" for name, cache in caches.items()}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        words = [f"data.cache_dir={folder}/data", *overrides]
        seconds = {name: first_step(Path(folder, name), words, environment) for name in ("cold", "warm")}
    for name, value in seconds.items():
        print(f"{name} start to first step: {value:.1f} s")
    if options.out:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        about = {"device": device, "versions": versions(), "overrides": overrides}
        Path(options.out).write_text(json.dumps(about | provenance() | {"seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
