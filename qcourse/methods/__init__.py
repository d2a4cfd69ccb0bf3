"""Floor 2: how codes are chosen. Which range, which grid, which rounding leaves a model's answers as they were."""
