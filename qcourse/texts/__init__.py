"""Floor 3: what models read: the standard library, as running text and as pairs of question and answer."""
