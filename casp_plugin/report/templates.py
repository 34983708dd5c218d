"""Text from the templates of this folder."""

import re

import jinja2

__all__ = ["render"]


def render(name: str, **values) -> str:
    """
    :param name: a file of this folder; in HTML values are escaped, in Markdown by the filter
        ``plain``
    :param values: what its variables stand for
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("casp_plugin.report", ""),
        autoescape=".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = lambda text: re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)
    return environment.get_template(name).render(**values)
