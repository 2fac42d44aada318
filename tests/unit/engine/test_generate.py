"""Continuous batching against transformers' own `generate`, and against each request alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from graft.core.errors import ConfigError
from graft.engine.generate import GenerationRequest, GenerationResult, Generator
from graft.engine.multi import MultiAdapterModel
from graft.engine.sampling import next_tokens
from graft.engine.text_stream import TextStream
from graft.methods.lora import LoraMethod
from graft.testing import tiny_model, tiny_tokenizer

METHODS = {
    "a": LoraMethod(r=4, lora_alpha=8, target_modules="all-linear"),
    "b": LoraMethod(r=8, lora_alpha=32, target_modules=("q_proj", "v_proj", "down_proj")),
}
PROMPTS = [
    "put lamp to 7",
    "she sells sea shells by the sea shore and sells more",
    "x",
    "turn fan to 3 now please",
    "a quick brown fox",
    "move door",
]
SLOTS = ["a", "b", None, "b", "a", None]
NUM_NEW = [9, 14, 5, 12, 3, 20]


def make_model() -> MultiAdapterModel:
    """The tiny base with two adapters whose updates are large enough to change answers."""
    model = MultiAdapterModel(tiny_model())
    generator = torch.Generator().manual_seed(1)
    for name, method in METHODS.items():
        tensors = {
            site: {
                key: torch.randn(value.shape, generator=generator) * 0.15
                for key, value in of_site.items()
            }
            for site, of_site in model.fresh_tensors(method).items()
        }
        model.add_slot(name, method, tensors=tensors)
    return model


def requests() -> list[GenerationRequest]:
    tokenizer = tiny_tokenizer()
    return [
        GenerationRequest(tokenizer.encode(prompt), slot=slot, max_new_tokens=num_new)
        for prompt, slot, num_new in zip(PROMPTS, SLOTS, NUM_NEW, strict=True)
    ]


def make_generator(max_batch: int = 4, **settings: Any) -> Generator:
    return Generator(make_model(), tiny_tokenizer(), max_batch=max_batch, **settings)


def peft_answers(slot: str | None, asked: list[GenerationRequest]) -> list[list[int]]:
    """What transformers' `generate` says with the same adapter loaded by PEFT."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    model: Any = tiny_model()
    if slot is not None:
        config, state = METHODS[slot].to_peft(make_model().tensors(slot), "tiny")
        config["base_model_name_or_path"] = None
        model = get_peft_model(model, LoraConfig(**config))
        missing = set_peft_model_state_dict(model, state)
        assert not missing.unexpected_keys
    answers = []
    for request in asked:
        ids = torch.tensor([request.prompt_ids])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=-1,
        )
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers


def test_a_mixed_batch_answers_as_transformers_and_peft_do() -> None:
    results = make_generator().run(requests())
    for slot in ("a", "b", None):
        own = [at for at, name in enumerate(SLOTS) if name == slot]
        expected = peft_answers(slot, [requests()[at] for at in own])
        assert [results[at].token_ids for at in own] == expected
    assert results[0].token_ids != results[2].token_ids


@pytest.mark.parametrize("max_batch", [2, 3, 6])
def test_who_else_is_in_the_batch_changes_no_answer(max_batch: int) -> None:
    together = make_generator(max_batch).run(requests())
    alone: list[GenerationResult] = []
    for request in requests():
        alone += make_generator(1).run([request])
    assert together == alone


def test_a_prompt_that_several_requests_ask_is_read_once_and_answered_alike() -> None:
    asked = [
        replace(request, temperature=0.9, seed=seed)
        for request in requests()[:3]
        for seed in range(3)
    ]
    generator = make_generator(9)
    read: list[int] = []
    generator.model.base.get_decoder().register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    together = generator.run(asked)
    widths = [len(request.prompt_ids) for request in asked]
    assert read[0] == 3 * max(widths)
    assert together == [make_generator(1).run([request])[0] for request in asked]
    assert len({tuple(result.token_ids) for result in together}) > 3


def test_a_long_answer_outgrows_the_first_cache() -> None:
    request = GenerationRequest(tiny_tokenizer().encode(PROMPTS[1]), slot="a", max_new_tokens=150)
    (result,) = make_generator(2, max_length=400).run([request])
    assert [result.token_ids] == peft_answers("a", [request])


def test_eager_attention_gives_the_same_tokens() -> None:
    eager = Generator(MultiAdapterModel(tiny_model(attention="eager")), tiny_tokenizer(), 3)
    sdpa = Generator(MultiAdapterModel(tiny_model()), tiny_tokenizer(), 3)
    asked = [GenerationRequest(request.prompt_ids) for request in requests()]
    assert eager.run(asked) == sdpa.run(asked)


def test_requests_join_and_leave_while_others_run() -> None:
    generator = make_generator(3)
    asked = requests()
    texts: dict[int, str] = {}
    submitted = [generator.submit(asked[0])]
    for _ in range(60):
        for event in generator.step():
            texts[event.request_id] = texts.get(event.request_id, "") + event.text
        if len(submitted) < len(asked):
            submitted.append(generator.submit(asked[len(submitted)]))
        if generator.is_idle:
            break
    alone = [make_generator(1).run([request])[0].text for request in asked]
    assert [texts[request_id] for request_id in submitted] == alone


