"""`python -m diffrl VERB ...`: the command line where no script is at hand, as under `accelerate launch`."""

import sys

from diffrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
