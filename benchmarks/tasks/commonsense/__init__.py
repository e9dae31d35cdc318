"""Seven commonsense sets as tasks of lm-evaluation-harness over local files, and as rows to train on."""
