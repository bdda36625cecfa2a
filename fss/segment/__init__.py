"""Masks of a user's own images."""
