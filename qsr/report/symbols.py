"""The symbols in labels of rules, as mathematics."""

import re

SYMBOLS = {"H_base": r"$H_\mathrm{base}$", "alpha": r"$\alpha$", "H": "$H$"}
"""By their names in labels, in TeX's mathematics, which matplotlib understands too."""

NAMES = {"constant H": "constant $H$", "beta/eta": r"$\beta/\eta$"}
"""Labels of rules without values, as the simulations name them."""

SYMBOL = re.compile(r"\b(H_base|alpha|H)(?= (?:=|∝) )")
"""A symbol where a label gives its value, as in "alpha = 0.0175"."""


def typeset(label: str) -> str:
    """A label for matplotlib, with its symbols typeset."""
    if label in NAMES:
        return NAMES[label]
    return SYMBOL.sub(lambda found: SYMBOLS[found[1]], label.replace("$", r"\$"))
