"""Text models of transformers as `CausalLM`: equal logits in every way of decoding, and back again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from decoding_fakes import DRAFTERS, RASTER, codec, log_probabilities, model, prompts
from safetensors.torch import load_file, save_file

from lexel.document import Grammar
from lexel.errors import LexelError
from lexel.models.backbones import exported, load_backbone, native, save_backbone
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.models.graphs import GraphedStep
from lexel.models.grow import widen
from lexel.models.packed import pack
from lexel.nn import products
from lexel.sample.generator import Generator, Request
from lexel.sample.logits import SamplingConfig
from lexel.sample.policy import Policy
from lexel.types import TokenBatch

VOCAB = 40
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rope_theta": 500.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied, one key head": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    },
    "llama 3.1": {"model_type": "llama", "rope_scaling": LLAMA3, "head_dim": 12},
    "llama, linear, biases": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 6, "head_dim": 12},
    "mistral, no window": {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, windows, tied": {"model_type": "qwen2", "tie_word_embeddings": True, **SLIDING},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "qwen3, windows, biases": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True, **SLIDING},
    "gemma": {"model_type": "gemma", "head_dim": 12, "hidden_act": "gelu", "hidden_activation": None},
    "gemma, untied": {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": False},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 12,
        "sliding_window": 5,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma2, no caps": {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
    },
}


@pytest.fixture(autouse=True)
def _without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def both(case: str, folder: Path, **changes: Any) -> tuple[transformers.PreTrainedModel, CausalLM]:
    """A tiny random model of transformers, norms and biases away from their starting values, in the folder
    "theirs", and ours read from it."""
    values = SIZES | CASES[case] | changes
    torch.manual_seed(1)
    config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(folder / "theirs")
    (folder / "theirs" / "config.json").write_text(json.dumps(values))
    return theirs, load_backbone(folder / "theirs")


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each case in turn, for all tests that ask for it."""
    with torch.no_grad():
        return both(request.param, tmp_path_factory.mktemp("case"))


Pair = tuple[transformers.PreTrainedModel, CausalLM]


def batch_of(ids: torch.Tensor, start: int | list[int] = 0, **fields: Any) -> TokenBatch:
    starts = torch.tensor([start] * len(ids) if isinstance(start, int) else start)
    positions = torch.zeros(*ids.shape, 3, dtype=torch.long)
    positions[..., 0] = starts[:, None] + torch.arange(ids.shape[1])
    return TokenBatch(ids, torch.zeros_like(ids), positions, **fields)


def test_logits_are_those_of_transformers(pair: Pair, tmp_path: Path):
    theirs, ours = pair
    ids = torch.randint(VOCAB, (2, 20))
    expected = theirs(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(batch_of(ids)).logits, expected, **CLOSE)


def test_rows_of_different_lengths_continue_in_the_cache(pair: Pair, tmp_path: Path):
    theirs, ours = pair
    ids = torch.randint(VOCAB, (3, 18))
    expected = theirs(ids).logits
    cache = ours.new_cache(3, 24)
    ours(batch_of(ids[:, :9]), cache)
    lengths = [9, 4, 7]
    cache.crop(lengths)
    for count in (1, 4, 1):
        index = torch.tensor(lengths)[:, None] + torch.arange(count)
        found = ours(batch_of(ids.gather(1, index), lengths), cache).logits
        for row, start in enumerate(lengths):
            torch.testing.assert_close(found[row], expected[row, start : start + count], **CLOSE)
        lengths = [length + count for length in lengths]


TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
DEPTH = torch.tensor([0, 1, 1, 2])
PATHS = ([0, 1], [0, 2, 3])


def tree_batch(ids: torch.Tensor, lengths: list[int]) -> TokenBatch:
    """Four nodes of `TREE` behind rows of these lengths."""
    mask = torch.zeros(len(ids), 4, max(lengths) + 4, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, :, :length] = True
        mask[row, :, length : length + 4] = TREE
    positions = torch.zeros(len(ids), 4, 3, dtype=torch.long)
    positions[..., 0] = torch.tensor(lengths)[:, None] + DEPTH
    return TokenBatch(ids, torch.zeros_like(ids), positions, mask)


