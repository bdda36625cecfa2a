"""Data sets from their published archives: downloaded, converted and verified."""
