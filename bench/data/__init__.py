"""Texts, labels and how clients share them."""
