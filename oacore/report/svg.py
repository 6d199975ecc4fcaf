"""SVG documents as parts of an HTML page."""

import re
from xml.etree import ElementTree

from markupsafe import Markup


def inlined(svg: str, name: str) -> Markup:
    """An SVG document as an HTML element: ids and styles become the page's own under the prefix `name`, the id of what
    encloses it.
    """
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = _local(element.tag)
        if element.tag in ("script", "foreignObject"):
            raise ValueError(f"figure {name}: SVG holds a <{element.tag}>")
        if element.tag == "style":
            element.text = re.sub(r"([^{}]+){", lambda rule: _scoped(rule[1], name) + "{", element.text or "")
        attributes = {_local(key): value for key, value in element.attrib.items()}
        for text in (element.text or "", *attributes.values()):
            if re.search(r"@import|url\((?!#)", text):
                raise ValueError(f"figure {name}: SVG refers to {text}")
        element.attrib.clear()
        for key, value in attributes.items():
            if key.startswith("on") or (key == "href" and not value.startswith(("#", "data:image/"))):
                raise ValueError(f"figure {name}: SVG holds {key}={value}")
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href" and value.startswith("#"):
                value = f"#{name}-{value[1:]}"
            element.set(key, value.replace("url(#", f"url(#{name}-"))
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-caption")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _scoped(selectors: str, name: str) -> str:
    """CSS selectors that hold inside element `name` alone."""
    return ",".join(f"#{name} {selector.strip()}" for selector in selectors.split(","))


def _local(name: str) -> str:
    """A tag or attribute without its namespace: HTML knows the parts of SVG by their plain names."""
    return name.rpartition("}")[2]
