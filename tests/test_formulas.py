"""Formulas of the pages become MathML when the site is built."""

import markdown
import pytest

pytest.importorskip("latex2mathml", reason="comes with the extra docs")
formulas = pytest.importorskip("docs.formulas", reason="needs mkdocs")
ARITHMATEX = {"pymdownx.arithmatex": {"generic": True, "inline_syntax": ["dollar"], "block_syntax": ["dollar"]}}


def page(text):
    html = markdown.markdown(text, extensions=list(ARITHMATEX), extension_configs=ARITHMATEX)
    return formulas.on_page_content(html, None, None, None)


def test_formulas_need_no_script():
    html = page("The bound ($a < b$) holds.\n\n$$\n\\sum_l e^{x_l}\n$$\n")
    assert html.count("<math") == 2 and 'display="block"' in html
    assert "arithmatex" not in html and "$" not in html and "&#x0003C;" in html


def test_punctuation_stays_beside_an_inline_formula():
    assert ">(<math" in page("keys ($k$).") and "</math>).</span>" in page("keys ($k$).")


def test_what_the_converter_does_not_know_stops_the_build():
    with pytest.raises(Exception, match=r"\\oops in the formula"):
        page("$x + \\oops y$")
