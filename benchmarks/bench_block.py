"""One bottleneck each of ResNet-50's layers 2, 3 and 4.

``make bench-block``; options of the race: conftest.py, settings: levels.py.
"""

LEVEL = "block"


def test_block(contestant, group: str, peer: str) -> None:
    contestant(LEVEL, group, peer)
