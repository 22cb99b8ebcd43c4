"""Processes, devices, memory, files: what the machine gives. Knows nothing of images or models."""
