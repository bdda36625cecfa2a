"""Colours of all plots: distinct to the colour-blind too (Okabe and Ito, 2008)."""

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
