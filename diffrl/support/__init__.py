"""What every other folder leans on, and what knows none of them: errors, files, seeds, the machine, the console."""
