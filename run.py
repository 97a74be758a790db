"""Train one language model, or a sweep of them.

    python run.py model=normfree act=relu
    python run.py -m model=gpt2,normfree act=gelu,relu seed=1,2,3

Every key, its default and what it does: `python run.py --help`.
"""

import sys

from normfree.cli import main

if __name__ == "__main__":
    sys.exit(main())
