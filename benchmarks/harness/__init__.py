"""What all studies share: tables of results, the environment of a run, reports, memory and processes."""
