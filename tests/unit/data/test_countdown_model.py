"""Tests of the Countdown model and tokenizer, loaded by plain transformers."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from megatron_rl.data.countdown.model import VOCABULARY, build_model, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Qwen3ForCausalLM:
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return loaded


def test_the_tokenizer_has_95_words(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == len(VOCABULARY) == 95
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.convert_ids_to_tokens(range(95)) == list(VOCABULARY)


@given(words=st.lists(st.sampled_from(VOCABULARY), max_size=50))
def test_words_and_ids_round_trip(tokenizer: PreTrainedTokenizerFast, words: list[str]) -> None:
    ids = [VOCABULARY.index(word) for word in words]
    assert tokenizer(" ".join(words))["input_ids"] == ids
    assert tokenizer.decode(ids) == " ".join(words)
    plain = [word for word in words if word not in ("<pad>", "<bos>", "<eos>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(plain)


def test_an_unknown_word_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="WordLevel error"):
        tokenizer("<bos> 3 5 81 > 22 :")


def test_the_model_has_the_documented_architecture(model: Qwen3ForCausalLM) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == 603_072
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = model.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (95, 128, 3)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 32)
    assert (config.intermediate_size, config.max_position_embeddings, config.rms_norm_eps) == (384, 64, 1e-6)
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert model.generation_config.eos_token_id == 2


def test_weights_have_the_documented_standard_deviations(model: Qwen3ForCausalLM) -> None:
    layer = model.model.layers[1]
    expected = {
        model.model.embed_tokens.weight: 0.02,
        layer.self_attn.q_proj.weight: 1 / math.sqrt(128),
        layer.mlp.gate_proj.weight: 1 / math.sqrt(128),
        layer.self_attn.o_proj.weight: 0.5 / math.sqrt(128),
        layer.mlp.down_proj.weight: 0.5 / math.sqrt(384),
    }
    for weight, std in expected.items():
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert torch.equal(layer.input_layernorm.weight, torch.ones(128))


def test_the_weights_depend_on_the_seed_only(model: Qwen3ForCausalLM) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again, other = build_model(0).state_dict(), build_model(1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert not torch.equal(again["lm_head.weight"], other["lm_head.weight"])
