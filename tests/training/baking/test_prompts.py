"""Which prompts a guidance is matched at."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem
from indomain_guidance.training.baking.prompts import EncodedTexts, prompts_of, random_prompt, vocabulary
from indomain_guidance.training.engine.settings import ConfigProblem
from indomain_guidance.training.mini_world.tokens import TOKEN_IDS
from indomain_guidance.training.prior.encoded_prompts import EncodedPrompts
from indomain_guidance.training.prior.opening import open_prior
from indomain_guidance.training.prior.prior import ImageSize

from .conftest import PROMPTS


def test_a_list_a_file_and_random_words_together(settings, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red seven\n\n  a blue three  \na circle\n", encoding="utf-8")
    config = settings(prompt_list=("a circle", ""), prompt_file=str(file), random_prompts=5, seed=3)
    found = prompts_of(config, "mini_world")
    assert found[:3] == ["a circle", "a red seven", "a blue three"]
    assert len(found) == 8 and all(set(prompt.split()) <= set(TOKEN_IDS) for prompt in found[3:])
    assert all(3 <= len(prompt.split()) <= 12 for prompt in found[3:])
    assert found == prompts_of(config, "mini_world") != prompts_of(config.with_changes(seed=4), "mini_world")


def test_none_is_the_empty_prompt_alone(settings, base):
    assert prompts_of(settings(prompt_list=()), "mini_world") == []
    assert len(EncodedTexts.of(base, [])) == 0


@pytest.mark.parametrize(
    "data, words",
    [
        (b"\n  \n", "prompt_file: expected prompts, one a line, found none in"),
        (b"\xff\x00\xfe", "cannot be read as a text file of prompts: it is no text in UTF-8"),
        (None, r"cannot be read as a text file of prompts \(No such file"),
        (b"x" * 2_000_000, "expected a text file of prompts of at most 1048576 bytes"),
    ],
)
def test_files_that_hold_no_prompts(data, words, settings, tmp_path):
    file = tmp_path / "prompts.txt"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises((ConfigProblem, FileProblem), match=words):
        prompts_of(settings(prompt_file=str(file)), "sd15")


def test_words_are_whole_ones_of_clips_vocabulary(tmp_path):
    names = {"cat</w>": 0, "ing": 1, "a</w>": 2, "dog</w>": 3, "2000</w>": 4, "<|endoftext|>": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(names), encoding="utf-8")
    assert vocabulary("sd15", str(tmp_path)) == ["cat", "dog"]
    assert vocabulary("sd15", "") == []
    assert random_prompt(["cat", "dog"], 0, 1) == random_prompt(["cat", "dog"], 0, 1)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, r"vocab.json: cannot be read as CLIP's vocabulary \(No such file"),
        ("{", "expected CLIP's vocabulary, words with numbers in JSON, found other text"),
        ("[" * 100_000, "expected CLIP's vocabulary"),
        ('["cat</w>"]', "expected CLIP's vocabulary"),
        (" " * 2**23 + "{}", "expected CLIP's vocabulary of at most 8388608 bytes"),
    ],
)
def test_vocabularies_that_are_none(content, words, tmp_path):
    if content is not None:
        (tmp_path / "vocab.json").write_text(content, encoding="utf-8")
    with pytest.raises(FileProblem, match=words):
        vocabulary("sd15", str(tmp_path))


def test_that_no_words_are_drawn_is_told(settings):
    told = []
    assert prompts_of(settings(random_prompts=3), "sd15", told.append) == list(PROMPTS[:2])
    assert len(told) == 1 and told[0].startswith("random_prompts: expected a vocabulary") and "vocab.json" in told[0]
    prompts_of(settings(random_prompts=3), "mini_world", told.append)
    prompts_of(settings(random_prompts=0), "sd15", told.append)
    assert len(told) == 1


def test_conditioning_is_that_of_each_place(base):
    texts = EncodedTexts.of(base, PROMPTS)
    sizes = [ImageSize((64, 64))] * 3
    found = texts.conditioning(sizes, torch.tensor([2, 0, 3]), "cpu")["context"]
    expected = base.encode_text([PROMPTS[1], "", PROMPTS[2]]).context
    assert torch.equal(found, expected)


def test_pairs_are_one_object_where_all_are_empty(base):
    texts, sizes = EncodedTexts.of(base, PROMPTS), [ImageSize((64, 64))] * 2
    empty, prompted = texts.pair(sizes, torch.tensor([0, 0]), "cpu")
    assert empty is prompted
    empty, prompted = texts.pair(sizes, torch.tensor([0, 2]), "cpu")
    assert torch.equal(empty["context"][1], base.null_context.tensor[0])
    assert torch.equal(prompted["context"], texts.context[[0, 2]])


def test_many_prompts_are_encoded_in_parts():
    prior = open_prior("mini_world")
    prompts = [random_prompt(sorted(TOKEN_IDS), 0, number) for number in range(70)]
    texts = EncodedTexts.of(prior, prompts)
    assert len(texts) == 70
    torch.testing.assert_close(texts.context[70], prior.encode_text([prompts[69]]).context[0], rtol=1e-4, atol=1e-5)


def test_prompts_of_several_lengths_are_one_tensor(base):
    """A prior that ComfyUI connects has longer contexts for longer prompts; a part of 32 may hold none of those."""
    words = {prompt: (torch.randn(1, 4 if prompt != "long" else 6, 8), None) for prompt in ("", *"abcdefgh", "long")}
    many = {f"{prompt}{number}": text for number in range(5) for prompt, text in words.items()}
    prior = dataclasses.replace(base, text_encoder=EncodedPrompts({**many, **words}))
    texts = EncodedTexts.of(prior, [name for name in many if not name.startswith("long")] + ["long"])
    assert texts.context.shape == (len(many) - 5 + 2, 12, 8)
    assert torch.equal(texts.context[-1], words["long"][0][0].repeat(2, 1))
    assert torch.equal(texts.context[0], words[""][0][0].repeat(3, 1))
