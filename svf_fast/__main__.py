"""`python -m svf_fast` prints the build facts, one a line."""

from __future__ import annotations

from svf_fast._library import build_info

__all__ = ["build_info"]


def main() -> None:
    facts = build_info()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


if __name__ == "__main__":
    main()
