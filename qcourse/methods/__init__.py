"""How codes are chosen: the range, the grid and the rounding that keep a model's predictions."""
