"""The prior mask of one shot: cosine_max against the dense matrix of similarities.

``make bench-prior``; options of the race: conftest.py, settings: levels.py.
"""

LEVEL = "prior"


def test_prior(contestant, group: str, peer: str) -> None:
    contestant(LEVEL, group, peer)
