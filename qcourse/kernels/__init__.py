"""How codes are multiplied: integer and packed products, each beside the exact arithmetic that it has to equal."""
