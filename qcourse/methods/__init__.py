"""Methods: how the range, the grid and the codes are chosen to keep a model's predictions."""
