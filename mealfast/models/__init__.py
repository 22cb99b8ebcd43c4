"""Model specs, weights, normalisation, folding, the teacher ensemble and its layouts."""
