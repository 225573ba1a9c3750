"""Recipes: from names, files, mappings and Python; overrides; and errors that say what to write instead."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppl_lvm import lookup
from ppl_lvm.algorithm import Objective, Schedule
from ppl_lvm.catalogue import estimators, guides, objectives, resolve
from ppl_lvm.errors import RecipeError
from ppl_lvm.recipe import Optimizer, Recipe, recipe, recipes

OWN = """
from ppl_lvm.algorithm import Estimator, NonNegative, Objective

class tempered(Objective):
    power: NonNegative = 1.0

class straight(Estimator):
    temperature: NonNegative = 1.0
"""


class python_made(Objective):
    power: float = 1.0


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def message(asked: Any, **overrides: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(asked, **overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", recipes())
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    found = recipe(name)
    assert found.name == name
    assert recipes()[name].read_text().startswith("# ")
    assert recipe(recipes()[name]) == found
    assert recipe(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("kind", [objectives, estimators, guides], ids=["objective", "estimator", "guide"])
def test_every_file_defines_the_class_of_its_name(kind: Any, request: pytest.FixtureRequest) -> None:
    for name, path in kind().items():
        found = resolve(request.node.callspec.id, name, Path(), "the test")
        assert found.__name__ == path.stem == name
        assert found.__doc__


def test_the_first_recipes_are_what_they_are_called() -> None:
    assert recipe("iwae").to_dict() == {
        "name": "iwae",
        "objective": {"name": "iwae", "draws": 50, "outer": 1},
        "guide": "own",
        "estimator": {"*": "auto"},
        "steps": 3000,
        "batch_size": 128,
        "optimizer": {"name": "adam", "learning_rate": 1e-3},
    }
    assert recipe("elbo_closed_kl").to_dict()["objective"]["kl"] == "closed_form"
    assert recipe("beta_vae").to_dict()["objective"]["beta"] == 4.0


def test_a_name_alone_is_short_for_a_table() -> None:
    short = recipe({"objective": "elbo", "estimator": "pathwise", "optimizer": "sgd"})
    long = recipe(
        {
            "objective": {"name": "elbo"},
            "estimator": {"*": {"name": "pathwise"}},
            "optimizer": {"name": "sgd"},
        }
    )
    assert short == long
    assert hash(short) == hash(long)
    assert recipe({"objective": "elbo", "estimator": {"name": "score", "decay": 0.5}}).to_dict()[
        "estimator"
    ] == {"*": {"name": "score", "baseline": "none", "decay": 0.5, "hidden": 32}}


def test_the_most_specific_pattern_wins_in_whatever_order_it_is_written() -> None:
    table = {"*": "score", "z*": "pathwise", "z2": "rloo", "z[0]": "dreg"}
    chosen = recipe({"objective": "elbo", "estimator": table})
    names = {site: type(chosen.estimator_for(site)).__name__ for site in ("z2", "z1", "y", "z[0]")}
    assert names == {"z2": "rloo", "z1": "pathwise", "y": "score", "z[0]": "dreg"}
    assert chosen == recipe({"objective": "elbo", "estimator": dict(reversed(table.items()))})
    assert recipe({"objective": "elbo", "estimator": {"z": "auto"}}).estimator_for("z") is None
    assert recipe({"objective": "elbo", "estimator": {"z": "score"}}).estimator_for("y") is None


def test_overrides_reach_fields_options_and_dotted_options() -> None:
    changed = recipe(
        "iwae",
        steps=7,
        draws=3,
        learning_rate=1e-2,
        batch_size=None,
        **{"optimizer.name": "sgd", "estimator.y": "rloo"},
    ).to_dict()
    assert (changed["steps"], changed["batch_size"]) == (7, None)
    assert changed["objective"] == {"name": "iwae", "draws": 3, "outer": 1}
    assert changed["optimizer"] == {"name": "sgd", "learning_rate": 1e-2}
    assert changed["estimator"] == {"y": {"name": "rloo"}, "*": "auto"}


def test_overrides_do_not_depend_on_their_order() -> None:
    for section in ("objective", "objective.name"):
        given = {"draws": 9, section: "iwae"}
        assert recipe("elbo", **given) == recipe("elbo", **dict(reversed(given.items())))
        assert recipe("elbo", **given).to_dict()["objective"]["draws"] == 9


def test_options_of_estimators_can_be_overridden() -> None:
    one = recipe("elbo", estimator="score", **{"estimator.baseline": "linear"})
    assert one == recipe("elbo", estimator={"name": "score", "baseline": "linear"})
    assert one == recipe("elbo", estimator="score", baseline="linear")
    assert one == recipe("elbo", **{"estimator.*.name": "score", "estimator.*.baseline": "linear"})
    assert one == recipe("elbo", **{"estimator.name": "score", "estimator.baseline": "linear"})
    two = recipe("elbo", estimator={"a.b": "score", "y": "score"}, **{"estimator.a.b.decay": 0.5})
    assert two.to_dict()["estimator"]["a.b"]["decay"] == 0.5
    assert two.to_dict()["estimator"]["y"]["decay"] == 0.9


def test_numbers_may_be_schedules() -> None:
    table = {"schedule": "linear", "start": 0.0, "end": 1.0, "steps": 100}
    annealed = recipe("elbo", beta=table)
    assert annealed.algorithm.numbers() == {
        "beta": Schedule(schedule="linear", start=0.0, end=1.0, steps=100)
    }
    assert annealed == recipe("elbo", beta=Schedule(schedule="linear", start=0.0, end=1.0, steps=100))
    assert recipe(json.loads(json.dumps(annealed.to_dict()))) == annealed
    (optimizer,) = recipe("elbo", learning_rate=table | {"schedule": "cosine"}).optimizers.values()
    assert optimizer.numbers()


def test_algorithms_of_a_users_file(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"objective": {"name": f"{own}:tempered", "power": 2.0}, "estimator": {"z": f"{own}:straight"}}
    found = recipe(table, temperature=0.5)
    assert found.to_dict()["objective"]["power"] == 2.0
    assert recipe(json.loads(json.dumps(found.to_dict()))) == found
    (tmp_path / "mine.toml").write_text('objective = "own.py:tempered"')
    assert recipe(tmp_path / "mine.toml", power=2.0).objective == found.objective, (
        "relative to the recipe's file"
    )
    assert recipe(str(tmp_path / "mine.toml")).name == "mine"
    monkeypatch.chdir(tmp_path)
    assert recipe("elbo", objective={"name": "own.py:tempered", "power": 2.0}).objective == found.objective


def test_algorithms_from_python() -> None:
    by_class = recipe(
        {"objective": python_made, "estimator": {"*": resolve("estimator", "score", Path(), "")}}
    )
    assert by_class.objective == python_made()
    assert recipe({"objective": {"name": python_made, "power": 2}}).objective == python_made(power=2.0)
    assert recipe("elbo", objective=python_made(power=2.0), draws=3).objective == python_made(
        power=2.0, draws=3
    )
    assert recipe(python_made(power=2.0)) == recipe(python_made, power=2.0)
    assert recipe(by_class) == by_class
    assert recipe(by_class, steps=3).steps == 3
    assert by_class == Recipe(objective=python_made(), estimator={"*": by_class.estimator_for("z")})
    assert recipe("elbo", optimizer=Optimizer(name="sgd")).optimizer == Optimizer(name="sgd")
    assert by_class.to_dict()["objective"]["name"].endswith(":python_made")


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe("elbo").steps = 3


def test_unknown_names_list_the_valid_ones_and_suggest_one() -> None:
    assert re.match(r"Unknown recipe 'iwea'\. Did you mean 'iwae'\? Recipes: .*elbo", message("iwea"))
    unknown = message({"objective": "elbw"})
    assert "unknown objective 'elbw'. Did you mean 'elbo'? Objectives: autogen, capacitron" in unknown
    assert "path/to/file.py:elbw" in unknown
    unknown = message("elbo", estimator={"y": "pathwis"})
    assert unknown.startswith("estimator.y of recipe 'elbo' asks for an unknown estimator 'pathwis'")
    assert "Did you mean 'pathwise'?" in unknown
    unknown = message("iwae", drwas=3)
    assert "has no option 'drwas'. Did you mean 'draws'? Options: alternate, batch_size, check_every" in unknown
    assert "objective, 'elbo', has no option 'draw'. Did you mean 'draws'?" in message(
        "elbo", **{"objective.draw": 3}
    )
    unknown = message({"objective": "elbo", "stps": 3})
    assert "unknown key 'stps'. Did you mean 'steps'? Keys: alternate" in unknown
    assert "optimizer has no option 'lr'. Options: clip, learning_rate, name, weight_decay." in message(
        "elbo", optimizer={"lr": 1}
    )


def test_wrong_values_name_the_key_the_value_and_what_is_expected() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"draws": "3"}, "objective.draws is '3', but it should be a valid integer."),
        ({"draws": True}, "objective.draws is True, but it should be a valid integer."),
        ({"steps": 0}, "steps is 0, but it should be greater than or equal to 1."),
        ({"kl": "closed"}, "objective.kl is 'closed', but it should be 'sampled', 'closed_form' or 'where_known'."),
        ({"optimizer": "adm"}, "optimizer.name is 'adm', but it should be 'adam', 'sgd', 'adamw' or 'natural'."),
        ({"optimizer": 3}, "optimizer is 3, but it should be a name"),
        ({"objective": 3}, "objective is 3, but it should be the name of an objective"),
        ({"objective": {"nam": "elbo"}}, "objective is {'nam': 'elbo'}, but it should be a name, or a table"),
        ({"beta": "big"}, "objective.beta is 'big', but it should be a valid number, or a schedule {"),
        (
            {"learning_rate": -1},
            "optimizer.learning_rate is -1, but it should be greater than or equal to 0.",
        ),
        (
            {"beta": {"schedule": "lin", "start": 1.0, "end": 0.0}},
            "objective.beta.schedule is 'lin', but it should be 'linear', 'cosine' or 'exponential'; "
            "objective.beta.steps is missing.",
        ),
        (
            {"estimator": {"name": "score", "decay": 1.5}},
            "estimator.*.decay is 1.5, but it should be less than 1",
        ),
        (
            {"steps": "many", "batch_size": 0},
            "steps is 'many', but it should be a valid integer; batch_size is 0,",
        ),
    ]
    for overrides, expected in cases:
        found = message("elbo", **overrides)
        assert expected in found
        assert "'elbo'" in found
        assert "pydantic" not in found
        assert "\n" not in found


def test_optimisers_by_pattern() -> None:
    table = {"*": {"learning_rate": 0.1}, "model": {"name": "sgd"}, "encoder.*": {"clip": 3.0}}
    found = recipe("elbo", optimizer=table)
    assert list(found.optimizers) == ["model", "encoder.*", "*"]
    assert found == recipe("elbo", optimizer=dict(reversed(table.items())))
    assert hash(found) == hash(recipe(json.loads(json.dumps(found.to_dict()))))
    assert recipe(found.to_dict()) == found
    changed = recipe(found, **{"optimizer.encoder.*.learning_rate": 0.5, "optimizer.guide": {"name": "sgd"}})
    assert changed.optimizers["encoder.*"] == Optimizer(learning_rate=0.5, clip=3.0)
    assert changed.optimizers["guide"] == Optimizer(name="sgd")
    one = recipe("elbo", **{"optimizer.guide": {"name": "sgd"}})
    assert one.optimizers == {"*": Optimizer(), "guide": Optimizer(name="sgd")}
    assert "optimizer.model.learning_rate, optimizer.encoder.*.learning_rate" in message(found, learning_rate=1.0)
    assert "Did you mean 'optimizer.*.clip'" in message(found, **{"optimizer.clp": 1.0})
    assert "optimizer.model has no option 'lr'. Options: clip" in message(found, **{"optimizer.model.lr": 1.0})
    assert "weight_decay is an option of adamw, and the optimiser is sgd" in message(
        "elbo", optimizer={"name": "sgd", "weight_decay": 0.1}
    )
    assert "optimizer.clip is 0.0, but it should be greater than 0" in message("elbo", clip=0.0)


def test_stages_replace_keys_of_their_recipe() -> None:
    table = {
        "objective": {"name": "elbo", "draws": 2},
        "steps": 10,
        "stages": [{"freeze": "guide"}, {"objective": "iwae", "draws": 7, "steps": 20}],
    }
    found = recipe(table)
    first, second = found.stages
    assert first.objective is not None and second.objective is not None
    assert (first.freeze, first.steps, first.objective.draws) == (("guide",), 10, 2)
    assert (second.freeze, second.steps, second.objective.draws) == ((), 20, 7)
    assert recipe(json.loads(json.dumps(found.to_dict()))) == found
    assert [stage.steps for stage in recipe(table, steps=3).stages] == [3, 3]
    assert recipe(found, steps=3) == recipe(table, steps=3)
    listed = recipe(["elbo", "iwae"], learning_rate=0.5)
    assert [type(stage.objective).__name__ for stage in listed.stages] == ["elbo", "iwae"]
    assert all(stage.optimizers["*"].learning_rate == 0.5 for stage in listed.stages)
    assert recipe(["elbo"]) == recipe("elbo")
    assert "stages[0] is 3, but it should be a table" in message({"objective": "elbo", "stages": [3]})
    assert "stages is 'iwae', but it should be a list" in message({"objective": "elbo", "stages": "iwae"})
    assert "has no option 'stps'. Did you mean 'steps'" in message({"objective": "elbo", "stages": [{"stps": 3}]})
    assert "has stages of its own" in message({"objective": "elbo", "stages": [{"stages": []}]})
    assert "a key of stages[0] is 0, but it should be a string" in message({"objective": "elbo", "stages": [{0: 1}]})
    assert "has stages of its own and cannot be one" in message([found, "elbo"])
    assert "empty list" in message([])


def test_keys_of_the_loop() -> None:
    found = recipe("elbo", freeze="guide", patience=3, min_delta=0.1, check_every=5, restarts=2)
    assert found.freeze == ("guide",)
    assert recipe(json.loads(json.dumps(found.to_dict()))) == found
    assert {"freeze", "patience", "restarts"}.isdisjoint(recipe("elbo").to_dict())
    assert "patience is 0, but it should be greater than or equal to 1" in message("elbo", patience=0)
    assert "freeze is 3, but it should be a valid tuple" in message("elbo", freeze=3)
    assert "has no option 'patince'. Did you mean 'patience'" in message("elbo", patince=3)


def test_what_cannot_be_placed_asks_for_more() -> None:
    two = {"z": "score", "y": "score"}
    assert "any of estimator.z.decay, estimator.y.decay; give one of these" in message(
        "elbo", estimator=two, decay=0.5
    )
    assert "'auto' and has no option 'decay'; name an estimator first" in message(
        "elbo", **{"estimator.*.decay": 0.5}
    )
    assert 'names no objective; add for example objective = "elbo"' in message({"steps": 3})
    assert "by 3, of type int; give a name" in message(3)


def test_files_that_cannot_be_read(own: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text('objective = "elbo"\nsteps = = 3\n')
    found = message(broken)
    assert str(broken) in found
    assert "is not valid TOML" in found
    assert "line 2" in found
    assert "no recipe file nowhere.toml" in message("nowhere.toml")
    assert "Cannot read" in message("elbo", objective="nowhere.py:elbo")
    assert "add the class, as in nowhere.py:my_objective" in message("elbo", objective="nowhere.py")
    assert "Did you mean 'tempered'?" in message("elbo", objective=f"{own}:tempred")
    assert "not a subclass of ppl_lvm.algorithm.Objective" in message("elbo", objective=f"{own}:straight")
    assert "No module named 'nowhere'" in message("elbo", objective="nowhere:elbo")
    own.write_text(OWN + "\nimport nowhere\n")
    found = message("elbo", objective=f"{own}:tempered")
    assert f"{own}, line 10, raised ModuleNotFoundError: No module named 'nowhere'" in found
    own.write_text(OWN + "\nclass\n")
    assert f"{own}, line 10, raised SyntaxError" in message("elbo", objective=f"{own}:tempered")


def test_an_edited_file_is_read_anew_and_an_unchanged_one_gives_the_same_class(own: Path) -> None:
    first, again = (resolve("objective", f"{own}:tempered", Path(), "") for _ in range(2))
    assert first is again
    own.write_text(OWN.replace("power", "sharpness"))
    assert "sharpness" in resolve("objective", f"{own}:tempered", Path(), "").model_fields


def test_listing_imports_no_framework() -> None:
    code = """
import sys
from ppl_lvm.recipe import estimators, objectives, recipes
assert {"elbo", "iwae"} <= set(objectives()) & set(recipes())
assert {"pathwise", "score"} <= set(estimators())
loaded = {"torch", "jax", "pyro", "numpyro"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], cwd=lookup.PACKAGE.parent, check=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("freeze = " + "[" * 3000 + "]" * 3000, "too deep to be a recipe"),
        ("freeze = " + "[" * 200 + "]" * 200, "within each other"),
        ("[objective]\nname = 'elbo'\ndraws" + ".a" * 400 + " = 1\n[[stages]]\nsteps = 1", "within each other"),
        ("steps = " + "9" * 5000, "not valid TOML"),
        ("name = '" + "x" * 2**20 + "'", "bytes, which no recipe has"),
        ("name = '\xff'", "not valid TOML"),
    ],
)
def test_files_that_would_exhaust_the_parser_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "any.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match=said):
        recipe(path)
