"""LaVIT's tokenizer, token decoders and continuous path against recorded numbers, from a checkpoint of
several files.

b batch · n patches · t codes kept in a batch · d width
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lexel.tokenizers import load_published
from lexel.tokenizers.lavit import CLIP_DEVIATION, CLIP_MEAN, LAVIT, LaVIT, select
from lexel.types import Codes
from lexel.verify.fixture import Fixture

# Ids of LaVIT's language model: the picture's start and end, then the codes.
START, END, FIRST_CODE = 32000, 32001, 32002
PADDING = -1


@torch.no_grad()
def lavit(fixture: Fixture) -> dict[str, Tensor]:
    """Everything with the recorded Gumbel noise, and the codes without noise (`*_argmax`)."""
    model = cast(LaVIT, load_published("lavit-7b-v2", fixture.weights_folder(), LAVIT.known(fixture.config)))
    pixels, gumbel = _pixels(fixture), fixture.input("gumbel")
    vit = model.features(pixels)
    features = vit[:, 1:]
    scores = model.token_predictor(features)
    keep = select(scores + gumbel)
    merged = model.causal_encoder(features, keep)
    codes = model.encode_with(pixels, gumbel=gumbel)
    ours = {
        "vit_features": vit,
        "log_probs": scores,
        "keep_mask": keep.float(),
        "merged_features": merged,
        "selected_features": merged[keep],
        "to_quantizer": model.encode_task_layer(merged[keep]),
        "llm_ids_padded": _ids(codes),
        **_codes(model, codes),
        **{f"{name}_argmax": value for name, value in _codes(model, model.encode(pixels)).items()},
        "keep_mask_argmax": select(scores).float(),
    }
    ours |= _drawn(model, codes)
    if "understanding_features" in fixture:
        rows, kept = model.understand_with(pixels, gumbel=gumbel)
        lengths = kept.sum(1).tolist()
        ours["understanding_features"] = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])
    return ours


def _codes(model: LaVIT, codes: Codes) -> dict[str, Tensor]:
    """`indices` ``[t]`` and `quantized` ``[t, c]`` of all pictures one behind the other, and `token_nums`."""
    assert codes.lengths is not None
    counts = codes.lengths.tolist()
    rows = model.embed(codes)
    return {
        "indices": torch.cat([row[:count, 0] for row, count in zip(codes.indices, counts, strict=True)]),
        "quantized": torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)]),
        "token_nums": codes.lengths,
    }


def _ids(codes: Codes) -> Tensor:
    """A language model's ids of each picture, padded at the end."""
    assert codes.lengths is not None
    counts = codes.lengths.tolist()
    bodies = [row[:count, 0] + FIRST_CODE for row, count in zip(codes.indices, counts, strict=True)]
    return pad_sequence(
        [F.pad(F.pad(body, (1, 0), value=START), (0, 1), value=END) for body in bodies],
        batch_first=True,
        padding_value=PADDING,
    )


def _drawn(model: LaVIT, codes: Codes) -> dict[str, Tensor]:
    """What the token decoders that the checkpoint has make of the codes."""
    ours: dict[str, Tensor] = {}
    if model.lowres_decoder is not None:
        ours["lowres_recon"] = model.reconstruct_features(codes, "lowres")
        ours["lowres_unet_condition"] = model.decode_features(codes, "lowres")
    if model.config.highres is not None:
        first, second, pooled = model.config.highres
        both = model.decode_features(codes, "highres")
        ours["highres_recon"] = model.reconstruct_features(codes, "highres")
        ours["highres_prompt_embeds"] = both[:, :-1, : first + second]
        ours["highres_pooled_prompt_embeds"] = both[:, -1, :pooled]
    return ours


def _pixels(fixture: Fixture) -> Tensor:
    """The recorded picture was normalised with CLIP's statistics."""
    image = fixture.input("image")
    deviation, mean = (image.new_tensor(values)[:, None, None] for values in (CLIP_DEVIATION, CLIP_MEAN))
    return (image * deviation + mean) * 2 - 1
