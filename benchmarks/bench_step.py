"""The baseline model: forward and backward of one episode, the head included.

``make bench-step``; options of the race: conftest.py, settings: levels.py.
"""

LEVEL = "step"


def test_step(contestant, group: str, peer: str) -> None:
    contestant(LEVEL, group, peer)
