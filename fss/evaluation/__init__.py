"""From logits to a score with its interval."""
