"""Floor 5: what is done to a whole model: quantize, prune, heal, fold, rotate; and the report of it."""
