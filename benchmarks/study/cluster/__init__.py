"""The study at the paper's scale: LLaDA-8B-Instruct on the paper's tasks. Not run here."""
