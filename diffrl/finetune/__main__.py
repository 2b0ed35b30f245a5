"""`accelerate launch -m diffrl.finetune ...`: `diffrl finetune ...` in several processes."""

import sys

from diffrl.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
