"""What docs/relu-revival.md says whatever the results are: titles, notes, method, commands."""

from revival.cells import LONG_WARMUP, PREFIX_STEPS, PUBLISHED_WARMUP, SHORT_WARMUP, prefix_final

TITLES = {
    "A": "A. Four arms at tuned rates, Pythia-70M's dimensions",
    "A2": "A2. The same, with rates between those of rung A",
    "A3": "A3. The same, with a longer warm-up",
    "B": "B. Mechanism: is it scale, of the embeddings or of the activation's input?",
    "C": "C. Four arms, GPT-2's dimensions",
    "D": "D. The softmax-only model",
    "E": "E. Learned slopes",
    "F": "F. The final norm, and the original's deviations one at a time",
    "G": "G. T = 256",
}
NOTES = {
    "A2": "Added after rung A was seen, and so outside the method that was fixed before. Without norms the run that "
    "chose rates fails at twice its arm's best one: where the two arms fail within one step of the ladder may then "
    "decide which is ahead. So each arm's optimum is looked for once more, at rates a factor of \u221a2 below and "
    "above it. Rung A's runs of the arm count here too, and its verdicts stay as they are. A run that fails like that "
    "ends above 6 nats, which is below the unigram entropy: it counts as any other, and is not lost.",
    "A3": "Added after rungs A to C were seen. Which rates an arm can have, and with them the order at tuned rates, "
    f"may be a matter of the warm-up: rung A's has {SHORT_WARMUP} steps, the published one {PUBLISHED_WARMUP:,}. Here "
    f"it is half of the run, {LONG_WARMUP} steps.",
    "B": "Embeddings have a standard deviation of .02 at first: times \u221ad = \u221a512 = 22.627 it is .45, times "
    "50 it is 1, as after a norm; this also changes scores, and how fast embeddings move beside the rest. "
    "GELU(bx)/b scales the activation's input alone: it tends to ReLU as b grows, and ReLU(bx)/b is ReLU for any b, so "
    "that GELU's shape is changed and ReLU's is not. Depth-scaled initial values: those of the layers that write into "
    "the residual stream times 1/\u221a(2 x 6 layers). Pythia has biases in its feed-forward layers, and the "
    "original's GPT-2 has none: the arms of rung A have them, and the change is to take them away. What changes the "
    "scale alone is run at rung A's common rate too; this was added after the runs at tuned rates were seen.",
    "C": "With this vocabulary GPT-2's dimensions have fewer parameters than 124 million. `faithful_prefix` is the "
    f"published schedule stopped at a tenth: {PUBLISHED_WARMUP:,} of its {PREFIX_STEPS:,} steps are warm-up, and at "
    f"its end the rate is still at {100 * prefix_final(PREFIX_STEPS):.0f} % of the peak, where the published run, "
    "whose numbers stand beside, has come down; at 25 and at 50 % it is still warming up. `tuned` has the length of "
    "rung A, so that the two sizes compare at one length. At scale full `faithful` is the whole schedule.",
    "D": "A run that is stopped at its first bad step counts as lost after that one step; elsewhere bad steps are left "
    "out, and it takes 100 of them in a row.",
    "F": "Depth-scaled initial values, a deviation too, are arms of rung B, at their own best rates.",
}
INTRO = """# ReLU's Revival, reproduced

This page is written by `python experiments/relu_revival.py --report{out}` from the results in
`{folder}/`: every result and every verdict on it is computed from them.

**Question.** "ReLU's Revival" (arXiv:2410.09637) and "Entropy-Guided Attention" (arXiv:2501.03489) report that without
LayerNorm GPT-2 and Pythia reach a lower perplexity with ReLU than with GELU, while with LayerNorm it is the other way
round, and that norm-free GELU leaves most early heads in the top quarter of their possible entropy ("entropic
overload"). Their code has one seed, no Pythia, and bugs that may move the result (learned slopes are decayed, the
global one is not shared, an entropy that is NaN counts as 0). Does it hold, at tuned rates, over seeds, and why?
"""
LEGEND = (
    "Differences are ReLU \u2212 GELU where not said otherwise: of losses in nats, paired by seed (n pairs), "
    "with 95 % t intervals; told apart means that the interval excludes 0. The papers trained 2.1 billion tokens of "
    "CodeParrot, one seed, at a rate of 1e-3: what is called published is that; its differences are those of ln "
    "perplexity. Published heat maps and shares of heads are from the second paper's Figure 3. Lost, far off, "
    "overloaded, val and val_package: see Method. GELU and ReLU alone mean without block norms."
)
METHOD = """## Method, fixed before the runs

- **Unit** is the seed, which governs initial weights and data order: arms of one seed share both. Differences are
  paired, in nats of validation loss, with 95 % t intervals and every seed's point. A verdict needs 5 seeds; below it is
  called preliminary.
- **Lost** is a run whose probe (fixed validation sequences) has a forward pass that is not finite ten times in a row,
  or whose final validation loss is above the unigram entropy{unigram}. Bad steps are left out (`nan_policy=skip`); a
  run that the trainer gives up after 100 of them in a row is lost, and a run of rung D that is stopped at its first bad
  step is lost by that step. Where a run left out some and was not lost, a table says how many. Every table says how
  many of how many were lost, with the exact 95 % interval (Clopper and Pearson) in brackets; means are of the others.
- **Far off** is a run that was not lost and ended more than {far:g} nat above its arm's median. It counts as any other;
  the difference without its seed stands beside the one with it. This was added after such runs were seen: without norms
  a rate that is too high mostly leaves a run between 5.7 and 7 nats, near the unigram entropy, and often below it.
- **Rates** are chosen for each arm on seed 101, which is reported nowhere, by the loss on the first tokens of `val`.
  The optimum must be interior: a ladder whose best rate is at its end gets one more, four times at most; where the best
  rate is at the end all the same, the verdict says so. A rate at which that seed is lost, or ends more than {far:g} nat
  above its best, is said to fail: without norms an optimum is often the last rate before that, and no valley.
  Losses at 25, 50 and 100 % of the run are the trainer's own, on those same tokens; all other losses are on tokens of
  `val` that come after them and on `val_package` (packages held out whole), in fp32 whatever a run was trained in.
  Runs that differ in planned or evaluated tokens are never paired.
- **Overloaded** is a head whose mean entropy is at least three quarters of its ceiling, ln(T!)/T.
- **What heads are worth**: each head's attention is replaced by uniform causal attention, and by its own mean over
  other sequences; values and all other heads stay. Less than .001 nats is called next to nothing. The loss is that of
  {head_tokens:,} tokens, the same with and without; a head's cost has a standard error over their sequences, which was
  added later and stands in the table where it was recorded. Runs that are far off are left out.
- **Intervals** are not corrected for their number: one in twenty leaves out 0 by chance, and there are dozens. Where
  all seeds agree, as on 0 % of heads, a t interval is narrow and says little.

**What differs from the papers.** Far fewer tokens (beside each number), of the Python source of a fixed list of
packages (`experiments/corpus`) in a vocabulary of 32,768; a warm-up of a quarter of the run and a rate chosen for each
arm, where not said otherwise (`faithful_prefix` keeps the published schedule); bf16 instead of fp16; no dropout in
Pythia; the final norm kept, as in the authors' code. Everything else is the recipe of their GPT-2 code
(`conf/experiment/paper_*.yaml`): 65,536 tokens a step, AdamW (.9, .999), decay .1, clip 1, linear decay. **For Pythia
they give no recipe: that of GPT-2, its rate of 1e-3 included, is assumed.** **A perplexity here is of another text in
another vocabulary than CodeParrot's, and says nothing beside the published ones**; of a difference in nats the sign is
what compares.
"""
COMMANDS = """## Commands

```
python experiments/revival_corpus.py --out DIR                     # the fixed corpus
python experiments/relu_revival.py --scale smoke                   # the machinery, on a CPU, in a minute
python experiments/relu_revival.py --scale short --corpus DIR      # the study; --cells A B/gelu* and --budget-minutes M
python experiments/relu_revival.py --scale short --corpus DIR --gpus 0,0,0   # three cells at a time on one GPU
python experiments/relu_revival.py --scale short --dry-run         # what is left, and how long it takes
python experiments/relu_revival.py --scale full                    # the published recipe on CodeParrot
python experiments/relu_revival.py --report                        # this page
```

Alone on an H200, a cell of rung A is expected to train for {training:.0f} of its {all:.0f} seconds; start, compilation
and evaluation have the rest. With `--gpus 0,0,0` three cells share the GPU, and one trains while another starts: with
five an H200 trains all the time, six have run out of its memory. The long cells of rung C gain little by it. A budget
is best spent in one call: towards its end no cell begins any more.
"""
