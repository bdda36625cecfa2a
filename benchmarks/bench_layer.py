"""One SVF convolution, the shapes of ResNet-50's layers 2-4, against every strategy and peer.

``make bench-layer``; options of the race: conftest.py, settings: levels.py.
"""

LEVEL = "layer"


def test_layer(contestant, group: str, peer: str) -> None:
    contestant(LEVEL, group, peer)
