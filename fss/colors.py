"""Colors of all plots, distinct for the color-blind too (Okabe and Ito, 2008)."""

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILLION, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"

SERIES = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY)
"""In the order in which curves take them."""
