"""A run is a folder: how it is named, written and read."""
