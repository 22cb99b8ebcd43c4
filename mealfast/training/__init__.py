"""The run: job, step, optimiser, loop, evaluation, resume."""
