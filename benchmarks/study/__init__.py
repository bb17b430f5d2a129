"""The study: the paper's comparison on three tasks, rerun by one command."""
