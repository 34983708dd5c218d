"""Text from the templates of this folder."""

import jinja2

__all__ = ["render"]


def render(name: str, **values) -> str:
    """
    :param name: a file of this folder; in HTML values are escaped
    :param values: what its variables stand for
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("casp_plugin.report", ""),
        autoescape=".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)
