"""`python -m diffrl VERB ...`: the command line where no script is at hand, as under `accelerate launch`."""

from diffrl.cli import script

if __name__ == "__main__":
    script()