@pytest.mark.parametrize("case", ["mistral", "qwen2, windows, tied", "qwen3, windows, biases", "gemma2"])
def test_branches_of_a_tree_see_their_own_windows(case: str, tmp_path: Path):
    theirs, ours = both(case, tmp_path)
    ids, nodes = torch.randint(VOCAB, (2, 11)), torch.randint(VOCAB, (2, 4))
    lengths = [11, 8]
    cache = ours.new_cache(2, 20)
    ours(batch_of(ids), cache)
    cache.crop(lengths)
    found = ours(tree_batch(nodes, lengths), cache).logits
    for row, length in enumerate(lengths):
        for path in PATHS:
            alone = torch.cat([ids[row, :length], nodes[row, path]])[None]
            torch.testing.assert_close(found[row, path], theirs(alone).logits[0, length:], **CLOSE)


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafting_for_a_model_with_all_variations(name: str):
    """Guided, in rows of different lengths: what is drawn has the distribution of one whole pass."""
    kit, guided = codec(RASTER), SamplingConfig(temperature=1.5, guidance=1.5)
    lm = model(
        kit,
        windows=(3, None),
        activation="gelu_tanh",
        qkv_bias=True,
        norm_offset=1.0,
        sandwich_norm=True,
        embed_scale=4.0,
        attention_scale=0.3,
        attention_softcap=2.0,
        logit_softcap=3.0,
    )
    grammar = Grammar(kit, ("image",))
    queue = Generator(lm, drafter=DRAFTERS[name](lm, kit, 2))
    starts = [prompts(kit, ["ab", ""], unconditional=null) for null in (False, True)]
    policy = Policy(grammar, {"image": guided})
    tickets = [queue.submit(Request(*pair, policy, seed)) for seed, pair in enumerate(zip(*starts))]
    queue.wait(tickets)
    for ticket, prompt, null in zip(tickets, *starts):
        ids = torch.tensor(ticket.row.ids).reshape(-1)
        expected = log_probabilities(lm, kit, grammar, prompt, null, {"image": guided}, ids)
        found = torch.tensor(ticket.row.logprobs).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["llama, linear, biases", "qwen2, windows, tied", "gemma2"])
@torch.enable_grad()
def test_gradients_are_those_of_transformers(case: str, tmp_path: Path):
    with torch.no_grad():
        theirs, ours = both(case, tmp_path)
    ids = torch.randint(1, VOCAB, (2, 15))  # transformers gives the row of Gemma's padding (0) no gradient
    for network, logits in ((theirs, theirs(ids).logits), (ours, ours(batch_of(ids)).logits)):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, **CLOSE)


def test_windows_of_packed_documents(tmp_path: Path):
    theirs, ours = both("gemma2", tmp_path)
    documents = [torch.randint(VOCAB, (1, length)) for length in (9, 2, 12)]
    blocks = torch.block_diag(*(torch.ones(d.shape[1], d.shape[1]).tril() for d in documents)).bool()
    batch = batch_of(torch.cat(documents, 1))
    restarted = torch.cat([batch_of(d).positions for d in documents], 1)
    expected = torch.cat([theirs(d).logits for d in documents], 1)
    additive = torch.zeros(blocks.shape).masked_fill(~blocks, float("-inf"))
    for mask in (blocks, additive):
        packed = dataclasses.replace(batch, positions=restarted, attention_mask=mask[None])
        torch.testing.assert_close(ours(packed).logits, expected, **CLOSE)


def test_exported_models_open_in_transformers(pair: Pair, tmp_path: Path):
    theirs, ours = pair
    save_backbone(ours, tmp_path / "ours")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(opened) is type(theirs)
    for name in ("sliding_window", "rope_parameters", "tie_word_embeddings", "initializer_range"):
        assert getattr(opened.config, name, None) == getattr(theirs.config, name, None)
    ids = torch.randint(VOCAB, (2, 14))
    torch.testing.assert_close(opened(ids).logits, theirs(ids).logits, **CLOSE)
    assert load_backbone(tmp_path / "ours").fingerprint() == ours.fingerprint()


