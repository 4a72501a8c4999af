"""The loop: proposals, verification and output, speculative and standard, and the checks of a call. Never reaches into how
a model runs, and knows nothing of where models come from."""
