"""Content hash, atomic directories, and looking things up without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from modeseek_ray.errors import ModelError
from modeseek_ray.playground import NAMES, cache, locate
from modeseek_ray.playground.recipe import RECIPES


def test_names_are_the_recipes():
    assert set(NAMES) == set(RECIPES)


def test_nothing_is_located_before_it_is_built(tmp_path):
    assert locate("moe", tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_located_once_the_directory_is_there(tmp_path):
    directory = cache.model_directory("moe", tmp_path)
    directory.mkdir(parents=True)
    assert locate("moe", tmp_path) == directory
    assert locate("moe", tmp_path, seed=1) is None
    assert locate("dense", tmp_path) is None


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ModelError, match=r"'large'.*moe, dense"):
        locate("large", tmp_path)


def test_the_directory_changes_with_recipe_and_seed(tmp_path):
    recipe = RECIPES["moe"]
    paths = {
        cache.model_directory("moe", tmp_path),
        cache.model_directory("moe", tmp_path, seed=1),
        cache.model_directory("moe", tmp_path, recipe=replace(recipe, steps=recipe.steps + 1)),
    }
    assert len(paths) == 3


def test_the_hash_follows_code_but_not_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    source = tmp_path / "skills.py"

    def key(text):
        source.write_text(text)
        return cache.fingerprint({}, ["skills.py"], [])

    assert key("LENGTH = 3\n") == key("LENGTH   =   3  # letters\n")
    assert key("LENGTH = 3\n") != key("LENGTH = 4\n")


def test_a_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "model"
    with cache.written_whole(target) as partial:
        (partial / "weights").write_text("all of them")
        assert not target.exists()
    assert (target / "weights").read_text() == "all of them"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def _interrupted(target):
    with cache.written_whole(target) as partial:
        (partial / "weights").write_text("half")
        raise RuntimeError("interrupted")


def test_a_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="interrupted"):
        _interrupted(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_looking_up_loads_neither_torch_nor_transformers(tmp_path):
    program = (
        "import sys; from pathlib import Path; from modeseek_ray.playground import data_files, locate;"
        "locate('moe', Path(sys.argv[1])); data_files(Path(sys.argv[1]));"
        "print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == "[]"
