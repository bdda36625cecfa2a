"""ResNet-50's layers 2-4, the gradient of their input included.

``make bench-backbone``; options of the race: conftest.py, settings: levels.py.
"""

LEVEL = "backbone"


def test_backbone(contestant, group: str, peer: str) -> None:
    contestant(LEVEL, group, peer)
