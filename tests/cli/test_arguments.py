from dataclasses import dataclass, field

import pytest

from vmamba.cli.arguments import UsageError, nearest, parse
from vmamba.training.detection_recipe import DetectionRecipe
from vmamba.training.recipe import Recipe


@dataclass(frozen=True)
class Inner:
    """Inner options.

    Args:
        lr: A rate.
    """

    lr: float = 0.1


@dataclass(frozen=True)
class Options:
    """Do something.

    Args:
        files: Names.
        epochs: How long.
        size: A size, or none.
        extra: Anything.
        inner: More.
    """

    files: list[str] = field(default_factory=list)
    epochs: int = 3
    size: int | None = None
    extra: dict[str, int] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def read(*words):
    return parse("something", Options, words, positionals=[("files", "*")])


def test_flags_yaml_and_defaults(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("epochs: 7\ninner:\n  lr: 0.5\nextra:\n  anything: 1\n")
    assert read() == Options()
    assert read("--config", path.as_posix()) == Options(epochs=7, inner=Inner(0.5), extra={"anything": 1})
    assert read("--config", path.as_posix(), "--epochs", "9", "a", "b").epochs == 9
    assert read("a", "b", "--inner.lr=2").files == ["a", "b"]
    assert read("--extra.some_key", "4").extra == {"some_key": 4}
    assert parse("train", Recipe, ["--batch-size", "7"]).batch_size == 7


def test_print_config_can_be_read_back(tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("train", Recipe, ["--model", "vmamba_base", "--optimizer.lr", "1e-4", "--print_config"])
    assert not leaving.value.code
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    recipe = parse("train", Recipe, ["--config", str(path)])
    assert (recipe.model, recipe.optimizer.lr) == ("vmamba_base", 1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epocs", "3"], "there is no option --epocs; did you mean --epochs?"),
        (["--lr", "3"], "there is no option --lr; did you mean --inner.lr?"),
        (["--inner.rl", "3"], "there is no option --inner.rl; did you mean --inner.lr?"),
        (["--inner", '{"rl": 3}'], "there is no key inner.rl; did you mean inner.lr?"),
        (["--qqqqqq"], "there is no option --qqqqqq"),
        (["--epochs", "many"], "--epochs: expected int, got many"),
        (["--size", "1.5"], "--size: expected int or null, got 1.5"),
        (["--epochs"], "--epochs: expected one argument"),
        (["--config", "/no/such.yaml"], "cannot read --config /no/such.yaml: No such file or directory"),
        (["--config"], "cannot read --config (no file given)"),
        (["-x"], "unrecognized arguments: -x"),
    ],
)
def test_what_cannot_be_understood(words, message):
    with pytest.raises(UsageError) as caught:
        read(*words)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epocs: 3\n", "there is no key epocs; did you mean epochs?"),
        (b"inner:\n  rl: 3\n", "there is no key inner.rl; did you mean inner.lr?"),
        (b"epochs: [3\n", "is not readable YAML (line 2, column 1)"),
        (b"- a\n- b\n", "must hold keys and values, not a list"),
        (b"# nothing\n", "must hold keys and values, not nothing"),
        (b"epochs: many\n", "--epochs: expected int, got many"),
        (b"\xff\xfe\x00", "is not readable YAML"),
        (b"3: 4\n", "there is no key 3"),
    ],
)
def test_yaml_that_cannot_be_understood(tmp_path, content, message):
    path = tmp_path / "options.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read("--config", str(path))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_nearest_compares_whole_names_and_last_parts():
    known = ["epochs", "optimizer.lr", "optimizer.weight_decay"]
    assert nearest("epoch", known) == "epochs"
    assert nearest("lr", known) == "optimizer.lr"
    assert nearest("weight-decay", known) == "optimizer.weight_decay"
    assert nearest("zzz", known) is None


def test_several_values_need_no_brackets():
    recipe = parse("train", DetectionRecipe, ["--min_sizes", "480", "800", "--trackers", "wandb", "--milestones", "8"])
    assert (recipe.min_sizes, recipe.trackers, recipe.milestones) == ((480, 800), ("wandb",), (8,))
    assert parse("train", Recipe, ["--optimizer.betas", "0.8", "0.9", "--epochs", "2"]).optimizer.betas == (0.8, 0.9)
    assert parse("train", Recipe, ["--trackers", "[]"]).trackers == ()
    with pytest.raises(UsageError, match=r"--trackers needs a value; --trackers \[\] gives none"):
        parse("train", Recipe, ["--trackers", "--epochs", "2"])


def test_a_recipe_of_another_task_is_told_apart_from_a_misspelt_key(tmp_path):
    path = tmp_path / "recipe.yaml"
    for content, message in (
        ("task: detection\nmasks: true\n", "is of --task detection, and this is --task classification"),
        ("task: classification\nmasks: true\n", "there is no key masks"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            parse("train", Recipe, ["--config", str(path)])


def test_values_without_an_option_are_told_where_they_belong():
    with pytest.raises(UsageError, match="unrecognized arguments: runs/a; a value follows the name of its option"):
        parse("train", Recipe, ["runs/a"])
    with pytest.raises(UsageError, match=r"expected a YAML file, got lr=3; --optimizer\.KEY sets one of its keys"):
        parse("train", Recipe, ["--optimizer", "lr=3"])