def test_a_model_saved_by_lexel_still_knows_its_family(pair: Pair, tmp_path: Path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "lexel")
    again = CausalLM.from_pretrained(tmp_path / "lexel")
    assert again.config == ours.config
    save_backbone(again, tmp_path / "ours")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.randint(VOCAB, (2, 14))
    torch.testing.assert_close(opened(ids).logits, theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_backbones(pair: Pair, dtype: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "TIE", 0.0)  # compiled kernels wherever there are some
    monkeypatch.setattr(products, "COLD", 0)
    _, ours = pair
    packed = pack(ours, dtype, compile=True)
    ids = torch.randint(VOCAB, (2, 12))
    expected, found = ours(batch_of(ids)).logits, packed(batch_of(ids)).logits
    if dtype == "float32":
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(
            packed.project(packed(batch_of(ids)).hidden, 3, 9), expected[..., 3:9], **CLOSE
        )
    else:
        assert (found - expected).abs().max() < 0.15 * expected.std()


@pytest.mark.parametrize("case", ["mistral", "gemma2", "qwen2"])
def test_steps_of_a_fixed_size(case: str, tmp_path: Path):
    _, ours = both(case, tmp_path)
    ids, nodes = torch.randint(VOCAB, (2, 11)), torch.randint(VOCAB, (2, 4))
    lengths = [11, 8]
    cache = ours.new_cache(2, 20)
    ours(batch_of(ids), cache)
    cache.crop(lengths)
    batch = tree_batch(nodes, lengths)
    found = GraphedStep(ours, cache, 4, ours.project)(nodes, batch.positions, TREE.expand(2, -1, -1))
    torch.testing.assert_close(found, ours(batch, cache).logits, **CLOSE)


def test_bfloat16_rounds_gemmas_embeddings_as_transformers_does(tmp_path: Path):
    both("gemma", tmp_path, hidden_size=40)  # sqrt(40) is no bfloat16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    ours = load_backbone(tmp_path / "theirs", torch.bfloat16)
    ids = torch.arange(VOCAB)[None]
    assert torch.equal(ours._embed(batch_of(ids)), theirs.get_input_embeddings()(ids))
    x = torch.randn(5, 40, dtype=torch.bfloat16)
    assert torch.equal(ours.model.norm(x), theirs.model.norm(x))


def test_several_weight_files_and_idle_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    theirs, ours = both("qwen2, windows, tied", tmp_path)
    monkeypatch.setattr("lexel.models.backbones.SHARD_BYTES", 20_000)
    save_backbone(ours, tmp_path / "shards", dtype=torch.float64)
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert max(path.stat().st_size for path in shards) < 30_000
    # Older programs write computed tables and the tied table twice.
    first = load_file(shards[0])
    first["lm_head.weight"] = ours.model.embed_tokens.weight.double()
    first["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(first, shards[0], metadata={"format": "pt"})
    assert load_backbone(tmp_path / "shards").fingerprint() == ours.fingerprint()
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.float32)
    ids = torch.randint(VOCAB, (1, 9))
    torch.testing.assert_close(opened(ids).logits, theirs(ids).logits, **CLOSE)
    shards[-1].unlink()
    with pytest.raises(LexelError, match=f"lacks {shards[-1].name}"):
        load_backbone(tmp_path / "shards")


def test_a_tied_model_with_an_output_table_of_its_own(tmp_path: Path):
    both("gemma, untied", tmp_path)
    config = tmp_path / "theirs" / "config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    with pytest.raises(LexelError, match="set tie_word_embeddings to false"):
        load_backbone(tmp_path / "theirs")


def test_weights_that_do_not_fit_are_listed(tmp_path: Path):
    both("llama", tmp_path)
    file = tmp_path / "theirs" / "model.safetensors"
    state = load_file(file)
    state["extra"] = state.pop("lm_head.weight")
    save_file(state, file)
    with pytest.raises(LexelError, match=r"missing lm_head\.weight; unknown extra"):
        load_backbone(tmp_path / "theirs")
    file.write_bytes(b"no tensors")
    with pytest.raises(LexelError, match="not a readable safetensors file"):
        load_backbone(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("case", "changes", "named"),
    [
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"num_attention_heads": 5}, "llama"),
        ("qwen3", {"num_key_value_heads": 3, "layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ],
)
def test_what_is_not_native_is_named(case: str, changes: dict[str, Any], named: str):
    with pytest.raises(LexelError, match=named):
        native(SIZES | CASES[case] | changes)


def test_other_families_are_left_to_transformers(tmp_path: Path):
    assert native({"model_type": "gpt2"}) is None
    assert native({"model_type": "qwen3_moe", **SIZES}) is None
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(LexelError, match="'gpt2' model; native backbones are llama"):
        load_backbone(tmp_path)


def test_what_transformers_cannot_express_is_named():
    plain = CausalLMConfig(VOCAB, dim=32, heads=4)
    assert exported(plain)["model_type"] == "llama"
    with pytest.raises(LexelError, match=r"rope_axes=\(0\.5, 0\.25, 0\.25\)"):
        exported(dataclasses.replace(plain, rope_axes=(0.5, 0.25, 0.25)))
    with pytest.raises(LexelError, match="windows"):
        exported(dataclasses.replace(plain, layers=3, windows=(4, 5, None)))
    with pytest.raises(LexelError, match="head='parallel'"):
        exported(dataclasses.replace(plain, head="parallel", codebook_sizes=(4, 4), code_offsets=(4, 8)))


def test_only_llamas_form_is_grown(tmp_path: Path):
    with pytest.raises(ValueError, match="this one has norm_offset, sandwich_norm, windows"):
        widen(both("gemma2", tmp_path)[1], 2)


def test_windows_that_make_no_sense():
    with pytest.raises(ValueError, match="one length per block, 6 in all"):
        CausalLMConfig(VOCAB, windows=(4,))
    with pytest.raises(ValueError, match="windows are at least 1"):
        CausalLMConfig(VOCAB, layers=2, windows=(4, 0))
