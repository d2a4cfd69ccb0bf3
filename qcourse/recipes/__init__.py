"""Floor 5: change a whole model: quantize, prune, heal, fold, rotate; and report on it."""
