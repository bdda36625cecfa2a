"""Reads the cross references of docstrings, ``:class:`Name```, as links to their entries."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """For mkdocstrings, see `extensions` in mkdocs.yml."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
