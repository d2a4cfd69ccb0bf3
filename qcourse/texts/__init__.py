"""Texts that models read (floor 3): the standard library as documents and as query pairs."""
