"""The begin token: templates of ours begin as the tokenizer's own post-processor would, and never with two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_rl.config.evaluation import Template
from megatron_rl.data.tokenizer import begin_ids, load_tokenizer

BOS, EOS = "<s>", "</s>"
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
POST_PROCESSORS: dict[str, tuple[Any, list[str]]] = {
    "none": (None, []),
    "begin": (processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)]), [BOS]),
    "begin and end": (
        processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)]),
        [BOS],
    ),
    "end": (processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)]), []),
    "two": (
        processors.TemplateProcessing(single=f"{BOS} {EOS} $A", special_tokens=[(BOS, 0), (EOS, 1)]),
        [BOS, EOS],
    ),
    "bytes, then begin": (
        processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)]),
            ]
        ),
        [BOS],
    ),
}
OWN = [name for name in get_args(Template) if name != "none" and not name.startswith("chat")]


def tokenizer_of(folder: Path, post_processor: Any, *, sentence_pieces: bool = False) -> Any:
    """A tokenizer of single bytes, saved and loaded as a run loads it."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {word: number for number, word in enumerate([BOS, EOS, "▁", *sorted(alphabet)])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    if sentence_pieces:  # a text gets a space in front, and a text after a special token does not
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
    if post_processor is not None:
        inner.post_processor = post_processor
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BOS, eos_token=EOS, chat_template=CHAT)
    made.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("sentence_pieces", [False, True])
@pytest.mark.parametrize("template", OWN)
@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_own_templates_begin_as_the_tokenizer_would(tmp_path, read, name, template, sentence_pieces):
    post_processor, begin = POST_PROCESSORS[name]
    tokenizer = tokenizer_of(tmp_path / "model", post_processor, sentence_pieces=sentence_pieces)
    ids = tokenizer.convert_tokens_to_ids(begin)
    rows = [{"prompt": "one"}, {"prompt": [{"role": "user", "content": "two"}]}, {"prompt": "one"}]
    for prompt in read(rows, tokenizer=tokenizer, template=template).prompts:
        whole = tokenizer.encode(prompt.text, add_special_tokens=True)
        assert list(prompt.token_ids) == whole[: len(prompt.token_ids)], "the tokenizer's own ids, up to an end token"
        assert list(prompt.token_ids[: len(ids)]) == ids
        assert not set(prompt.token_ids[len(ids) :]) & {0, 1}, "nothing twice, and no end token"


@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_a_prompt_that_begins_with_the_token_gets_no_second_one(tmp_path, read, name):
    """The `boxed` template begins with the problem."""
    post_processor, begin = POST_PROCESSORS[name]
    tokenizer = tokenizer_of(tmp_path / "model", post_processor)
    written = "".join(begin) or BOS
    rows = [{"prompt": f"{written}one"}, {"prompt": "two"}]
    first, second = read(rows, tokenizer=tokenizer, template="boxed").prompts
    assert sum(token < 2 for token in first.token_ids) == max(1, len(begin))
    assert sum(token < 2 for token in second.token_ids) == len(begin)


@pytest.mark.parametrize("template", ["chat", "chat-boxed"])
@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_a_chat_template_has_its_own_begin_token_only(tmp_path, read, name, template):
    tokenizer = tokenizer_of(tmp_path / "model", POST_PROCESSORS[name][0])
    (prompt,) = read([{"prompt": "one"}], tokenizer=tokenizer, template=template).prompts
    assert [token for token in prompt.token_ids if token < 2] == [0] and prompt.token_ids[0] == 0


def test_a_prompt_without_a_template_is_unchanged(tmp_path, read):
    tokenizer = tokenizer_of(tmp_path / "model", POST_PROCESSORS["begin"][0])
    bare, begun = read([{"prompt": "one"}, {"prompt": "<s>one"}], tokenizer=tokenizer).prompts
    assert 0 not in bare.token_ids and begun.token_ids == (0, *bare.token_ids)


@pytest.mark.parametrize("limit", [1, 2, 20])
def test_a_prompt_that_is_cut_on_the_left_keeps_its_begin_token(tmp_path, read, limit):
    tokenizer = tokenizer_of(tmp_path / "model", POST_PROCESSORS["begin"][0])
    settings = {"template": "boxed", "max_prompt_tokens": limit, "long_prompts": "truncate_left"}
    (prompt,) = read([{"prompt": "one"}], tokenizer=tokenizer, **settings).prompts
    (whole,) = read([{"prompt": "one"}], tokenizer=tokenizer, template="boxed").prompts
    rest = whole.token_ids[len(whole.token_ids) - limit + 1 :]
    assert prompt.token_ids == (0, *rest) and len(prompt.token_ids) == limit


def test_a_limit_counts_the_begin_token(tmp_path, read):
    tokenizer = tokenizer_of(tmp_path / "model", POST_PROCESSORS["begin"][0])
    rows = [{"prompt": "one"}, {"prompt": "four"}]
    (short, _) = read(rows, tokenizer=tokenizer, template="boxed").prompts
    kept = read(rows, tokenizer=tokenizer, template="boxed", max_prompt_tokens=len(short.token_ids))
    assert [prompt.text for prompt in kept.prompts] == [short.text] and kept.dropped == {"too long": 1}


def test_words_outside_the_vocabulary_do_not_matter(tmp_path):
    """The text that finds the begin token is a prompt, which the tokenizer can encode."""
    inner = Tokenizer(models.WordLevel({"<s>": 0, "1": 1}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    assert begin_ids(tokenizer, "1 1") == [0]
    with pytest.raises(ValueError, match="cannot encode"):
        begin_ids(tokenizer, "2")
