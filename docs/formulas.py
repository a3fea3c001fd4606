"""Write formulas as MathML, which browsers draw without a script or a network; a hook of mkdocs.yml."""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# Arithmatex's generic form of `$...$` and `$$...$$`.
# No line breaks between an inline formula and the punctuation around it.
_INLINE = re.compile(r'(\(?)<span class="arithmatex">\\\((.+?)\\\)</span>([.,;:)]*)', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>', re.DOTALL)
# The converter leaves no space between a function's name and its argument.
_NAME = re.compile(r"(<mi>[a-z]{2,}</mi>)(?=<m(?!o))")


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Replace each formula of a page."""
    content = _BLOCK.sub(lambda found: f'<div class="formula">{_mathml(found[1], "block")}</div>', content)
    return _INLINE.sub(lambda found: _unbroken(found[1] + _mathml(found[2], "inline") + found[3]), content)


def _unbroken(text: str) -> str:
    return f'<span class="unbroken">{text}</span>'


def _mathml(formula: str, display: str) -> str:
    formula = html.unescape(formula).strip()
    converted = convert(formula, display=display)
    if unknown := re.search(r"\\\w*", converted):  # the converter writes what it does not know as text
        raise PluginError(f"{unknown[0]} in the formula {formula!r} is not known to latex2mathml; write it without")
    return _NAME.sub(r'\1<mspace width="0.167em" />', converted)
