"""Many runs from one command: a grid or a search, on this machine, on Slurm or on Ray; cut anywhere, it goes on."""
