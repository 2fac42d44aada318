"""Where a study is kept, and that no password gets into a recipe or out of a refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graft.core.errors import ConfigError
from graft.core.passwords import mask_passwords
from graft.recipe import RecipeSpace

Load = Callable[..., RecipeSpace]

SECRET = "s3cr/t@x"


def refused(load: Load, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann@db.example:5432/studies",
        "postgres://db.example/studies",
        "postgresql://ann@/studies?host=/run/postgresql",
    ],
)
def test_a_database_is_named_by_its_url(load: Load, url: str) -> None:
    space = load(f"search: {{storage: '{url}', storage_password_env: STUDY_PASSWORD}}")
    assert space.sections().search.storage == url


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://ann:{SECRET}@db.example/studies",
        "postgresql://ann:s3cr@db.example/studies",
        f"postgresql://db.example/studies?password={SECRET}",
        f"postgresql://db.example/studies?sslmode=require&sslpassword={SECRET}",
        f"mysql://ann:{SECRET}@db.example/studies",
    ],
)
@pytest.mark.parametrize("is_override", [True, False])
def test_a_password_in_a_url_is_refused_and_not_repeated(
    load: Load, url: str, is_override: bool
) -> None:
    if is_override:
        words = refused(load, "", f"search.storage={url}")
        assert words.startswith("--set search.storage=")
    else:
        words = refused(load, f"search:\n  storage: '{url}'")
        assert ":4: search.storage: " in words
    assert "s3cr" not in words
    assert "***" in words


def test_a_password_under_a_wrong_key_is_not_repeated_either(load: Load) -> None:
    url = f"postgresql://ann:{SECRET}@db.example/studies"
    assert "s3cr" not in refused(load, f"search: '{url}'")
    assert "s3cr" not in refused(load, f"search: {{trials: '{url}'}}")
    assert "s3cr" not in refused(load, "", f"search.trials={url}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("storage: sqlite:///studies.db", "is no PostgreSQL database; write postgresql://USER@"),
        ("storage: db.example", "is no PostgreSQL database"),
        ("storage: postgresql://ann@db.example", "names no database"),
        ("storage: postgresql://ann@db.example:port/studies", "its port is no number"),
        ("storage: 7", "search.storage: must be text, not 7"),
        ("storage_password_env: PASSWORD", "the password of `storage`, which is not set"),
        (
            "{storage: postgresql://db/x, storage_password_env: my-password}",
            "search.storage_password_env: must be text of the form",
        ),
        ("{sampler: grid, warm_start: [march]}", "sampler grid learns nothing from warm_start"),
        ("warm_start: march", "search.warm_start: must be a list"),
    ],
)
def test_what_is_no_storage_and_no_start_is_refused(load: Load, text: str, words: str) -> None:
    assert words in refused(load, f"search: {text if text.startswith('{') else f'{{{text}}}'}")


def test_other_text_is_left_as_it_is() -> None:
    text = "see https://db.example:8000/a and ann@db.example, lr: 1e-3"
    assert mask_passwords(text) == text
