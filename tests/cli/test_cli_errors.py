"""What is wrong with a recipe, or nobody foresaw, is told in one line."""

import json
from pathlib import Path

import pytest
from support.command_line import error_of

from casp_plugin import cli
from casp_plugin.modifiers.recipes import load_recipe

GOOD = "casp_stage:\n  casp_modifiers:\n    GPTQModifier: {}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- GPTQModifier: {}\n", "it holds [{'GPTQModifier': {}}], not a table of stages"),
        ("", "it is empty; a recipe has the form casp_stage: {casp_modifiers: {GPTQModifier: {}}}"),
        ("# nothing\n", "it is empty"),
        ("GPTQModifier\n", "it holds 'GPTQModifier', not a table of stages"),
        ("{}", "it names no modifier"),
        ("casp_stage:\n  casp_modifiers: {}\n", "it names no modifier"),
        ("casp_stage:\n\tcasp_modifiers: {}\n", "line 2: found character '\\t' that cannot start"),
        (GOOD.replace("casp_stage", "casp"), "'casp' is no stage: the name must end in _stage"),
        (GOOD.replace("casp_mod", "casp_stuff_mod"), None),
        (
            GOOD.replace("casp_modifiers", "casp"),
            "'casp' is no group of modifiers of casp_stage: the name must end in _modifiers",
        ),
        ("casp_modifiers:\n  GPTQModifier: {}\n", "'casp_modifiers' is no stage"),
        ("GPTQModifier: {}\n", "'GPTQModifier' is no stage"),
        ("casp_stage: [GPTQModifier]\n", "casp_stage holds ['GPTQModifier'], not a table"),
        ("casp_stage:\n", "casp_stage holds None, not a table"),
        ("casp_stage:\n  casp_modifiers: [GPTQModifier]\n", "casp_modifiers holds ['GPTQMod"),
        (GOOD.replace("{}", ""), "GPTQModifier holds None, not a table of its fields: GPTQMod"),
        (GOOD.replace("{}", "[]"), "GPTQModifier holds [], not a table of its fields"),
        (
            GOOD.replace("GPTQ", "GTPQ"),
            "there is no modifier 'GTPQModifier'; there are AQLMModifier",
        ),
        (
            GOOD.replace("{}", "{dampening: 1}"),
            "GPTQModifier has no field 'dampening'; it has config_groups, ",
        ),
        (
            GOOD.replace("{}", "{block_size: many}"),
            "GPTQModifier.block_size: Input should be a valid integer",
        ),
        (GOOD + GOOD, "line 4: key 'casp_stage' comes twice"),
        (GOOD + "    GPTQModifier: {block_size: 64}\n", "line 4: key 'GPTQModifier' comes twice"),
        (GOOD.replace("{}", "{block_size: [}"), "line 3: "),
        (GOOD.encode("utf-16"), "line 1 is not UTF-8"),
        (
            "# caf\xe9\n".encode("latin-1"),
            "line 1 is not UTF-8 (byte 0xe9): save the file in UTF-8",
        ),
        (GOOD, None),
        ("run_type: oneshot\n" + GOOD, None),
    ],
)
def test_recipes(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if message is None:
        assert len(load_recipe(path).modifiers) == 1
        return
    with pytest.raises(ValueError) as caught:  # noqa: PT011  what it says is compared as it is
        load_recipe(path)
    told = str(caught.value)
    assert told.startswith(f"{path}: {message}")
    assert "\n" not in told


def test_recipes_in_json(tmp_path):
    recipe = {"casp_stage": {"casp_modifiers": {"GPTQModifier": {"block_size": 64}}}}
    (tmp_path / "a.json").write_text(json.dumps(recipe, indent="\t"))
    assert load_recipe(tmp_path / "a.json").modifiers[0].block_size == 64
    (tmp_path / "a.json").write_text('{"a_stage": {}, "a_stage": {}}')
    with pytest.raises(ValueError, match=r"a\.json: key 'a_stage' comes twice"):
        load_recipe(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a_stage": }')
    with pytest.raises(ValueError, match=r"a\.json: "):
        load_recipe(tmp_path / "a.json")


def test_recipes_as_text():
    assert len(load_recipe(GOOD).modifiers) == 1
    with pytest.raises(ValueError, match=r"^the recipe: there is no modifier 'XModifier'"):
        load_recipe(GOOD.replace("GPTQ", "X"))


def test_every_recipe_that_ships_is_read():
    recipes = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
    assert recipes
    assert all(load_recipe(path).modifiers for path in recipes)


def fail(monkeypatch, capsys, error):
    """What ``casp check`` prints to stderr if its work fails so."""

    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr("casp_plugin.checkpoint.check.check", broken)
    monkeypatch.setattr("sys.argv", ["casp", "check", "."])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    return capsys.readouterr().err


def test_what_nobody_foresaw(monkeypatch, capsys, tmp_path):
    """One line, and where the traceback is."""
    monkeypatch.setenv("CASP_CACHE", str(tmp_path / "cache"))
    told = fail(monkeypatch, capsys, KeyError("some\nthing [red]"))
    [kept] = (tmp_path / "cache").glob("traceback-*.txt")
    assert told == f"error: KeyError: 'some\\nthing [red]' (traceback: {kept})\n"
    assert "in broken" in kept.read_text()
    assert "KeyError" in kept.read_text()


def test_a_traceback_that_cannot_be_kept_in_the_cache(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CASP_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told = fail(monkeypatch, capsys, RuntimeError("a\n  b"))
    [kept] = tmp_path.glob("traceback-*.txt")
    assert told == f"error: RuntimeError: a b (traceback: {kept})\n"


def test_errors_of_several_lines(monkeypatch, capsys):
    told = fail(monkeypatch, capsys, ValueError("much " * 40 + "\n\n  is wrong"))
    assert told == "error: " + "much " * 40 + "is wrong\n"
    assert fail(monkeypatch, capsys, ValueError()) == "error: ValueError\n"


def test_a_reference_without_data(tiny_llama, monkeypatch, capsys):
    """Tasks of a harness have no reference; told before any model is loaded."""

    def load(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr("casp_plugin.model.load.load_model", load)
    command = ["eval", tiny_llama, "--tasks", "casp_facts", "--reference", tiny_llama]
    told = error_of(capsys, monkeypatch, *command)
    assert "--reference is compared on data: give --dataset, or leave out --tasks" in told
