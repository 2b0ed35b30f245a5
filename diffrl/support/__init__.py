"""What all other folders use and what knows none of them: errors, files, seeds, schemas, the machine, the console."""
