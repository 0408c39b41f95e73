"""Sound codecs: numbers of transformers' own encode and decode, rows alone, folders, sound in documents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
    XcodecConfig,
    XcodecModel,
)

from lexel.cli import main
from lexel.document import DocumentCodec, Grammar, Image, Text
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLMConfig
from lexel.sample.decode import generate
from lexel.sample.strategies import make_drafter, strategies
from lexel.tokenizers import export_published, from_pretrained, load_published
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.sound import SoundConfig, SoundTokenizer, open_sound
from lexel.types import Codes
from lexel.vocabulary import Vocabulary

ENCODEC = {
    "target_bandwidths": (1.2, 2.4, 4.8),
    "sampling_rate": 4000,
    "upsampling_ratios": (4, 5),
    "num_filters": 4,
    "hidden_size": 8,
    "codebook_size": 8,
    "num_lstm_layers": 1,
}
HUBERT = {
    "model_type": "hubert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8] * 3,
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
DAC = {
    "encoder_hidden_size": 4,
    "downsampling_ratios": [2, 5],
    "decoder_hidden_size": 16,
    "n_codebooks": 4,
    "codebook_size": 8,
    "codebook_dim": 2,
    "sampling_rate": 4000,
}


def tiny(name: str) -> tuple[type, object]:
    """A transformers codec class and a tiny config of it."""
    if name == "encodec":
        return EncodecModel, EncodecConfig(**ENCODEC)
    if name == "encodec_acausal":
        return EncodecModel, EncodecConfig(**ENCODEC, use_causal_conv=False)
    if name == "mimi":
        sizes = {"hidden_size": 16, "num_filters": 4, "codebook_size": 8, "codebook_dim": 8}
        return MimiModel, MimiConfig(
            **sizes, sampling_rate=4000, upsampling_ratios=[4, 5], num_quantizers=4,
            vector_quantization_hidden_dimension=8, upsample_groups=16, num_hidden_layers=1,
            intermediate_size=16, num_attention_heads=2, num_key_value_heads=2,
        )  # fmt: skip
    if name == "dac":
        return DacModel, DacConfig(**DAC)
    acoustic = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [5, 4]}
    acoustic |= {"upsampling_ratios": [5, 4], "hidden_size": 16, "model_type": "dac"}
    return XcodecModel, XcodecConfig(
        sample_rate=4000, target_bandwidths=[0.6, 1.2, 2.4], codebook_size=8,
        acoustic_model_config=acoustic, semantic_model_config=HUBERT,
    )  # fmt: skip


NAMES = ("encodec", "encodec_acausal", "mimi", "dac", "xcodec")
ROWS = {
    "encodec": "encodec-24khz",
    "encodec_acausal": "encodec-32khz",
    "mimi": "mimi",
    "dac": "dac-16khz",
    "xcodec": "xcodec-hubert-general",
}


@pytest.fixture(scope="module", params=NAMES)
def codec(request, tmp_path_factory):
    """(name, transformers' network, its folder) with codebooks that all differ."""
    cls, config = tiny(request.param)
    torch.manual_seed(0)
    network = cls(config).eval()
    for key, value in network.state_dict().items():
        if key.endswith((".embed", ".embed_sum")):
            value.copy_(torch.randn(value.shape))
    folder = tmp_path_factory.mktemp(request.param)
    network.save_pretrained(folder)
    return request.param, network, folder


def wave(samples: int = 460, rows: int = 2) -> torch.Tensor:
    return torch.rand(rows, 1, samples, generator=torch.Generator().manual_seed(1)) * 2 - 1


def own_codes(name: str, network, sound: torch.Tensor) -> torch.Tensor:
    """Codes ``[b, k, n]`` as transformers' class gives them."""
    with torch.no_grad():
        if name.startswith("encodec"):
            return network.encode(sound, bandwidth=network.config.target_bandwidths[-1]).audio_codes[0]
        if name in ("dac", "xcodec"):
            sound = torch.nn.functional.pad(sound, (0, -sound.shape[2] % network.config.hop_length))
        return network.encode(sound).audio_codes


def own_wave(name: str, network, codes: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if name.startswith("encodec"):
            return network.decode(codes[None], [None]).audio_values
        if name == "dac":
            return network.decode(audio_codes=codes).audio_values[:, None]
        return network.decode(codes).audio_values


def test_the_numbers_are_those_of_transformers(codec) -> None:
    name, network, folder = codec
    tokenizer = open_sound(folder)
    codes = tokenizer.encode_sound(wave())
    expected = own_codes(name, network, wave())
    assert torch.equal(codes.indices, expected.transpose(1, 2))
    assert len(codes.indices.unique()) > 3, "codes that are all alike would prove nothing"
    decoded = tokenizer.decode_sound(codes)
    assert torch.equal(decoded, own_wave(name, network, expected))
    assert decoded.shape[:2] == (2, 1)
    assert abs(decoded.shape[2] - 460) <= 2 * tokenizer.hop
    assert codes.indices.shape[1] == pytest.approx(460 / tokenizer.hop, abs=1)


def test_rates_and_codebooks(codec) -> None:
    name, network, folder = codec
    tokenizer = open_sound(folder)
    assert tokenizer.sample_rate == 4000
    assert tokenizer.hop == {"mimi": 40, "dac": 10}.get(name, 20)
    assert tokenizer.frame_rate == 4000 / tokenizer.hop
    assert tokenizer.codebook_sizes == (8,) * len(own_codes(name, network, wave())[0])
    assert tokenizer.bandwidth == pytest.approx(
        tokenizer.frame_rate * 3 * len(tokenizer.codebook_sizes) / 1000
    )


def test_fewer_codebooks_are_the_first_ones(codec) -> None:
    _, _, folder = codec
    whole, fewer = open_sound(folder), open_sound(folder, codebooks=2)
    assert torch.equal(
        fewer.encode_sound(wave()).indices, whole.encode_sound(wave()).indices[..., :2].contiguous()
    )
    codes = fewer.encode_sound(wave())
    assert torch.equal(fewer.decode_sound(codes), whole.decode_sound(codes))
    each = whole.bandwidth / len(whole.codebook_sizes)
    assert len(open_sound(folder, bandwidth=3.5 * each).codebook_sizes) == 3
    with pytest.raises(ValueError, match="were given"):
        open_sound(folder, bandwidth=each / 2)
    with pytest.raises(ValueError, match="not both"):
        open_sound(folder, bandwidth=each, codebooks=1)
    with pytest.raises(ValueError, match="99 were asked for"):
        open_sound(folder, codebooks=99)


def test_rows_of_different_lengths_are_what_they_are_alone(codec) -> None:
    _, _, folder = codec
    tokenizer = open_sound(folder)
    lengths = torch.tensor([460, 233, 300, 233])
    codes = tokenizer.encode_sound(wave(rows=4), lengths)
    together = tokenizer.decode_sound(codes)
    for row, length in enumerate(lengths.tolist()):
        alone = tokenizer.encode_sound(wave(rows=4)[row : row + 1, :, :length])
        n = int(codes.lengths[row])
        assert n == alone.indices.shape[1]
        assert torch.equal(codes.indices[row, :n], alone.indices[0])
        assert not codes.indices[row, n:].any()
        sound = tokenizer.decode_sound(alone)[0]
        assert torch.allclose(together[row, :, : sound.shape[1]], sound, atol=1e-4)  # another order of sums
        assert not together[row, :, sound.shape[1] :].any()


def test_folders_both_ways(codec, tmp_path: Path) -> None:
    name, network, folder = codec
    row = ROWS[name]
    tokenizer = load_published(row, folder, {"codebooks": 3, "pattern": "interleaved", "frames": 50})
    assert isinstance(tokenizer, SoundTokenizer)
    assert (tokenizer.layout.k, tokenizer.layout.pattern, tokenizer.layout.positions) == (
        3,
        "interleaved",
        50,
    )
    export_published(tokenizer, row, tmp_path / "back")
    again = type(network).from_pretrained(tmp_path / "back")
    assert again.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())
    tokenizer.save_pretrained(tmp_path / "lexel")
    loaded = from_pretrained(tmp_path / "lexel")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert torch.equal(loaded.encode_sound(wave()).indices, tokenizer.encode_sound(wave()).indices)


def test_a_folder_is_tried(codec, capsys) -> None:
    name, network, folder = codec
    family = name.removesuffix("_acausal")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert main(["verify", family, "--checkpoint", str(folder), "--name", ROWS[name], "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["parameters"] == parameters != answer["expected"], "not the published size"
    assert answer["found"] == len(network.state_dict())
    assert "SI-SDR" in answer["note"]


def test_folders_that_do_not_fit(codec, tmp_path: Path) -> None:
    name, _, folder = codec
    other = "mimi" if name != "mimi" else "encodec-24khz"
    with pytest.raises(LexelError, match="holds a"):
        load_published(other, folder)
    with pytest.raises(LexelError, match="codebooks, bandwidth, pattern, frames alone"):
        load_published(ROWS[name], folder, {"num_filters": 3})
    with pytest.raises(LexelError, match="cannot be written as"):
        export_published(open_sound(folder), other, tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(LexelError, match="cannot be opened"):
        load_published(ROWS[name], tmp_path)


def test_codecs_that_codes_do_not_describe_are_refused() -> None:
    config = EncodecConfig(**ENCODEC, normalize=True, chunk_length_s=1.0, overlap=0.01)
    with pytest.raises(LexelError, match="loudness"):
        SoundConfig(config.to_dict()).build()
    with pytest.raises(ValueError, match="encodec, mimi, dac, xcodec"):
        SoundConfig(AutoConfig.for_model("hubert").to_dict())


@pytest.fixture(scope="module")
def dac() -> SoundTokenizer:
    torch.manual_seed(0)
    return SoundConfig({"model_type": "dac", **DAC}, codebooks=3, frames=40).build().eval()


def test_bad_sounds_and_codes_are_named(dac: SoundTokenizer) -> None:
    with pytest.raises(ValueError, match="must be float"):
        dac.encode_sound(torch.zeros(1, 2, 100))
    with pytest.raises(ValueError, match=r"1\.\.100"):
        dac.encode_sound(torch.zeros(2, 1, 100), torch.tensor([100, 101]))
    with pytest.raises(ValueError, match="codes must be"):
        dac.decode_sound(Codes(torch.full((1, 5, 3), 8)))
    with pytest.raises(LexelError, match="reads sounds, not pictures"):
        _ = dac.image_size
    with pytest.raises(LexelError, match="reads sounds, not pictures"):
        dac.encode(torch.zeros(1, 3, 8, 8))


# Sound in documents


class Letters:
    """A text tokenizer of one id per character."""

    alphabet = "abcdefghijklmnopqrstuvwxyz "

    def encode(self, text, *, add_special_tokens=False):
        return [self.alphabet.index(character) for character in text]

    def decode(self, token_ids):
        return "".join(self.alphabet[i] for i in token_ids)


@pytest.mark.parametrize("pattern", ["parallel", "interleaved", "sequential"])
def test_sound_in_documents_and_sounds_of_any_length_from_the_grammar(pattern, dac: SoundTokenizer) -> None:
    layout = replace(dac.layout, pattern=pattern)
    codec = DocumentCodec(
        Vocabulary.build(27, {"sound": layout.codebook_sizes}), Letters(), {"sound": layout}
    )
    codes = layout.padded(dac.encode_sound(wave(205, rows=1)))
    assert codes.lengths.tolist() == [21]
    sequence = codec.build([Text("a bell"), Image(codes, modality="sound"), Text("rings")])
    assert len(sequence) == 1 + 6 + 1 + 21 * (1 if pattern == "parallel" else 3) + 1 + 5 + 1
    read = codec.parse(sequence.ids)
    assert [segment.modality for segment in read] == ["text", "sound", "text"]
    assert torch.equal(read[1].codes.indices, codes.indices)
    assert torch.equal(dac.decode_sound(read[1].codes), dac.decode_sound(codes))

    grammar = Grammar(codec, ["sound"])
    prompt = codec.prompt([Text("a bell"), Image.blank("sound")])
    first, second = (set(codec.vocabulary.block("sound", j).tolist()) for j in (0, 1))
    for wanted in (1, 7, 39, 40):
        state, ids = grammar.start(prompt), []
        while not grammar.done(state):
            options = grammar.allowed(state).nonzero()[:, 0].tolist()
            ends = {codec.vocabulary.end("sound")} | (second if first & set(options) else set())
            enough = len(ids) >= wanted * (3 if pattern == "interleaved" else 1)
            ids.append(next((id for id in options if (id in ends) == enough), options[0]))
            state = grammar.advance(state, ids[-1])
        rows = torch.tensor(ids)[:, None].repeat(1, codec.columns)
        for column in range(1, codec.columns):
            rows[:wanted, column] = codec.vocabulary.block("sound", column)[3]
        opening = torch.full((1, codec.columns), codec.vocabulary.special["pad"])
        opening[0, 0] = prompt.first[-1]
        sound = codec.segments(torch.cat([opening, rows]))[0]
        assert sound.codes.lengths.tolist() == [wanted]
        assert (
            dac.decode_sound(sound.codes).shape[2]
            == dac.decode_sound(Codes(torch.zeros(1, wanted, 3).long())).shape[2]
        )


def test_every_strategy_samples_streams_of_the_same_lengths() -> None:
    """How long the streams are, by plain decoding and by drafts: means within 4 standard errors."""
    sizes = (3, 5, 4)
    layout = CodeLayout(sizes, length=6, flexible=True, pattern="sequential")
    codec = DocumentCodec(Vocabulary.build(27, {"sound": sizes}), Letters(), {"sound": layout})
    torch.manual_seed(0)
    size, pad = codec.vocabulary.size, codec.vocabulary.special["pad"]
    lm = CausalLMConfig(vocab_size=size, dim=16, layers=1, heads=2, max_length=64, pad_id=pad).build().eval()
    prompts = [codec.prompt([Text("a"), Image.blank("sound")])] * 200
    known, means, errors = strategies(lm, {}), [], []
    for name in ("plain", "jacobi", "sjd", "pac"):
        drafter = make_drafter(known, lm, name, None)
        grammar = Grammar(codec, ["sound"])
        drawn, _, _ = generate(
            lm, prompts, grammar, drafter=drafter, generator=torch.Generator().manual_seed(1)
        )
        sounds = [codec.segments(torch.cat([prompts[0].ids[-1:], ids])) for ids in drawn]
        assert all(len(segments) == 1 for segments in sounds)
        lengths = torch.tensor([int(segments[0].codes.lengths[0]) for segments in sounds]).float()
        assert len(lengths.unique()) > 3
        means.append(float(lengths.mean()))
        errors.append(float(lengths.std()) / len(lengths) ** 0.5)
    for mean, error in zip(means[1:], errors[1:]):
        assert abs(mean - means[0]) < 4 * (error**2 + errors[0] ** 2) ** 0.5
