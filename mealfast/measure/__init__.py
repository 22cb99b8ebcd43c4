"""Stage timing and the forecast made of it."""
