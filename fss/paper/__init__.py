"""The tables of the paper: listed, run, compared."""