def test_stop_tokens_end_an_answer_and_are_not_in_it() -> None:
    request = requests()[1]
    (free,) = make_generator().run([request])
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    stopping = GenerationRequest(
        request.prompt_ids, slot="b", max_new_tokens=14, stop_ids=frozenset({stop})
    )
    (result,) = make_generator().run([stopping])
    assert result.finish_reason == "stop"
    assert result.token_ids == free.token_ids[:first]


def test_stop_strings_end_an_answer_and_never_show() -> None:
    request = requests()[1]
    (free,) = make_generator().run([request])
    stop = free.text[3:6]
    asked = GenerationRequest(request.prompt_ids, slot="b", max_new_tokens=14, stop=(stop,))
    (result,) = make_generator().run([asked])
    assert result.finish_reason == "stop"
    assert result.text == free.text[: free.text.index(stop)]


def test_length_ends_an_answer_at_the_context() -> None:
    prompt = tiny_tokenizer().encode(PROMPTS[0])
    generator = make_generator(max_length=len(prompt) + 3)
    (result,) = generator.run([GenerationRequest(prompt, max_new_tokens=50)])
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 3


def test_prompts_without_room_are_refused() -> None:
    generator = make_generator(max_length=16)
    with pytest.raises(ConfigError, match="prompt has 16 tokens"):
        generator.submit(GenerationRequest([5] * 16))
    with pytest.raises(ConfigError, match="empty"):
        generator.submit(GenerationRequest([]))


def test_a_cancelled_request_frees_its_place() -> None:
    generator = make_generator(1)
    first, second, third = (generator.submit(request) for request in requests()[:3])
    generator.step()
    generator.cancel(first)
    generator.cancel(third)
    reasons = {}
    while not generator.is_idle:
        for event in generator.step():
            if event.finish_reason:
                reasons[event.request_id] = event.finish_reason
    assert reasons == {first: "cancelled", second: "length", third: "cancelled"}


def test_sampling_repeats_with_its_seed_and_differs_with_another() -> None:
    def answer(seed: int, max_batch: int) -> list[int]:
        others = requests()[:2]
        asked = GenerationRequest(
            requests()[0].prompt_ids, "a", 12, temperature=1.5, top_p=0.9, seed=seed
        )
        return make_generator(max_batch).run([*others, asked])[2].token_ids

    assert answer(1, 4) == answer(1, 1)
    assert answer(1, 4) != answer(2, 4)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -float("inf"), 1.5]])
    generator = torch.Generator().manual_seed(3)
    settings = [(0.7, 0.95, generator)]
    drawn = [next_tokens(logits, settings)[0] for _ in range(20000)]
    expected = torch.softmax(logits[0] / 0.7, -1)
    expected[0] = 0  # the other three reach 0.95 without it
    expected /= expected.sum()
    found = torch.bincount(torch.tensor(drawn), minlength=5) / len(drawn)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.012)
    assert found[0] == found[3] == 0


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[1.0, 9.0, 8.0, 3.0]])
    for temperature in (1e-300, 1e-38, 1e-6):
        generator = torch.Generator().manual_seed(0)
        assert next_tokens(logits, [(temperature, 1.0, generator)]) == [1]


def test_top_p_near_zero_is_greedy() -> None:
    greedy = requests()[0]
    asked = GenerationRequest(greedy.prompt_ids, "a", 9, temperature=1.0, top_p=1e-6)
    generator = make_generator()
    assert generator.run([asked])[0].token_ids == generator.run([greedy])[0].token_ids


def test_a_broken_adapter_fails_alone_and_leaves_nothing_behind() -> None:
    model = make_model()
    broken = {
        site: {key: torch.full_like(value, float("nan")) for key, value in of_site.items()}
        for site, of_site in model.tensors("a").items()
    }
    model.add_slot("broken", METHODS["a"], tensors=broken)
    generator = Generator(model, tiny_tokenizer(), max_batch=2)
    bad = GenerationRequest(requests()[1].prompt_ids, slot="broken")
    results = generator.run([bad, bad, requests()[0], bad, requests()[3]])
    assert [r.finish_reason for r in results] == ["error", "error", "length", "error", "length"]
    (alone,) = make_generator(1).run([requests()[0]])
    assert results[2] == alone


def test_text_comes_in_whole_characters() -> None:
    tokenizer = tiny_tokenizer()
    text = "naïve 日本語 🎉 done"
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids]
    assert all("�" not in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == text


def test_a_stop_string_across_tokens_is_held_back_and_cut() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("one STXP two STOP three", add_special_tokens=False)
    stream = TextStream(tokenizer, ("STOP",))
    shown = ""
    for token_id in ids:
        shown += stream.push(token_id)
        assert "STO" not in shown
        if stream.is_stopped:
            break
    assert stream.is_stopped
    assert shown + stream.flush() == "one STXP two "
