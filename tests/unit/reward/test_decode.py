"""Workers decode responses as the tokenizer does, and every result has its response's text."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.config.reward import RewardSettings
from megatron_rl.data.countdown.model import build_tokenizer
from megatron_rl.reward import RewardPool
from megatron_rl.reward.decode import decoder_of
from megatron_rl.types import Decode, Outcome, Prompt, Response, Sample

VERIFIER = """
import os, sys, time
from megatron_rl.types import RewardResult

def score(sample):
    words = sample.text.split()
    if "exit" in words:
        os._exit(3)
    if "sleep" in words:
        time.sleep(3600)
    if "raise" in words:
        raise KeyError("lost")
    if "imports" in words:
        return RewardResult(1.0, ",".join(name for name in ("transformers", "torch") if name in sys.modules))
    if "own" in words:
        return RewardResult(1.0, text="the verifier's own")
    return RewardResult(1.0, sample.text)
"""
WORDS = ["exit", "sleep", "raise", "imports", "own", "good", "é", "."]


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen has it, with special tokens and an added token that is not special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def words(**options: Any) -> PreTrainedTokenizerFast:
    """One word per token, with an end token."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "<eos>"])}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", **options)


TOKENIZERS = {
    "countdown": build_tokenizer(),
    "byte level": byte_level(),
    "words": words(clean_up_tokenization_spaces=False),
    "words, spaces cleaned up": words(clean_up_tokenization_spaces=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_a_decoder_does_as_the_tokenizer_without_special_tokens(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    response = Response([*ids, tokenizer.eos_token_id], [], "stop", 0)
    expected = tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True)
    decode = decoder_of(tokenizer)
    assert decode(response.token_ids) == decode(response.token_ids.tolist()) == expected
    assert tokenizer.eos_token not in expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_pickled_decoder_decodes_the_same(name: str) -> None:
    decode = decoder_of(TOKENIZERS[name])
    ids = list(range(len(TOKENIZERS[name])))
    assert pickle.loads(pickle.dumps(decode))(ids) == decode(ids)


def test_decoding_needs_no_transformers(tmp_path: Path) -> None:
    (tmp_path / "decoder").write_bytes(pickle.dumps(decoder_of(TOKENIZERS["byte level"])))
    code = (
        "import pickle, sys; decode = pickle.load(open(sys.argv[1], 'rb')); decode([1, 2]); "
        "print([name for name in ('transformers', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "decoder")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardPool]:
    folder = tmp_path_factory.mktemp("verifier")
    (folder / "by_word.py").write_text(VERIFIER)
    decode: Decode = decoder_of(TOKENIZERS["words"])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        with RewardPool(
            RewardSettings(name="by_word:score", workers=2, timeout_seconds=3.0), folder / "log", decode
        ) as pool:
            yield pool


def sample(*said: str) -> Sample:
    ids = [WORDS.index(word) for word in said]
    return Sample(Prompt("p:0", (1,), "", None), Response([*ids, len(WORDS)], [], "stop", 0), text="")


def test_workers_decode_before_the_verifier_sees_a_sample(pool: RewardPool) -> None:
    results = pool.score([sample("good", "é", "."), sample("good")])
    assert [(result.answer, result.text) for result in results] == [("good é .", "good é ."), ("good", "good")]
    assert pool.score([sample("imports")])[0].answer == ""


@pytest.mark.parametrize(
    ("word", "outcome"), [("exit", "error"), ("sleep", "timeout"), ("raise", "error"), ("own", "score")]
)
def test_every_result_has_the_text_of_its_response(pool: RewardPool, word: str, outcome: Outcome) -> None:
    """A verifier that fails, hangs, kills its worker or returns another text does not change that."""
    results = pool.score([sample("good"), sample("good", word), sample()])
    assert [result.text for result in results] == ["good", f"good {word}", ""]
    assert [result.outcome for result in results] == ["score", outcome, "score"]


class Refuses:
    """A decoder that knows the token 0 only."""

    def __call__(self, token_ids: Any) -> str:
        if list(token_ids) != [0]:
            raise OverflowError("no such token")
        return "fine"


def test_a_response_that_cannot_be_decoded_costs_only_itself() -> None:
    settings = RewardSettings(name="countdown", workers=1, timeout_seconds=600.0)
    samples = [
        Sample(Prompt("p:0", (1,), "", "3 5 7 > 22"), Response([token], [], "stop", 0), text="") for token in (0, -1)
    ]
    with RewardPool(settings, decode=Refuses()) as pool:
        fine, refused = pool.score(samples)
    assert (fine.outcome, fine.text) == ("score", "fine")
    assert (refused.outcome, refused.text, refused.score) == ("error", "", 0.0)
    assert refused.detail == "ValueError: the response cannot be decoded: OverflowError: no such token"
