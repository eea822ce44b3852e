"""The names of the package: the same to Python, which imports them lazily, and to type checkers."""

import ast
from importlib.resources import files

import pytest

import vmamba


def test_type_checkers_see_every_public_name_from_where_it_is_imported() -> None:
    source = files("vmamba").joinpath("__init__.py").read_text(encoding="utf-8")
    seen = {
        alias.name: node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vmamba.")
        for alias in node.names
    }
    assert seen == vmamba._WHERE
    assert {*seen, "__version__"} == set(vmamba.__all__)
    assert files("vmamba").joinpath("py.typed").is_file()  # without it they take every name for Any


@pytest.mark.parametrize("name", vmamba.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(vmamba, name) is not None


def test_another_name_is_told_what_there_is() -> None:
    with pytest.raises(AttributeError, match="no attribute 'create_modle'; it has VMamba, VMambaConfig"):
        _ = vmamba.create_modle  # type: ignore[attr-defined]
