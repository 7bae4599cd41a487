"""Names in literals become links to the page that explains them.

``surgery.quantization_of``, ``apply_lora_`` or ``batching.py`` in a docstring, ``minisft.lora.LoRALinear`` in a tutorial: the
text stays as it was written, so docstrings need no markup for it. A name that could mean two things is left alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

TOP_LEVEL = ("function", "class", "exception")
KINDS = (*TOP_LEVEL, "method", "property", "module")
MAP_PAGE = "api/map"


class Names:
    """The documented names: ``kinds`` by full name, and every ending by which one of them may be called."""

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.kinds = kinds
        self.endings: dict[str, list[str]] = defaultdict(list)
        for full in kinds:
            parts = full.split(".")
            for i in range(1, len(parts)):
                self.endings[".".join(parts[i:])].append(full)

    def meaning(self, text: str, module: str) -> str | None:
        """The full name that ``text`` has when it is said within ``module``."""
        is_file = text.endswith(".py")
        name = text.removesuffix(".py").replace("/", ".") if is_file else text.removesuffix("()")
        for full in (name, f"{module}.{name}"):
            if full in self.kinds:
                return full
        candidates = self.endings.get(name, [])
        if not is_file and "." not in name:
            if name.isalpha() and name.islower():
                return None  # ``choice``, ``json`` and ``loss`` are words as often as they are names
            # A bare name is no module (``nf4`` is a value), and another class's ``max_length`` is not meant either.
            candidates = [full for full in candidates if self.kinds[full] in TOP_LEVEL]
        return self._only(candidates)

    def room(self, text: str) -> str | None:
        """The module that the map calls ``text``."""
        return self._only([full for full in self.endings.get(text.rstrip("/"), []) if self.kinds[full] == "module"])

    def _only(self, candidates: list[str]) -> str | None:
        return candidates[0] if len(candidates) == 1 else None


class LinkNames(SphinxPostTransform):
    """Runs when every page has been read, so that the index of documented names is complete."""

    default_priority = 700

    def run(self, **kwargs: object) -> None:
        domain = self.env.get_domain("py")
        assert isinstance(domain, PythonDomain)
        names = Names({name: entry.objtype for name, entry in domain.objects.items() if entry.objtype in KINDS})
        for literal in list(self.document.findall(nodes.literal)):
            full = self._target(literal, names)
            if full is not None:
                entry = domain.objects[full]
                here, there = self.env.docname, entry.docname
                link = make_refnode(self.app.builder, here, there, entry.node_id, literal.deepcopy(), full)
                literal.replace_self(link)

    def _target(self, literal: nodes.literal, names: Names) -> str | None:
        text, parent = literal.astext(), literal.parent
        while parent is not None and not isinstance(parent, (addnodes.desc, nodes.reference)):
            parent = parent.parent
        if isinstance(parent, nodes.reference):
            return None
        if not self.env.docname.startswith("api/"):
            return text if text in names.kinds else None
        if self.env.docname == MAP_PAGE:
            return names.room(text)
        signature = parent.next_node(addnodes.desc_signature) if parent is not None else None
        if signature is None:
            return names.meaning(text, "")
        if text in signature["fullname"].split("."):
            return None  # a link to where the reader already is
        return names.meaning(text, signature["module"])


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
